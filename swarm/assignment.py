"""Which stage a peer that may serve any of them should take: the one that most lacks throughput.

Pure.
"""

from collections.abc import Sequence

from swarm.records import PeerRecord


def choose_stage(rosters: Sequence[Sequence[PeerRecord]]) -> tuple[int, str]:
    """The stage to serve, and why: an empty one first, then the one with the least throughput per pool.

    Peers that have not measured themselves yet count as the average of those that have.
    """
    empty = [stage for stage, roster in enumerate(rosters) if not roster]
    if empty:
        return empty[0], "it has no peer"
    speeds = [r.tokens_per_s for roster in rosters for r in roster if r.tokens_per_s > 0]
    assumed = sum(speeds) / len(speeds) if speeds else 1.0
    totals = [sum(r.tokens_per_s or assumed for r in roster) for roster in rosters]
    stage = min(range(len(totals)), key=lambda s: (totals[s], s))
    return stage, f"its pool is the slowest, {totals[stage]:.0f} tokens/s"
