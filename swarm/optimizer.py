"""AdamW on one flat vector, whose steps have the same bits on every processor.

The peers of a stage take the same mean gradient to the same parameters, bit by bit, whatever they compute
on; who does not is taken for drifted. Torch's own AdamW cannot promise that: `lerp` and `addcmul` round once
where a processor fuses multiplication and addition and twice where it does not, and `sqrt` on x86 is MKL's,
which is off by one bit here and there. So here are nothing but `+ - * / sqrt`, one at a time, which IEEE 754
rounds in one way only. The few scalars, and the norm that clipping needs, are computed in float64: where
processors differ in its last bits, float32 does not show it.

Torch, no I/O. Source: Loshchilov and Hutter, arXiv:1711.05101; clipping as in `torch.nn.utils`.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from swarm.config import OptimizerConfig

PART = 1 << 16  # values; the ten operations of a step find so many in a CPU's cache
GRAIN = 1 << 15  # torch gives no thread less
PART_ELSEWHERE = 1 << 22


class AdamW:
    """The two moments of every value, and the steps they make."""

    def __init__(self, config: OptimizerConfig, shapes: Sequence[torch.Size], device: torch.device) -> None:
        """`shapes` are those of the tensors that lie in the vector, one after the other."""
        self._config = config
        size = max(PART, GRAIN * torch.get_num_threads()) if device.type == "cpu" else PART_ELSEWHERE
        self._parts: list[tuple[slice, bool]] = []  # and whether it decays
        stop = 0
        for decays, run in groupby(shapes, lambda shape: len(shape) >= 2):
            start, stop = stop, stop + sum(shape.numel() for shape in run)
            for first in range(start, stop, size):
                self._parts.append((slice(first, min(first + size, stop)), decays))
        self.first, self.second = torch.zeros(stop, device=device), torch.zeros(stop, device=device)
        largest = max((part.stop - part.start for part, _ in self._parts), default=0)
        self._room = torch.empty(2, largest, device=device)

    def renew(self) -> None:
        """Go on in new memory: somebody still reads the moments where they are."""
        self.first, self.second = self.first.clone(), self.second.clone()

    def step(self, values: torch.Tensor, gradient: torch.Tensor, *, number: int, lr: float) -> None:
        """The step after `number` others, in place on `values` ([values] float32), from the `gradient`, which
        lies on the CPU and stays as it is."""
        c = self._config
        clip = _clipping(gradient, c.clip_norm)
        # Reciprocals: a GPU divides by a scalar in other ways.
        rate, correction = lr / (1 - c.beta1 ** (number + 1)), (1 - c.beta2 ** (number + 1)) ** -0.5
        for part, decays in self._parts:
            x, first, second = values[part], self.first[part], self.second[part]
            g, room = self._room[:, : len(x)]
            torch.mul(gradient[part].to(g.device), clip, out=g)
            first.mul_(c.beta1).add_(torch.mul(g, 1 - c.beta1, out=room))
            second.mul_(c.beta2).add_(g.mul_(g).mul_(1 - c.beta2))
            _sqrt(second, out=g).mul_(correction).add_(c.eps)
            if decays and c.weight_decay:
                x.mul_(1 - lr * c.weight_decay)
            x.sub_(torch.div(first, g, out=room).mul_(rate))


def _sqrt(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest, as numpy's and CUDA's are, and torch's on a CPU is not."""
    if x.device.type == "cpu":
        np.sqrt(x.numpy(), out=out.numpy())
        return out
    return torch.sqrt(x, out=out)


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
