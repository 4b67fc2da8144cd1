"""The mean of the parts that arrived, by the weight that arrived (robust means plug in here).

Torch, no I/O. Members are summed in the plan's order, so the result does not depend on who was faster; each
is scaled and then added, rounded twice: fused, as some processors do it, the bits would be others.
"""

from collections.abc import Sequence

import torch


def weighted_mean(parts: Sequence[tuple[float, torch.Tensor | None]], values: int) -> torch.Tensor:
    """Average `(weight, part)`; a part of weight zero may be None. Zeros if no weight arrived at all.

    Shapes: every part [values] float32; result [values] float32.
    """
    given = [(weight, part) for weight, part in parts if part is not None and weight > 0]
    if not given:
        return torch.zeros(values)
    total = sum(weight for weight, _ in given)
    mean = given[0][1] * (given[0][0] / total)
    scaled = torch.empty(values if len(given) > 1 else 0)
    for weight, part in given[1:]:
        mean += torch.mul(part, weight / total, out=scaled)
    return mean
