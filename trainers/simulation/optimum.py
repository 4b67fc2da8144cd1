"""The best that a number of peers could do if they were put where they are needed at once and for free.

Pure.
"""

from collections.abc import Iterable, Sequence


def best_assignment(speeds: Iterable[float], costs: Sequence[float]) -> tuple[float, list[int]]:
    """The capacity of the weakest stage, and how many peers each has.

    The fastest first, each to the stage that is weakest so far: exact for equal peers, and for equal costs
    when every speed divides the next faster one; else near it.

    Args:
        speeds: of the peers, as in `swarm.rebalance.Seat`.
        costs: of a token in every stage.
    """
    totals, counts = [0.0] * len(costs), [0] * len(costs)
    for speed in sorted(speeds, reverse=True):
        stage = min(range(len(costs)), key=lambda s: (totals[s], s))
        totals[stage] += speed / costs[stage]
        counts[stage] += 1
    return min(totals), counts
