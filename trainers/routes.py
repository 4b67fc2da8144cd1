"""Where microbatches go: a peer for every hop, and a neighbour that sends it what it needs.

    place       a peer for each hop that has none, or for none of them; a new attempt
    supplier    a peer that computes a done hop again, only because a neighbour needs its tensors
    deliver     the trainer pushes token ids to the first stage; elsewhere a neighbour resends its tensor

Pure; changes the flights it is given. Part of the ledger, which decides when.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from averaging.network import PeerId
from swarm.messages import Route
from swarm.wiring import StageWiring
from trainers.events import Cancel, Command, PushTokens, Resend
from trainers.evidence import Evidence
from trainers.flight import Flight, Hop, Phase

RETRY_S = 0.1


class Router:
    """The routes of one trainer's microbatches."""

    def __init__(
        self,
        *,
        trainer: PeerId,
        session: bytes,
        wirings: Sequence[StageWiring],
        evidence: Sequence[Evidence],
        live: Mapping[PeerId, int],
        hop_deadline_s: float,
        counters: Counter[str],
    ) -> None:
        self._trainer, self._session = trainer, session
        self._wirings, self._evidence, self._live = wirings, evidence, live
        self._hop_deadline_s, self._counters = hop_deadline_s, counters

    def place(self, flight: Flight, now_s: float, suppliers: AbstractSet[int] = frozenset()) -> list[Command]:
        """Assign every unplaced hop, or none: a route needs a peer at each stage.

        `suppliers` are stages that are done but whose tensors a neighbour needs again.
        """
        placing = self._with_suppliers(flight, flight.unplaced | suppliers)
        if now_s < flight.not_before_s or any(not len(self._wirings[stage]) for stage in placing):
            return []
        first = not flight.routed
        for stage in sorted(placing):
            source = self._trainer if stage == 0 else flight.hops[stage - 1].peer or ""
            hop = flight.hops[stage]
            peer = self._wirings[stage].choose(
                flight.token_count, now_s=now_s, source=source, avoid=flight.avoid
            )
            supplied = stage > 0 and flight.hops[stage - 1].phase >= Phase.FORWARDED
            hop.peer, hop.chosen_s, hop.has_input, hop.cancelling = peer, now_s, False, False
            hop.supplies = hop.phase >= Phase.ACCUMULATED
            hop.due_s = now_s if supplied else None
            flight.touched.add(peer)
        flight.unplaced, flight.routed = set(), True
        flight.retries = [retry for retry in flight.retries if retry[1] not in placing]
        flight.attempt += not first
        for stage in placing:
            flight.hops[stage].placed = flight.attempt
        return self._supply(flight, sorted(placing), first)

    def reroute(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        """Give the hop at `stage` to another peer and ask the neighbours for what they retained.

        If its gradient is safe with somebody else, the new peer only supplies the neighbours.
        """
        hop = flight.hops[stage]
        held = self._serves(hop.accumulated_by, stage) or self._evidence[stage].is_held(flight.id)
        # Who takes a hop's place before the verdict must not accumulate it: it may be in a step.
        # Settled is settled: peers name the microbatches of their last steps only.
        if hop.awaits_verdict or hop.phase is Phase.SETTLED or (hop.phase is Phase.ACCUMULATED and held):
            return self.place(flight, now_s, suppliers={stage})
        flight.hops[stage] = Hop()
        self._counters["rerouted_hops"] += flight.routed and not flight.evaluate
        flight.unplaced.add(stage)
        return self.place(flight, now_s)

    def refused(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        """The peer of `stage` does not know us or has withdrawn this attempt: make a new one."""
        peer = flight.hops[stage].peer
        assert peer is not None
        self.avoid(flight, peer, now_s)
        return self.reroute(flight, stage, now_s)

    def busy(self, flight: Flight, stage: int, backward: bool, now_s: float) -> list[Command]:
        """The peer of `stage` has no room: take another one, or try again a little later.

        Another one when it has promised not to take it: it may have been asked twice, and have room by now.
        """
        hop = flight.hops[stage]
        assert hop.peer is not None
        if hop.cancelling:
            return []
        self._counters["busy"] += 1
        if len(self._wirings[stage]) > 1 and hop.peer not in flight.avoid:
            flight.avoid.add(hop.peer)
            hop.cancelling = True
            return [Cancel(hop.peer, ((flight.id, flight.attempt),))]
        self._counters["no_room"] += 1
        flight.avoid.clear()
        flight.retries.append((now_s + RETRY_S, stage, backward))
        return []

    def deliver_again(self, flight: Flight, now_s: float) -> list[Command]:
        """Deliver again, along the present route, what found no room."""
        if not flight.retries or flight.unplaced:
            return []
        due = [(stage, backward) for at, stage, backward in flight.retries if at <= now_s]
        if not due:
            return []
        flight.retries = [retry for retry in flight.retries if retry[0] > now_s]
        return [self.deliver(flight, stage, backward) for stage, backward in due]

    def replace_suppliers(self, flight: Flight, now_s: float) -> list[Command]:
        """Have others supply what a neighbour has been waiting for longer than the deadline."""
        overdue = {
            stage
            for stage, hop in enumerate(flight.hops)
            if hop.only_supplies and now_s - hop.chosen_s > self._hop_deadline_s and flight.is_awaited(stage)
        }
        flight.avoid |= {flight.peer(stage) for stage in overdue}
        return self.place(flight, now_s, suppliers=overdue) if overdue else []

    @staticmethod
    def avoid(flight: Flight, peer: PeerId, now_s: float) -> None:
        """Take somebody else next time; if nobody else was there this time, not before a pause."""
        if peer in flight.avoid:
            flight.not_before_s = now_s + RETRY_S
        flight.avoid.add(peer)

    def deliver(self, flight: Flight, stage: int, backward: bool) -> Command:
        """Have the neighbour of `stage` send it what it needs."""
        if stage == 0 and not backward:
            return self.push_tokens(flight)
        return Resend(flight.peer(stage + 1 if backward else stage - 1), self.route(flight), backward)

    def push_tokens(self, flight: Flight) -> PushTokens:
        return PushTokens(self.route(flight), flight.tokens, flight.sequences)

    def _with_suppliers(self, flight: Flight, placing: AbstractSet[int]) -> set[int]:
        """Add the stages that are done but whose peer is gone, next to a hop that needs their tensors.

        Another peer computes them again, to supply its neighbours only: the route says that nothing is to
        be accumulated there.
        """
        extended, todo = set(placing), list(placing) if flight.routed else []
        while todo:
            stage = todo.pop()
            for near in (stage - 1, stage + 1):
                known = not 0 <= near < len(flight.hops) or near in extended
                if not known and not self._serves(flight.hops[near].peer, near):
                    extended.add(near)
                    todo.append(near)
        return extended

    def _serves(self, peer: PeerId | None, stage: int) -> bool:
        """Is it alive, and has not moved?"""
        return peer is not None and self._live.get(peer) == stage

    def _supply(self, flight: Flight, placed: Sequence[int], first: bool) -> list[Command]:
        """Have the living neighbours of every run of new hops send what they retained."""
        commands, last = list[Command](), len(flight.hops) - 1
        for stage in placed:
            if stage == 0 or stage - 1 not in placed:
                commands.append(self.deliver(flight, stage, backward=False))
            if not first and not flight.evaluate and stage < last and stage + 1 not in placed:
                commands.append(self.deliver(flight, stage, backward=True))
        return commands

    def route(self, flight: Flight) -> Route:
        return flight.route(self._trainer, self._session)
