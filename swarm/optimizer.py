"""AdamW on one flat vector, whose steps have the same bits on every processor.

The peers of a stage take the same mean gradient to the same parameters, bit by bit, whatever they compute
on; who does not is taken for drifted. Torch's own AdamW cannot promise that: `lerp` and `addcmul` round once
where a processor fuses multiplication and addition and twice where it does not. So here is nothing but
`+ - * / sqrt`, one at a time, each of which IEEE 754 rounds in one way only; and the norm that clipping needs
is summed in float64, where the order of summation does not show.

Torch, no I/O. Source: Loshchilov and Hutter, arXiv:1711.05101; clipping as in `torch.nn.utils`.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch

from swarm.config import OptimizerConfig

PART = 1 << 16  # values; the ten operations of a step find so many in a CPU's cache


class AdamW:
    """The two moments of every value, and the steps they make."""

    def __init__(self, config: OptimizerConfig, shapes: Sequence[torch.Size], device: torch.device) -> None:
        """`shapes` are those of the tensors that lie in the vector, one after the other."""
        self._config = config
        self._parts: list[tuple[slice, bool]] = []  # and whether it decays
        stop = 0
        for decays, run in groupby(shapes, lambda shape: len(shape) >= 2):
            start, stop = stop, stop + sum(shape.numel() for shape in run)
            size = PART if device.type == "cpu" else stop - start
            self._parts += [
                (slice(first, min(first + size, stop)), decays) for first in range(start, stop, size or 1)
            ]
        self.mean, self.square = torch.zeros(stop, device=device), torch.zeros(stop, device=device)
        largest = max((part.stop - part.start for part, _ in self._parts), default=0)
        self._room = torch.empty(2, largest, device=device)

    def step(self, values: torch.Tensor, gradient: torch.Tensor, *, number: int, lr: float) -> None:
        """The step after `number` others, in place on `values` ([values] float32), from the `gradient`, which
        lies on the CPU and stays as it is."""
        c = self._config
        clip = _clipping(gradient, c.clip_norm)
        # Reciprocals: a GPU divides by a scalar in other ways.
        rate, whitened = lr / (1 - c.beta1 ** (number + 1)), (1 - c.beta2 ** (number + 1)) ** -0.5
        for part, decays in self._parts:
            x, mean, square = values[part], self.mean[part], self.square[part]
            g, room = self._room[:, : len(x)]
            torch.mul(gradient[part].to(g.device), clip, out=g)
            mean.mul_(c.beta1).add_(torch.mul(g, 1 - c.beta1, out=room))
            square.mul_(c.beta2).add_(g.mul_(g).mul_(1 - c.beta2))
            torch.sqrt(square, out=g).mul_(whitened).add_(c.eps)
            if decays and c.weight_decay:
                x.mul_(1 - lr * c.weight_decay)
            x.sub_(torch.div(mean, g, out=room).mul_(rate))


def _clipping(gradient: torch.Tensor, most: float | None) -> float:
    """What to multiply the gradient by, so that its norm is `most` at the most."""
    if most is None:
        return 1.0
    squares, room = 0.0, torch.empty(PART, dtype=torch.float64)
    for part in gradient.split(PART):
        exact = room[: len(part)].copy_(part)
        squares += float(torch.dot(exact, exact))
    return min(1.0, most / (math.sqrt(squares) + 1e-6))


def learning_rate(config: OptimizerConfig, version: int, steps: int) -> float:
    """Of the step that takes `version` to `version + 1`: linear warm-up, cosine decay, then constant."""
    if version < config.warmup_steps:
        return config.lr * (version + 1) / config.warmup_steps
    end = config.decay_steps or steps
    progress = min(1.0, (version - config.warmup_steps) / max(1, end - config.warmup_steps))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
