"""Cut a list of layers into consecutive stages so that the most expensive stage is as cheap as possible.

Pure. Exact dynamic program over the cut positions; ties prefer the earlier cut, so every process that
knows the costs finds the same partition.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Layers of every stage, by index.

    Raises:
        ValueError: there are fewer layers than stages, or no stages.
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages")
    prefix = [0.0, *accumulate(costs)]

    @cache
    def best(first: int, left: int) -> tuple[float, int]:
        """(cost of the worst stage, end of the first one) for layers from `first` in `left` stages."""
        if left == 1:
            return prefix[-1] - prefix[first], len(costs)
        return min(
            (max(prefix[end] - prefix[first], best(end, left - 1)[0]), end)
            for end in range(first + 1, len(costs) - left + 2)
        )

    cuts, first = [], 0
    for left in range(stages, 0, -1):
        end = best(first, left)[1]
        cuts.append(range(first, end))
        first = end
    return cuts
