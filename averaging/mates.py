"""Who averages with a peer, who of them lives, and who of them may act without the others.

    roster       whom records name: they outlive their peers, and some may be missing
    answers      who answers lives; who refuses a dial is dead; from whom nothing comes, may be
    witnesses    who hears nothing of a mate, and is told that nobody does, need not wait for it

One event loop's clock, no I/O but reading the roster again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from averaging.bounded import forget_oldest
from averaging.errors import LinkError
from averaging.network import PeerId
from averaging.plan import StepRules, has_quorum
from averaging.witnesses import NO_WITNESSES, REMEMBERED, Witnesses

CLAIM_S = 1.0  # for which a peer's word is good that a witness hears it
MOST_MET = 4096


class Mates:
    """The others, as one peer sees them."""

    def __init__(
        self,
        *,
        me: PeerId,
        rules: StepRules,
        roster: Callable[[], Collection[PeerId]],
        refresh: Callable[[], Awaitable[None]],
        auxiliaries: Callable[[], Collection[PeerId]] = tuple,
        newcomers: Callable[[], Collection[PeerId]] = tuple,
        witnesses: Witnesses = NO_WITNESSES,
        helps: bool = False,
    ) -> None:
        """`roster` are the others that live, as of the last `refresh`; `auxiliaries` those of them that only
        reduce, as this peer does if it `helps`: they close no steps, and have no say; `newcomers` those,
        perhaps this peer, that not all others may know yet."""
        self._me, self._rules, self.roster, self.refresh = me, rules, roster, refresh
        self._auxiliaries, self._newcomers, self._helps = auxiliaries, newcomers, helps
        self._witnesses = witnesses
        self._dead_s: dict[PeerId, float] = {}  # when their dials were refused
        self._unreachable_s: dict[PeerId, float] = {}  # when they last did not answer
        self._heard_s: dict[PeerId, float] = {}  # who has answered when, and not failed to since
        self._met_s: dict[PeerId, float] = {}  # when those met before they were read of were first heard
        self._unanswered: set[PeerId] = set()  # who failed to answer this peer, and has not been heard since

    def live(self) -> list[PeerId]:
        """The peers that are not known to be dead, this one included.

        Who answers lives, also if the roster does not say so: a peer that was away may read one without the
        others, and would go on alone beside them.
        """
        now_s, expire_s = asyncio.get_running_loop().time(), self._rules.expire_s
        self._dead_s = {p: at for p, at in self._dead_s.items() if at > now_s - REMEMBERED * expire_s}
        self._heard_s = {p: at for p, at in self._heard_s.items() if at > now_s - expire_s}
        known = dict.fromkeys([*self.roster(), *self._heard_s])
        return [*(p for p in known if p not in self._dead_s and p != self._me), self._me]

    def voters(self) -> list[PeerId]:
        """Those of them that have a vector of their own."""
        helping = {*self._auxiliaries(), *([self._me] if self._helps else [])}
        return [peer for peer in self.live() if peer not in helping]

    @property
    def has_a_say(self) -> bool:
        """An auxiliary closes no steps, and what version it is at says nothing."""
        return self._me in self.voters()

    def has_quorum(
        self, present: Collection[PeerId], peers: Collection[PeerId], *, heard: Collection[PeerId] = ()
    ) -> bool:
        """May those who are present act without the rest of `peers`?

        `heard` are those of them who have just said that a witness hears them: nobody takes these for silent.

        Newcomers do not count: with one that only they know, some would be a majority beside that of the
        others, and the stage would split in two. Only if there is nobody else they have to do. Nor do those
        count who have stopped, if all others are present: who does not answer this peer, and is not heard by
        the witnesses, takes no step alone.
        """
        certain = {*heard, *([self._me] if self._witnesses.hear_this() else [])}.intersection(present)
        electors = self._electors(peers)
        if has_quorum(present, electors, heard=not certain.isdisjoint(electors)):
            return True
        going = self._electors(set(peers) - self._unanswered.intersection(self._witnesses.silent()))
        return not certain.isdisjoint(going) and going.issubset(present)

    def was_away_since(self, at_s: float) -> bool:
        """Has there been a time since then when no witness heard this peer? Others may have closed a step
        without it. True of one that witnesses have just found."""
        return self._witnesses.heard_for_s() < asyncio.get_running_loop().time() - at_s

    def is_heard(self) -> bool:
        """May this peer say that a witness hears it? It is believed for `CLAIM_S`."""
        return self._witnesses.hear_this(CLAIM_S)

    def _electors(self, peers: Collection[PeerId]) -> set[PeerId]:
        new = {*self._newcomers(), *self._met_lately()}
        return set(peers).difference(new) or set(peers)

    def _met_lately(self) -> list[PeerId]:
        """Who answered or reported before it was on the roster: others may not know it yet, either."""
        recent_s = asyncio.get_running_loop().time() - self._rules.expire_s
        roster = self.roster()
        for peer in roster:
            self._met_s.setdefault(peer, float("-inf"))
        return [
            peer
            for peer in self._heard_s
            if self._met_s.get(peer, recent_s) > recent_s and peer not in roster
        ]

    def is_silent_elsewhere(self, peer: PeerId) -> bool:
        """Do the witnesses not hear it, either?"""
        return peer in self._witnesses.silent()

    def has_stopped(self, peer: PeerId, unheard_s: float) -> bool:
        """Nothing has come from it for so long: it counts as lost, sooner if no witness hears it either."""
        return unheard_s >= self._rules.silence_s / (2 if self.is_silent_elsewhere(peer) else 1)

    def furthest(self) -> int:
        """The version of the mate that is furthest, as far as the witnesses know."""
        return self._witnesses.version()

    def silent(self) -> Collection[PeerId]:
        """Peers that have not answered lately, here or elsewhere."""
        recent_s = asyncio.get_running_loop().time() - self._rules.progress_s
        self._unanswered.intersection_update(self.roster())
        self._unreachable_s = {p: at for p, at in self._unreachable_s.items() if at > recent_s}
        return self._unreachable_s.keys() | frozenset(self._witnesses.silent())

    def suspect(self, error: LinkError) -> None:
        """A dial failed: its peer is dead, or cannot be reached from here for now."""
        if error.peer != self._me:
            self._heard_s.pop(error.peer, None)
            if not error.refused:
                self._unanswered.add(error.peer)
            suspected = self._dead_s if error.refused else self._unreachable_s
            suspected[error.peer] = asyncio.get_running_loop().time()

    def answers(self, peer: PeerId) -> None:
        """It lives, perhaps because it has been started again."""
        self._dead_s.pop(peer, None)

    def hear(self, peer: PeerId) -> None:
        """It reports, or answers as one that has a say."""
        self.answers(peer)
        if peer not in self._auxiliaries():
            self._heard_s[peer] = asyncio.get_running_loop().time()
            self._unanswered.discard(peer)
            if peer not in self._met_s:
                self._met_s[peer] = float("-inf") if peer in self.roster() else self._heard_s[peer]
                forget_oldest(self._met_s, MOST_MET)
