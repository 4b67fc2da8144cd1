"""Which stage a peer that may serve any of them should take: the one that most lacks throughput, or reducers.

Pure.
"""

from collections.abc import Sequence

from swarm.records import PeerRecord


def choose_stage(rosters: Sequence[Sequence[PeerRecord]]) -> tuple[int, str]:
    """The stage to serve, and why: an empty one first, then the one with the least throughput per pool.

    Peers that have not measured themselves yet count as the average of those that have.
    """
    pools = [[record for record in roster if not record.aggregates_only] for roster in rosters]
    empty = [stage for stage, pool in enumerate(pools) if not pool]
    if empty:
        return empty[0], "it has no peer"
    speeds = [r.tokens_per_s for pool in pools for r in pool if r.tokens_per_s > 0]
    assumed = sum(speeds) / len(speeds) if speeds else 1.0
    totals = [sum(r.tokens_per_s or assumed for r in pool) for pool in pools]
    stage = min(range(len(totals)), key=lambda s: (totals[s], s))
    return stage, f"its pool is the slowest, {totals[stage]:.0f} tokens/s"


def choose_assisted(rosters: Sequence[Sequence[PeerRecord]]) -> tuple[int, str]:
    """The stage to reduce for, and why: the one with the most members for each that only reduces."""

    def crowd(stage: int) -> float:
        helpers = sum(record.aggregates_only for record in rosters[stage])
        return (len(rosters[stage]) - helpers) / (1 + helpers)

    stage = max(range(len(rosters)), key=lambda s: (crowd(s), -s))
    return stage, f"it has {len(rosters[stage])} peers"
