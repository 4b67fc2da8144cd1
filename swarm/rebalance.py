"""Which peers should change their stage, so that the weakest stage becomes as strong as it can be.

A stage is as strong as the speeds of its peers over what a token costs there; who is on its way counts where
it goes. Everybody who has the same records comes to the same moves, and carries out its own:

    again and again give the weakest stage the peer with which the weaker of both stages ends strongest,
        of equally good ones a newcomer that is still loading its state, as it loses least
    stop when nothing makes the weakest stage stronger; what came after its last gain is not done
    do nothing of it unless the pipeline gains more than it costs to move

No stage loses the last peer that serves it. `papers_moves` is SWARM's own rule, for comparison.

Pure. Source of that: SWARM, arXiv:2301.11913, algorithm 2; the default is ours.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from averaging.network import PeerId

NEGLIGIBLE = 1e-9  # of a capacity: rounding


class Doing(Enum):
    """What a peer is about."""

    SERVES = "serves"
    STAYS = "stays"  # serves, and nobody may move it
    LOADS = "loads"  # a newcomer: its state is still coming
    MOVES = "moves"  # on its way here, and nobody may send it elsewhere


@dataclass(frozen=True, slots=True)
class Seat:
    """One peer and the stage that it serves, or will."""

    peer: PeerId
    stage: int
    speed: float = 1.0  # tokens per second, times what a token costs in the stage where that was measured
    doing: Doing = Doing.SERVES
    load: float = 0.0  # jobs that wait at it


@dataclass(frozen=True, slots=True)
class Move:
    peer: PeerId
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Rebalancing:
    """The moves, and why these."""

    moves: tuple[Move, ...]
    reason: str


def capacities(seats: Iterable[Seat], costs: Sequence[float]) -> list[float]:
    """Tokens per second of every stage, once all are where they are going."""
    total = [0.0] * len(costs)
    for seat in seats:
        total[seat.stage] += seat.speed / costs[seat.stage]
    return total


def weakest_stage(seats: Iterable[Seat], costs: Sequence[float]) -> int:
    """Where a newcomer is needed most."""
    total = capacities(seats, costs)
    return min(range(len(costs)), key=lambda stage: (total[stage], stage))


def _by_speed(seat: Seat) -> tuple[float, PeerId]:
    return seat.speed, seat.peer


@dataclass(slots=True)
class _Pool:
    """The peers of a stage that may be moved, by speed."""

    cost: float
    capacity: float = 0.0
    stay: int = 0  # how many serve it and may not be moved
    loading: list[Seat] = field(default_factory=list)
    serving: list[Seat] = field(default_factory=list)

    def sort(self) -> None:
        for seats in (self.loading, self.serving):
            seats.sort(key=_by_speed)

    def offers(self, weakest: "_Pool") -> Iterable[tuple[float, bool, Seat]]:
        """Who might go: (the weaker of both stages then, is it still loading, who)."""
        even = (self.capacity - weakest.capacity) / (1 / self.cost + 1 / weakest.cost)
        able = self.serving if self.stay + len(self.serving) > 1 else []
        for seats, loading in ((self.loading, True), (able, False)):
            at = bisect_right(seats, even, key=lambda seat: seat.speed)
            for seat in seats[max(0, at - 1) : at + 1]:
                left = self.capacity - seat.speed / self.cost
                yield min(left, weakest.capacity + seat.speed / weakest.cost), loading, seat

    def give(self, seat: Seat) -> None:
        seats = self.loading if seat.doing is Doing.LOADS else self.serving
        del seats[bisect_left(seats, _by_speed(seat), key=_by_speed)]
        self.capacity -= seat.speed / self.cost


def best_moves(seats: Iterable[Seat], costs: Sequence[float], *, worth: float = 0.5) -> Rebalancing:
    """The moves that make the weakest stage strongest.

    Args:
        costs: of a token in every stage, in any unit.
        worth: so much of what its movers compute the whole pipeline must gain for a move to be made.
    """
    pools = [_Pool(cost) for cost in costs]
    for seat in seats:
        pool = pools[seat.stage]
        pool.capacity += seat.speed / pool.cost
        match seat.doing:
            case Doing.LOADS:
                pool.loading.append(seat)
            case Doing.SERVES:
                pool.serving.append(seat)
            case Doing.STAYS:
                pool.stay += 1
    for pool in pools:
        pool.sort()
    before = best = min(pool.capacity for pool in pools)
    moves: list[Move] = []
    moved = moved_usefully = 0.0
    useful = 0
    while (found := _next_move(pools)) is not None:
        seat, move = found
        moves.append(move)
        moved += seat.speed
        if (weakest := min(pool.capacity for pool in pools)) > best * (1 + NEGLIGIBLE):
            best, useful, moved_usefully = weakest, len(moves), moved
    if not useful:
        return Rebalancing((), "no move makes the weakest stage stronger")
    gain = f"{best / before - 1:.1%}" if before > 0 else "all"
    # A token costs the pipeline the sum of its costs: that much of its peers' speeds is used better.
    if before > 0 and (best - before) * sum(costs) < worth * moved_usefully:
        return Rebalancing((), f"{useful} moves would gain {gain} only")
    return Rebalancing(tuple(moves[:useful]), f"the weakest stage gains {gain} with {useful} moves")


def _next_move(pools: Sequence[_Pool]) -> tuple[Seat, Move] | None:
    """The best for the weakest stage, carried out in `pools`; and who moves."""
    target = min(range(len(pools)), key=lambda stage: (pools[stage].capacity, stage))
    weakest = pools[target]
    found: tuple[float, bool, int, Seat] | None = None
    for stage, pool in enumerate(pools):
        if stage == target or pool.capacity <= weakest.capacity:
            continue
        for value, loading, seat in pool.offers(weakest):
            if found is None or _is_better((value, loading), found):
                found = value, loading, stage, seat
    if found is None or found[0] <= weakest.capacity * (1 + NEGLIGIBLE):
        return None
    _, _, source, seat = found
    pools[source].give(seat)
    weakest.capacity += seat.speed / weakest.cost
    return seat, Move(seat.peer, source, target)


def _is_better(offer: tuple[float, bool], than: tuple[float, bool, int, Seat]) -> bool:
    (value, loading), (other, other_loading, _, _) = offer, than
    if abs(value - other) <= NEGLIGIBLE * abs(other):
        return loading and not other_loading
    return value > other


def papers_moves(seats: Iterable[Seat], costs: Sequence[float]) -> Rebalancing:
    """At most one: the least loaded peer of the strongest stage goes to the weakest one."""
    seats = list(seats)
    total = capacities(seats, costs)
    order = sorted(range(len(costs)), key=lambda stage: (total[stage], stage))
    weakest, strongest = order[0], order[-1]
    here = [seat for seat in seats if seat.stage == strongest]
    serving = [seat for seat in here if seat.doing is Doing.SERVES]
    staying = sum(seat.doing is Doing.STAYS for seat in here)
    if not serving or len(serving) + staying < 2 or total[weakest] == total[strongest]:
        return Rebalancing((), "all stages are equally strong, or nobody can go")
    mover = min(serving, key=lambda seat: (seat.load, seat.speed, seat.peer))
    left = total[strongest] - mover.speed / costs[strongest]
    if min(left, total[weakest] + mover.speed / costs[weakest]) <= total[weakest]:
        return Rebalancing((), "the weakest stage would not be stronger")
    return Rebalancing((Move(mover.peer, strongest, weakest),), "once a period, the least loaded peer")
