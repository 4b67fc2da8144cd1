"""What the members of a plan hold, and what is to be done when somebody was lost in a round.

    every member says after every attempt at a round which pieces it does not hold
    when all living members of a group have, and a piece is missing somewhere, the group tries again:
        a piece that anybody holds who can be dialled is passed on: the bytes are the same
        a piece that nobody holds is reduced again, by members that nobody has complained of
        whoever was lost before that, or holds such a piece but cannot be dialled, is outdated: if it has a
        mean, it is not that of the others
        beyond the first dimension a lost speaker is replaced: its last groupmates hold the same value
    a strict plan is never repaired: it fails

The mean of the first dimension is over what arrived. Who was lost counts as in it if anything of it is.

Pure. Source: in Moshpit SGD, arXiv:2103.03239, groups go on with who is left; repairing is ours.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from averaging.grid import Group
from averaging.network import PeerId
from averaging.plan import Plan, StepRules
from averaging.round import Done, Round, Work, first_round
from averaging.shares import Mode, Slice

MAX_ATTEMPTS = 5


@dataclass(slots=True)
class _Line:
    """One group in one round."""

    number: int  # of the round
    group: Group  # who sits there; others only stand in for somebody
    round: Round | None = None  # the present attempt, if it is not the first
    done: dict[PeerId, Done] = field(default_factory=dict)
    said: list[tuple[PeerId, Done, Round | None]] = field(default_factory=list)  # of all attempts

    @property
    def members(self) -> tuple[PeerId, ...]:
        return self.group.members if self.round is None else self.round.members

    @property
    def attempt(self) -> int:
        return 0 if self.round is None else self.round.attempt


class Holdings:
    """Follows one plan to its end: `take` and `lose` say what happened, and return the rounds to repeat."""

    def __init__(self, plan: Plan, rules: StepRules) -> None:
        self._plan, self._grid, self._rules = plan, plan.grid, rules
        self._modes = {member.peer: member.mode for member in plan.members}
        self._alive = dict.fromkeys(self._modes)  # in the plan's order
        self._lines: dict[int, _Line] = {}
        self._of: dict[PeerId, list[_Line]] = {peer: [] for peer in self._modes}  # own lines, by round
        for number in range(plan.rounds):
            for group in self._grid.groups(number % self._grid.dimensions):
                line = self._lines[plan.line_of(number, group)] = _Line(number, group)
                for peer in group.members:
                    self._of[peer].append(line)
        self.outdated: set[PeerId] = set()  # members whose mean, if they have one, is not everybody's
        self.failed = ""  # why the plan cannot be carried out

    @property
    def alive(self) -> list[PeerId]:
        """The members that are not lost."""
        return list(self._alive)

    @property
    def members(self) -> Collection[PeerId]:
        return self._modes.keys()

    @property
    def complete(self) -> bool:
        """Do all living members hold the whole mean?"""
        return not self.failed and all(self._has_ended(peer) for peer in self._alive)

    def _has_ended(self, peer: PeerId) -> bool:
        done = self._of[peer][-1].done.get(peer)
        return done is not None and not self._lacks(peer, done)

    def _lacks(self, peer: PeerId, done: Done) -> bool:
        return bool(done.missing) and self._modes[peer] is not Mode.AUXILIARY

    def left_out(self) -> set[PeerId]:
        """Lost members of whose vector nothing is in the mean, as far as the living can tell."""
        lost = self._modes.keys() - self._alive.keys()
        last_pass = -self._grid.dimensions  # its first line is what counts
        return {peer for peer in lost if not self._may_be_inside(peer, self._of[peer][last_pass])}

    def _may_be_inside(self, peer: PeerId, line: _Line) -> bool:
        """May something of a lost member be in the means of its first line?"""
        if not any(member in self._alive for member, _, _ in line.said):
            return True
        first = self._first_round(line)
        for member, done, round_ in line.said:
            attempt = round_ or first
            if member in self._alive and peer in attempt.members and peer not in done.unused:
                return True
            for reducer, work in attempt.work.items():
                held = self._held(member, done, reducer, len(work.pieces))
                if held and reducer not in self._alive:  # nobody can say any more what is in that
                    return True
        return False

    def _first_round(self, line: _Line) -> Round:
        return first_round(self._plan, line.group.members[0], line.number, rules=self._rules)

    def take(self, peer: PeerId, done: Done) -> list[Round]:
        """A member has come to the end of an attempt."""
        line = self._lines.get(done.line)
        if line is None or peer not in self._alive or peer not in line.members:
            return []
        if done.attempt != line.attempt:
            return []
        line.done[peer] = done
        if line.group.dimension == 0:
            line.said.append((peer, done, line.round))
        return self._repeat([line])

    def lose(self, peer: PeerId) -> list[Round]:
        """A member is gone, or has not been heard of for too long."""
        if peer not in self._alive:
            return []
        del self._alive[peer]
        if self._plan.strict:
            self.failed = f"lost {peer[-8:]}"
        elif not any(peer in self._alive for peer in self._plan.bringers):
            self.failed = "nobody is left who wants the mean"
        return self._repeat(line for line in self._lines.values() if peer in line.members)

    def _repeat(self, lines: Iterable[_Line]) -> list[Round]:
        rounds = [self._again(line) for line in lines if self._is_stuck(line)]
        return [round_ for round_ in rounds if round_ is not None and not self.failed]

    def _living(self, line: _Line) -> list[PeerId]:
        return [peer for peer in line.members if peer in self._alive]

    def _is_stuck(self, line: _Line) -> bool:
        """Has everybody come to the end, and somebody without the whole mean?"""
        living = self._living(line)
        if any(peer not in line.done for peer in living):
            return False
        return any(self._lacks(peer, line.done[peer]) for peer in living)

    def _again(self, line: _Line) -> Round | None:
        """The next attempt; None if there cannot be one."""
        if self._plan.strict or line.attempt == MAX_ATTEMPTS:
            self.failed = f"a round lost somebody, after {line.attempt} repairs"
            return None
        group, living = line.group, self._living(line)
        before = line.round or self._first_round(line)
        reducers, speakers = self._sound(line, living), self._speakers(before, group.dimension)
        if speakers is None or not reducers:
            self.failed = "nobody is left to speak for a group, or to reduce"
            return None
        self.outdated |= self._modes.keys() - self._alive.keys()
        work = self._deal(line, before, reducers)
        plan, number, attempt = before.name
        # In the old order, deputies in the seats of the lost: elsewhere the same values are summed in it.
        seated = [speakers.get(p, p) for p in before.members if p in speakers or p in living]
        line.round = replace(
            before,
            name=(plan, number, attempt + 1),
            members=tuple(dict.fromkeys(seated)),
            speakers=frozenset(speakers.values()),
            work=work,
            feed_back=False,
        )
        line.done = {}
        return line.round

    def _sound(self, line: _Line, living: list[PeerId]) -> list[PeerId]:
        """Those who can reduce; if possible, those between whom and the living nothing was lost."""
        able = self._able(line, living)
        complaints = [(p, q) for p in living for q in line.done[p].lost if q in self._alive]
        troubled = {peer for pair in complaints for peer in pair}
        return [peer for peer in able if peer not in troubled] or able

    def _able(self, line: _Line, living: list[PeerId]) -> list[PeerId]:
        """Those who can be dialled."""
        return [p for p in living if p in line.group.members and self._modes[p] is not Mode.CLIENT]

    def _speakers(self, before: Round, dimension: int) -> dict[PeerId, PeerId] | None:
        """Who speaks for every speaker so far: itself, or a deputy if it was lost. None if one has none.

        In the first dimension nobody can: what a lost member has not sent is lost.
        """
        speakers: dict[PeerId, PeerId] = {}
        for peer in before.members:
            if peer not in before.speakers:
                continue
            if peer in self._alive:
                speakers[peer] = peer
            elif dimension:
                same = self._grid.group_of(peer, dimension - 1).members  # they hold the same value
                able = [p for p in same if p in self._alive and self._modes[p] is not Mode.AUXILIARY]
                inside = [p for p in able if p in before.members]
                if not able:
                    return None
                speakers[peer] = (inside or able)[0]
        return speakers

    def _deal(self, line: _Line, before: Round, reducers: list[PeerId]) -> Mapping[PeerId, Work]:
        """Pieces that somebody holds to whoever passes them on, all other missing ones over the reducers."""
        living = self._living(line)
        wanting, able = [p for p in living if p in before.receivers], self._able(line, living)
        passed: dict[PeerId, list[Slice]] = {}
        lost: list[Slice] = []
        for reducer in sorted({r for peer in wanting for r in line.done[peer].missing if r in before.work}):
            pieces = before.work[reducer].pieces
            held = {p: self._held(p, line.done[p], reducer, len(pieces)) for p in {*wanting, *able}}
            start = min(held[p] for p in wanting)
            for holder in (max(among, key=lambda peer: held[peer]) for among in (reducers, able)):
                passed.setdefault(holder, []).extend(pieces[start : held[holder]])
                start = max(start, held[holder])
            lost += pieces[start:]
            self.outdated.update(p for p in wanting if held[p] > start)
        reduced: dict[PeerId, list[Slice]] = {}
        for number, piece in enumerate(lost):
            reduced.setdefault(reducers[(number + before.attempt) % len(reducers)], []).append(piece)
        every = {peer: Work(tuple(reduced.get(peer, ())), tuple(passed.get(peer, ()))) for peer in able}
        return {peer: work for peer, work in every.items() if work.pieces}

    def _held(self, peer: PeerId, done: Done, reducer: PeerId, every: int) -> int:
        """How many of the `every` pieces of a reducer are with a peer that has said `done`."""
        if self._modes[peer] is Mode.AUXILIARY and peer != reducer:
            return 0
        return min(every, done.missing.get(reducer, every))
