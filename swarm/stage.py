"""One stage's arithmetic: forward, backward, accumulate, optimizer step. Knows nothing of the network.

Gradients accumulate as sums over tokens; dividing by the tokens gives the mean that plain training
would have. `freeze` takes the accumulated sum for averaging and starts a new one, so that computation
can go on behind the averaging (delayed updates). The loss is the sum of cross-entropies over the tokens
of a microbatch: the scale is fixed once, when the mean is taken.

A step replaces the parameter tensors instead of writing into them, so a graph that was built before the
step still runs backward with the weights it was computed with.

Torch; owned by one compute thread. B batch, T tokens, D width, V vocabulary.
"""

import hashlib
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from averaging.plan import Pass
from swarm.config import TrainingConfig
from swarm.history import History
from swarm.optimizer import AdamW, learning_rate
from swarm.tensors import Pieces, pieces_of
from swarm.weights import Layout, Weights

HISTORY = "history"  # its name in a state


def state_kinds(*, strict: bool) -> tuple[str, ...]:
    """The vectors that a state consists of."""
    return ("parameter", "exp_avg", "exp_avg_sq", *(("previous",) if strict else ()))


@dataclass(slots=True)
class Graph:
    """A forward pass whose backward is still to come."""

    x: torch.Tensor  # the input leaf
    y: torch.Tensor
    parameters: list[nn.Parameter]  # those that y was computed with


@dataclass(slots=True)
class Accumulator:
    """Sum over tokens of the gradients of one step, and what went into it."""

    step: int
    sums: list[torch.Tensor]
    tokens: int = 0
    microbatches: list[bytes] = field(default_factory=list)


