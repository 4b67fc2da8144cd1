"""The computation of one hop: what a peer does in its compute thread with a microbatch.

Forward keeps its autograd graph while there is room and is computed again from the retained input
otherwise. A gradient reaches the accumulator last, once everything that could forbid it has been asked.

Torch; called by the compute thread only. B batch, T tokens, D width.
"""

import math
from collections import Counter
from collections.abc import Callable

import torch

from averaging.codecs import CODECS
from averaging.errors import CodecError
from averaging.network import Buffer, PeerId
from swarm.config import RunConfig
from swarm.errors import RejectedError
from swarm.mailbox import Hop, Phase, Sent
from swarm.messages import Push
from swarm.stage import Graph, Stage


class WithdrawnError(Exception):
    """The trainer may have given this hop to another peer: it must not be accumulated here."""


class NotFiniteError(Exception):
    """The computation overflowed; nothing of it may be accumulated."""


class HopJobs:
    """Forward, loss and backward of the hops of one stage."""

    def __init__(
        self,
        stage: Stage,
        config: RunConfig,
        counters: Counter[str],
        *,
        may_accumulate: Callable[[Hop], bool],
    ) -> None:
        """`may_accumulate` tells whether the lease of a hop's trainer still runs."""
        self._stage, self._config, self._counters = stage, config, counters
        self._may_accumulate = may_accumulate
        self._codec = CODECS[config.pipeline.codec]
        self._kept: set[int] = set()  # hops with a graph; changed by both threads, one operation at a time

    def forward(self, hop: Hop) -> None:
        """Compute the output, or when evaluating in the last stage the loss. Raises WithdrawnError."""
        assert hop.x is not None
        self._check_lease(hop)
        keep = not hop.route.evaluate and len(self._kept) < self._config.pipeline.keep_graphs
        hop.version = self._stage.version
        y, hop.graph = self._stage.forward(hop.x, keep_graph=keep, step=self._step_of(hop))
        if hop.graph is not None:
            self._kept.add(id(hop))
        hop.x = None
        if self._stage.is_last:
            hop.loss = float(self._stage.loss(y, hop.push.token_ids()[:, 1:]))
        else:
            hop.output = Sent(self._codec.encode(y), tuple(y.shape))

    def loss(self, hop: Hop) -> None:
        """The last stage: forward, loss and backward at once. Raises NotFiniteError, WithdrawnError."""
        assert hop.x is not None
        self._check_lease(hop)
        hop.version = self._stage.version
        targets_BT = hop.push.token_ids()[:, 1:]
        loss, gradients, grad_x = self._stage.loss_backward(hop.x, targets_BT, step=self._step_of(hop))
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss}")
        hop.loss = loss
        self._accumulate(hop, gradients, grad_x)

    def backward(self, hop: Hop) -> None:
        """The input's gradient, and the parameters' accumulated. Raises NotFiniteError, WithdrawnError."""
        assert hop.grad is not None
        self._check_lease(hop)
        if self._stage.version - hop.version > self._config.training.max_staleness:
            self._counters["too_stale"] += 1  # the weights have gone on too far: compute it with new ones
            self.drop_graph(hop)
        graph = hop.graph or self._recompute(hop)
        gradients, grad_x = self._stage.backward(graph, hop.grad)
        self._accumulate(hop, gradients, grad_x)

    def drop_graph(self, hop: Hop) -> None:
        hop.graph = None
        self._kept.discard(id(hop))

    def _recompute(self, hop: Hop) -> Graph:
        assert hop.input is not None and hop.input_push is not None
        self._counters["recomputed"] += 1
        x = decode(hop.route.trainer, hop.input_push, hop.input)
        hop.version = self._stage.version
        _, graph = self._stage.forward(x, keep_graph=True, step=self._step_of(hop))
        assert graph is not None
        return graph

    def _step_of(self, hop: Hop) -> int | None:
        """Whose weights a hop is to be computed with: strict mode's own step, else the newest."""
        return hop.route.step if self._config.training.strict and not hop.route.evaluate else None

    def _check_lease(self, hop: Hop) -> None:
        """A process that was stopped has hops in its queue which are with others by now."""
        if not self._may_accumulate(hop):
            raise WithdrawnError("the trainer has not been heard for too long")

    def _accumulate(self, hop: Hop, gradients: list[torch.Tensor], grad_x: torch.Tensor | None) -> None:
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())):
            raise NotFiniteError("a gradient is not finite")
        self._check_lease(hop)
        if hop.dropped:
            raise WithdrawnError("it was withdrawn while it was computed")
        hop.gradient = None if grad_x is None else Sent(self._codec.encode(grad_x), tuple(grad_x.shape))
        if self._stage.stage in hop.route.accumulated or hop.route.microbatch in self._stage.history:
            hop.step = self._stage.accumulator.step  # it only supplies its neighbours
        elif (held := self._stage.holds(hop.route.microbatch)) is not None:
            hop.step, hop.counted = held.step, True  # a stage mate that left has handed it over
        else:
            hop.step = self._stage.accumulate(hop.route.microbatch, gradients, hop.push.token_count)
            hop.counted = True
            self._counters["steps_behind"] += max(0, hop.step - hop.version)
        # Here, not on the event loop: a cancel that comes next must find what is already true.
        hop.phase = Phase.ACCUMULATED


def decode(sender: PeerId, push: Push, payload: Buffer) -> torch.Tensor:
    """The tensor of a push: token ids [B, T] or hidden [B, T, D]. Raises RejectedError."""
    if not push.shape:
        return push.token_ids()[:, :-1]
    try:
        return push.codec.decode(payload, push.shape)
    except CodecError as error:
        raise RejectedError(sender, str(error)) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    # On CPU torch has no type for it, only this text of its allocator.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
