"""The mean of the parts that arrived, by the weight that arrived (robust means plug in here).

Torch, no I/O. Members are summed in the plan's order, so the result does not depend on who was faster; each
is scaled and then added, rounded twice: fused, as some processors do it, the bits would be others.
"""

from collections.abc import Iterable

import torch


def weighted_mean(parts: Iterable[tuple[float, torch.Tensor]], values: int) -> torch.Tensor:
    """Add up `(share of the weight, part)`; zeros if there are none. A part is looked at once, in its turn.

    Shapes: every part [values] float32; result [values] float32.
    """
    mean: torch.Tensor | None = None
    scaled = torch.empty(values)
    for share, part in parts:
        if mean is None:
            mean = part * share
        else:
            mean += torch.mul(part, share, out=scaled)
    return torch.zeros(values) if mean is None else mean