class _Scalar(torch.autograd.Function):
    """Something whose gradient with respect to `y` is `grad_y`.

    Given to `torch.autograd.grad` itself, `grad_y` makes it import sympy to compare two shapes: half a second
    of a newcomer's first microbatch.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
        ctx.grad_y = grad_y
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.grad_y, None


class Stage:
    """The module of one stage, its optimizer and its accumulator."""

    def __init__(
        self, module: nn.Module, training: TrainingConfig, *, stage: int, stages: int, device: str = "cpu"
    ) -> None:
        self.stage, self.is_first, self.is_last = stage, stage == 0, stage == stages - 1
        self.device = torch.device(device)
        self.module = module.to(self.device)
        self.version = 0
        self.history = History()
        self._training = training
        self._layout = Layout(self.module)
        self._weights = self._layout.adopt()
        self._optimizer = AdamW(training.optimizer, self.shapes, self.device)
        self._snapshots = weakref.WeakSet[Pieces]()  # of this version, that somebody has
        self._as_loaded = False  # the moments lie in the memory that a state has come in, and keep all of it
        # Strict mode: a step back, for neighbours whose step has not closed when this one's has.
        self._previous: Weights | None = None
        self.accumulator = self.empty(0)
        self.frozen: Accumulator | None = None  # the sum that goes into the step which closes
        self.parted: Accumulator | None = None  # what this peer, which leaves, gives to a stage mate

    @property
    def values(self) -> int:
        """Parameters of the stage, and so values of a gradient vector."""
        return self._layout.values

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the tensors in a gradient vector, in its order."""
        return list(self._layout.shapes.values())

    @property
    def gradient(self) -> Pass:
        """Size of a gradient vector; the small tensors come last."""
        return Pass(self.values, self._layout.small_values)

    def warm_up(self, x: torch.Tensor) -> None:
        """Compute a microbatch (token ids [B, T] or hidden [B, T, D]) that does not count, and touch the
        memory that the first sum needs: for a fresh process the first time takes long.
        """
        _, graph = self.forward(x, keep_graph=True)
        assert graph is not None
        self.backward(graph, torch.zeros_like(graph.y))
        for held in self.sums:
            for each in held.sums:
                each.add_(0.0)

    # one microbatch

    def forward(
        self, x: torch.Tensor, *, keep_graph: bool, step: int | None = None
    ) -> tuple[torch.Tensor, Graph | None]:
        """Token ids [B, T] or hidden [B, T, D] on any device -> output on this device, and its graph.

        With the weights that `step` began with, if they are still here, else with the newest.
        """
        x, parameters = x.to(self.device), self._parameters_of(step)
        if not keep_graph:
            with torch.no_grad():
                return self._call(x, parameters), None
        if x.is_floating_point():
            x = x.requires_grad_(True)
        y = self._call(x, parameters)
        return y.detach(), Graph(x, y, parameters)

    def can_compute(self, step: int) -> bool:
        """Are the weights that `step` began with here?"""
        return step == self.version or (step == self.version - 1 and self._previous is not None)

    def _parameters_of(self, step: int | None) -> list[nn.Parameter]:
        if step == self.version - 1 and self._previous is not None:
            return self._previous.parameters
        return self._weights.parameters

    def _call(self, x: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
        if parameters is self._weights.parameters:
            return self.module(x)
        named: dict[str, torch.Tensor] = dict(zip(self._layout.shapes, parameters, strict=True))
        return torch.func.functional_call(self.module, named, (x,))

    def backward(self, graph: Graph, grad_y: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Gradients of the parameters and of the input (None at the first stage); accumulates nothing."""
        return self._gradients(graph, graph.y, grad_y.to(self.device))

    def loss(self, logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Sum over tokens of the cross-entropy in nats."""
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.to(self.device).flatten(), reduction="sum"
        )

    def loss_backward(
        self, x: torch.Tensor, targets_BT: torch.Tensor, *, step: int | None = None
    ) -> tuple[float, list[torch.Tensor], torch.Tensor | None]:
        """Forward, loss and backward of the last stage: (loss, parameter gradients, input gradient)."""
        _, graph = self.forward(x, keep_graph=True, step=step)
        assert graph is not None
        loss = self.loss(graph.y, targets_BT)
        gradients, grad_x = self._gradients(graph, loss, None)
        return float(loss.detach()), gradients, grad_x

    def _gradients(
        self, graph: Graph, of: torch.Tensor, grad: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        inputs = [*graph.parameters, *([graph.x] if graph.x.requires_grad else [])]
        if grad is not None:
            if grad.shape != of.shape:
                raise ValueError(f"gradient {tuple(grad.shape)} of an output {tuple(of.shape)}")
            of = _Scalar.apply(of, grad)
        # Not `.backward()`: nothing may reach the accumulator before the peer's lease has been checked.
        gradients = torch.autograd.grad(of, inputs, allow_unused=True, materialize_grads=True)
        if graph.x.requires_grad:
            return list(gradients[:-1]), gradients[-1]
        return list(gradients), None

    # one step

    def accumulate(self, microbatch: bytes, gradients: list[torch.Tensor], tokens: int) -> int:
        """Add one microbatch to the current step's sum; returns that step."""
        torch._foreach_add_(self.accumulator.sums, gradients)
        self.accumulator.tokens += tokens
        self.accumulator.microbatches.append(microbatch)
        return self.accumulator.step

    @property
    def sums(self) -> list[Accumulator]:
        """What is accumulated and in no step yet."""
        return [self.accumulator] if (frozen := self.frozen) is None else [frozen, self.accumulator]

    def freeze(self) -> Accumulator:
        """The sum of the step that closes, with what an abandoned plan left of it.

        From now on gradients are accumulated for the next step.
        """
        self.thaw()
        self.frozen = self.accumulator
        self.accumulator = self.empty(self.frozen.step + 1)
        return self.frozen

    def thaw(self) -> None:
        """Undo `freeze`: the step that closed did so without this sum, or is to begin anew."""
        if self.frozen is not None:
            torch._foreach_add_(self.accumulator.sums, self.frozen.sums)
            self.accumulator.tokens += self.frozen.tokens
            self.accumulator.microbatches += self.frozen.microbatches
            self.accumulator.step, self.frozen = self.frozen.step, None

    def discard(self, given_up: Accumulator) -> None:
        """Forget one of the two sums; what has been accumulated behind a frozen one counts in its step."""
        if given_up is self.frozen:
            self.accumulator.step, self.frozen = given_up.step, None
        elif given_up is self.accumulator:
            self.accumulator = self.empty(given_up.step)

    def part_with(self, *, frozen: bool) -> Accumulator:
        """Take out what is accumulated, and of an abandoned plan what is `frozen`; what comes now is new."""
        if frozen:
            self.thaw()
        self.parted, self.accumulator = self.accumulator, self.empty(self.accumulator.step)
        return self.parted

    def take_over(self, vector: torch.Tensor, tokens: int, microbatches: Collection[bytes]) -> int:
        """Add the sum [values] that a stage mate had accumulated; returns the step it counts in now."""
        parts = self._layout.parted(vector.to(self.device)).values()
        torch._foreach_add_(self.accumulator.sums, list(parts))
        self.accumulator.tokens += tokens
        self.accumulator.microbatches += microbatches
        return self.accumulator.step

    def holds(self, microbatch: bytes) -> Accumulator | None:
        """The sum that its gradient is in."""
        held = [*self.sums, *([] if self.parted is None else [self.parted])]
        return next((each for each in held if microbatch in each.microbatches), None)

    @staticmethod
    def vector(held: Accumulator) -> torch.Tensor:
        """A sum as one flat float32 CPU vector [values]."""
        return torch.cat([s.reshape(-1) for s in held.sums]).cpu()

    @staticmethod
    def mean(frozen: Accumulator) -> torch.Tensor:
        """The mean gradient per token as one flat float32 CPU vector [values]; zeros without tokens."""
        flat = torch.cat([s.reshape(-1) for s in frozen.sums])
        return flat.div_(max(1, frozen.tokens)).cpu()

    def apply(self, mean: torch.Tensor, microbatches: Collection[bytes] = ()) -> None:
        """One optimizer step with the mean gradient [values] of `microbatches`; the version grows by one."""
        self._step(mean, microbatches, renew=self._as_loaded)
        self._as_loaded = False

    def _step(self, mean: torch.Tensor, microbatches: Collection[bytes], *, renew: bool = False) -> None:
        if self._training.strict:
            self._previous = self._weights
        if self._snapshots or renew:
            self._optimizer.renew()
            self._snapshots.clear()
        vector = self._weights.vector.clone()
        lr = learning_rate(self._training.optimizer, self.version, self._training.steps)
        self._optimizer.step(vector, mean, number=self.version, lr=lr)
        self._weights = self._layout.weights(vector)
        self._layout.give(self._weights)
        self.history = self.history.with_step(self.version, microbatches)
        self.version, self.frozen = self.version + 1, None

    def replay(self, mean: torch.Tensor, microbatches: Collection[bytes]) -> None:
        """Take a step that others have taken already; what is accumulated here is not in it."""
        self.thaw()
        self._step(mean, microbatches)
        self.accumulator.step = self.version

    def empty(self, step: int) -> Accumulator:
        """A sum of nothing, for `step`."""
        return Accumulator(step, [torch.zeros_like(p) for p in self._weights.parameters])

    # state

    def state(self) -> dict[str, torch.Tensor]:
        """Parameters, optimizer state and history by name, in memory that the next step may change."""
        state = {
            f"{kind}/{name}": tensor
            for kind, vector in self._vectors().items()
            for name, tensor in self._layout.parted(vector).items()
        }
        packed = self.history.pack()
        state[HISTORY] = torch.tensor(bytearray(packed), dtype=torch.uint8)
        return state

    def snapshot(self) -> Pieces:
        """The state as bytes, in its own memory: a step leaves that as it is while somebody has them."""
        pieces = pieces_of(self.state())
        self._snapshots.add(pieces)
        return pieces

    def load(self, state: dict[str, torch.Tensor], version: int) -> None:
        """Replace parameters and optimizer by `state` at `version`; what is accumulated counts on there.

        The memory of `state` is this stage's from now on. Raises ValueError when names or shapes differ;
        nothing is changed then.
        """
        shapes = self._layout.shapes.items()
        own = {f"{kind}/{name}": shape for kind in self._vectors() for name, shape in shapes}
        names = own.keys() | {HISTORY}
        if names != state.keys():
            raise ValueError(f"state names differ: {sorted(names ^ state.keys())[:3]} ...")
        if state[HISTORY].dtype != torch.uint8 or not 0 <= version < 2**53:
            raise ValueError("its history or version is malformed")
        history = History.unpack(state[HISTORY].numpy().tobytes())
        for name, shape in own.items():
            if state[name].shape != shape or state[name].dtype != torch.float32:
                found, expected = tuple(state[name].shape), tuple(shape)
                raise ValueError(f"state of {name}: {found} {state[name].dtype} is not {expected} float32")

        def loaded(kind: str) -> torch.Tensor:
            tensors = {name: state[f"{kind}/{name}"] for name in self._layout.shapes}
            return self._layout.joined(tensors).to(self.device)

        self._weights = self._layout.weights(loaded("parameter"))
        self._layout.give(self._weights)
        self._optimizer.first, self._optimizer.second = loaded("exp_avg"), loaded("exp_avg_sq")
        self._as_loaded = self.device.type == "cpu"
        if self._training.strict and version:
            self._previous = self._layout.weights(loaded("previous"))
        self.version, self.history = version, history
        for ahead, held in enumerate(self.sums):
            held.step = version + ahead

    def _vectors(self) -> dict[str, torch.Tensor]:
        """What a state consists of: [values] each, by kind."""
        own = [self._weights.vector, self._optimizer.first, self._optimizer.second]
        if self._training.strict:
            own.append((self._previous or self._weights).vector)
        return dict(zip(state_kinds(strict=self._training.strict), own, strict=True))

    def hash(self) -> bytes:
        """Eight bytes that differ when any parameter's bits or the version do."""
        digest = hashlib.sha256(self.version.to_bytes(8, "little"))
        digest.update(self._weights.vector.cpu().view(torch.uint8).numpy().data)
        return digest.digest()[:8]
