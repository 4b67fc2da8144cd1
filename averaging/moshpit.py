"""Moshpit all-reduce: the rounds of a plan, one group after the other.

    meet the groups of all rounds at once: the lines of the plan's grid that this peer sits on
    for every dimension of the grid, and every pass that goes through all of them:
        all-reduce the vector within the line, weighted; of those who hold the same value one speaks
        say what is missing; if anything is, wait until a repair has brought it
        go on with the group's mean and the group's weight

After the last round everybody holds the exact weighted mean (`averaging.grid`), or, if members were lost on
the way, the mean of what they had sent. With one dimension and one pass one round does; a group of one needs
none. Repairs run beside the rounds: also of groups that this peer has left behind, or only stands in for
others.

I/O through `ButterflyAllReduce`. Source: Moshpit SGD, arXiv:2103.03239, algorithm 1; repairs are ours.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

import torch

from averaging.allreduce import ButterflyAllReduce, OpenRound
from averaging.errors import RoundAbandonedError
from averaging.network import PeerId
from averaging.plan import Plan
from averaging.reduction import Means
from averaging.round import Done, Round, first_round
from averaging.shares import Mode


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one member brings to the mean."""

    vector: torch.Tensor  # [values] float32 of the first pass
    weight: float
    ids: Collection[bytes] = ()  # 16 bytes each; no id may be in one mean twice
    # What it brings to the next pass, from the mean of the one before; None if there is one pass.
    then: Callable[[torch.Tensor], Awaitable[torch.Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class Averaged:
    vector: torch.Tensor  # [values] float32 of the last pass, bit-identical on all members
    weight: float  # of all that is in it
    sent_bytes: int


@dataclass(slots=True)
class _Line:
    """This peer's group in one round."""

    number: int
    means: Means
    opened: list[OpenRound]  # every attempt; none for a group of one
    brought: "asyncio.Future[tuple[torch.Tensor, float]]"  # what this peer has to average in it
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class Rounds:
    """This peer's part in one plan."""

    def __init__(
        self,
        plan: Plan,
        me: PeerId,
        *,
        all_reduce: ButterflyAllReduce,
        say: Callable[[Done], Awaitable[None]],
    ) -> None:
        """Meet the others; `say` tells the coordinator how a round went.

        Raises RoundAbandonedError for a plan that was carried out before.
        """
        self._all_reduce, self._say = all_reduce, say
        self._cells, self._dimensions = len(plan.grid.cells), plan.grid.dimensions
        self._receives = plan.by_peer[me].mode is not Mode.AUXILIARY
        self._repairs: set[asyncio.Task[None]] = set()
        self._lines: list[_Line] = []  # by round
        for number in range(plan.rounds):
            round_ = first_round(plan, me, number, rules=all_reduce.rules)
            means = _room_for(round_.values)
            opened = [all_reduce.meet(round_, means)] if len(round_.members) > 1 else []
            brought = asyncio.get_running_loop().create_future()
            self._lines.append(_Line(round_.line, means, opened, brought))

    async def average(self, mine: Contribution) -> Averaged:
        """Average what this member brings with the others of the plan.

        Returns with the whole mean; if that never comes, whoever carries out the plan cancels this.
        """
        vector, weight = mine.vector, mine.weight
        for number, line in enumerate(self._lines):
            if number and number % self._dimensions == 0 and mine.then is not None:
                vector, weight = await mine.then(vector), mine.weight
            line.brought.set_result((vector, weight))
            if line.opened:
                await self._attempt(line, line.opened[0])
                await line.complete.wait()
                vector, weight = line.means.vector, line.means.weight
            else:
                await self._say(Done(line.number, 0))
        attempts = [attempt for line in self._lines for attempt in line.opened]
        return Averaged(vector, weight, sum(attempt.sent_bytes for attempt in attempts))

    def repeat(self, round_: Round) -> None:
        """Take part in another attempt at a round: of a group of its own, or in the place of a peer that was
        lost, whose value was the same. Raises RoundAbandonedError if it was known before."""
        line = self._lines[round_.line // self._cells]
        own = line.number == round_.line
        attempt = self._all_reduce.meet(round_, line.means if own else Means(len(line.means.vector)))
        line.opened.append(attempt)
        task = asyncio.create_task(self._attempt(line, attempt))
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _attempt(self, line: _Line, attempt: OpenRound) -> None:
        vector, weight = await asyncio.shield(line.brought)
        done = await attempt.run(vector, weight)
        await self._say(done)
        if done.line == line.number and not (done.missing and self._receives):
            line.means.settled = self._receives  # an auxiliary may have to pass on what it reduces
            line.complete.set()

    def close(self) -> None:
        """End what is still open."""
        for task in self._repairs:
            task.cancel()
        for line in self._lines:
            for attempt in line.opened:
                attempt.close()


def _room_for(values: int) -> Means:
    """Raises RoundAbandonedError: an auxiliary does not know beforehand how much there is."""
    try:
        return Means(values)
    except (RuntimeError, MemoryError) as error:
        raise RoundAbandonedError(f"no memory for {values} values: {error}") from None
