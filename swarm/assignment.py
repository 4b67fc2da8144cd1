"""Which stage a peer that may serve any of them should take, the weakest for what it costs, and who moves.

Pure.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from swarm.config import RebalancingConfig
from swarm.rebalance import (
    Doing,
    Rebalancing,
    Seat,
    best_moves,
    capacities,
    papers_moves,
    weakest_stage,
)
from swarm.records import PeerRecord

LOADING_LOOK_S = 2.0
MOST = 10.0  # nobody counts as more than so many times as fast as usual, whatever it says


def seats_of(rosters: Sequence[Sequence[PeerRecord]]) -> list[Seat]:
    """All peers with a device; who has not measured itself yet counts as usual.

    One that has just moved may stand on two rosters: what it announced last holds.
    """
    announced = sorted((record for roster in rosters for record in roster), key=lambda r: r.announced_s)
    last = {record.peer: record for record in announced}
    records = [record for record in last.values() if record.computes]
    known = [record.speed for record in records if record.speed > 0]
    usual = median(known) if known else 1.0
    return [_seat(record, min(record.speed or usual, MOST * usual), len(rosters)) for record in records]


def _seat(record: PeerRecord, speed: float, stages: int) -> Seat:
    if record.heading is not None and record.heading < stages:
        return Seat(record.peer, record.heading, speed, Doing.MOVES)
    doing = Doing.LOADS if record.loading else Doing.SERVES
    if record.fixed:
        doing = Doing.MOVES if record.loading else Doing.STAYS
    return Seat(record.peer, record.stage, speed, doing, load=record.queue)


def choose_stage(rosters: Sequence[Sequence[PeerRecord]], costs: Sequence[float]) -> tuple[int, str]:
    """The stage to serve, and why. `costs`: of a token in every stage, in the unit of speeds."""
    seats = seats_of(rosters)
    stage = weakest_stage(seats, costs)
    peers = sum(seat.stage == stage for seat in seats)
    if not peers:
        return stage, "it has no peer"
    total = capacities(seats, costs)
    return stage, f"the weakest, with {peers} peers and {total[stage] / max(total):.0%} of the strongest one"


def rebalancing_of(
    rosters: Sequence[Sequence[PeerRecord]], costs: Sequence[float], settings: RebalancingConfig
) -> Rebalancing:
    """Who should go to another stage, by the run's rule; newcomers that still load a state, by any rule."""
    seats = seats_of(rosters)
    if settings.rule == "best":
        return best_moves(seats, costs, worth=settings.worth)
    fixed = [replace(seat, doing=Doing.STAYS) if seat.doing is Doing.SERVES else seat for seat in seats]
    spread = best_moves(fixed, costs, worth=0.0)
    if settings.rule == "none" or spread.moves:
        return spread
    return papers_moves(seats, costs)


def look_s(settings: RebalancingConfig, *, loading: bool) -> float:
    """About how long until a peer looks at the rosters again: who loads a state in vain loses most."""
    return min(settings.period_s, LOADING_LOOK_S) if loading else settings.period_s


def choose_assisted(rosters: Sequence[Sequence[PeerRecord]]) -> tuple[int, str]:
    """The stage to reduce for, and why: the one with the most members for each that only reduces."""

    def crowd(stage: int) -> float:
        helpers = sum(record.aggregates_only for record in rosters[stage])
        return sum(record.computes for record in rosters[stage]) / (1 + helpers)

    stage = max(range(len(rosters)), key=lambda s: (crowd(s), -s))
    return stage, f"it has {len(rosters[stage])} peers"
