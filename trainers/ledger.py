"""The life of a microbatch in the swarm: events in, commands out.

A microbatch has one hop per stage. Each hop is assigned to a peer, gets its input, is forwarded,
accumulated, and in the end settled: the step that holds its gradient has been applied by the stage.

    issue                choose a peer per stage, push the token ids to the first
    push failed          busy or stale: another peer; no answer: cancel there first, then another peer
    hop too slow         cancel there; what it has already accumulated stands
    peer gone            its hops go to others: the living neighbours send what they retained
    step applied         settles the hops that are in it; a dead peer's gradient that is not in it is
                         computed again (retained until the step) or counted as lost

Invariant: a hop is given to another peer only when the previous one certainly will not accumulate it:
it said so, or it is gone (dead, or silent for longer than its lease).

Routes carry an attempt number; neighbours adopt the newest one they hear of. Messages of earlier
attempts are recognised by their peers, so late events of replaced peers change nothing.

Pure: no network, no clock, no randomness but the wirings'. Design sections 4 to 6.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from averaging.network import PeerId
from swarm import swarm_pb2 as pb
from swarm.wiring import StageWiring
from trainers.events import (
    Abandoned,
    Answered,
    Cancel,
    CancelAnswered,
    Command,
    Completed,
    HopEvent,
    LedgerEvent,
    PeerGone,
    PeerReady,
    Recovered,
    Release,
    Resend,
    SteppedEvent,
    Tick,
    WatchBroke,
)
from trainers.evidence import Evidence
from trainers.flight import Flight, Hop, Phase
from trainers.routes import Router

MAX_REJECTIONS = 6  # of one microbatch: then its data is at fault, not a peer
LOOKS_PER_DEADLINE = 16  # for hops that are late
MOST_ASKED = 128  # microbatches in one cancel


class Ledger:
    """All microbatches of one trainer."""

    def __init__(
        self,
        *,
        trainer: PeerId,
        session: bytes,
        wirings: Sequence[StageWiring],
        hop_deadline_s: float,
        retain_until_step: bool,
        verdict_s: float = 10.0,
        strict: bool = False,
    ) -> None:
        """`verdict_s`: how long a step may take to close around a member that has fallen silent."""
        self._verdict_s = verdict_s
        self._wirings = wirings
        self._hop_deadline_s, self._retain, self._strict = hop_deadline_s, retain_until_step, strict
        self._flights: dict[bytes, Flight] = {}
        self._incomplete = 0  # of them
        self.stuck = 0  # of those in turn: they wait for a peer that is silent, as of the last tick
        self._looked_s = float("-inf")  # for hops that are late
        self._awaiting: dict[bytes, None] = {}  # in order: those that may have a hop that awaits a verdict
        self._stage_of: dict[PeerId, int] = {}
        self._freed_s: dict[PeerId, float] = {}  # when each was last done with a hop of ours
        self._evidence = [Evidence() for _ in wirings]
        self._recovering: dict[PeerId, tuple[float, set[tuple[bytes, int]], int]] = {}
        self.counters: Counter[str] = Counter()
        self._router = Router(
            trainer=trainer,
            session=session,
            wirings=wirings,
            evidence=self._evidence,
            live=self._stage_of,
            hop_deadline_s=hop_deadline_s,
            counters=self.counters,
        )

    # what the trainer asks

    @property
    def in_flight(self) -> int:
        """Microbatches that are not completed."""
        return self._incomplete

    @property
    def unsettled(self) -> int:
        """Microbatches whose gradients are not all in applied steps."""
        return len(self._flights)

    def is_settled(self, microbatch: bytes) -> bool:
        """Whether nothing of an issued microbatch is left to do."""
        return microbatch not in self._flights

    @property
    def peers(self) -> AbstractSet[PeerId]:
        """The live peers that hops may be given to."""
        return self._stage_of.keys()

    def pool(self, stage: int) -> int:
        """How many peers of `stage` hops may be given to."""
        return len(self._wirings[stage])

    def floor(self, stage: int) -> int:
        """The version that every live peer of `stage` has reached (0 without peers)."""
        return self._evidence[stage].floor

    @property
    def version(self) -> int:
        """The version that every stage has reached."""
        return min(self.floor(stage) for stage in range(len(self._wirings)))

    def issue(
        self, microbatch: bytes, tokens: bytes, *, sequences: int, evaluate: bool, step: int, now_s: float
    ) -> list[Command]:
        """Send a new microbatch on its way, now or as soon as every stage has a peer."""
        flight = Flight(
            id=microbatch,
            tokens=tokens,
            sequences=sequences,
            token_count=len(tokens) // 4 - sequences,
            evaluate=evaluate,
            step=step,
            hops=[Hop() for _ in self._wirings],
            unplaced=set(range(len(self._wirings))),
        )
        self._flights[microbatch] = flight
        self._incomplete += 1
        if not evaluate:
            self.counters["issued"] += 1
        return self._router.place(flight, now_s)

    def handle(self, event: LedgerEvent, now_s: float) -> list[Command]:
        """Take one event; returns what to do about it, in order."""
        match event:
            case PeerReady():
                return self._ready(event, now_s)
            case PeerGone():
                return self._gone(event, now_s)
            case WatchBroke(peer):
                return self._ask(peer) if peer in self._stage_of else []
            case HopEvent():
                return self._hop_event(event, now_s)
            case Answered():
                return self._answered(event, now_s)
            case CancelAnswered():
                return self._cancel_answered(event, now_s)
            case SteppedEvent():
                return self._stepped(event, now_s)
            case Tick():
                return self._tick(now_s)

    # peers

    def _ready(self, event: PeerReady, now_s: float) -> list[Command]:
        self._stage_of[event.peer] = event.stage
        self._evidence[event.stage].ready(event.peer, event.version)
        self._wirings[event.stage].add(event.peer)
        commands = self._brought_back(event.peer, event.stage, now_s)
        for flight in [flight for flight in self._flights.values() if flight.unplaced]:
            commands += self._router.place(flight, now_s)
        return commands

    def _brought_back(self, peer: PeerId, stage: int, now_s: float) -> list[Command]:
        """A peer has come, perhaps with what was thought gone with others: that is not computed again."""
        evidence, commands = self._evidence[stage], list[Command]()
        for flight in list(self._flights.values()):
            hop = flight.hops[stage]
            if hop.phase >= Phase.ACCUMULATED or not evidence.is_held(flight.id):
                continue
            commands += self._inside(flight, stage, peer, evidence.step_of(flight.id), now_s)
            if hop.peer not in self._stage_of and flight.id in self._flights:
                hop.peer = peer  # a route has a peer at every stage
                flight.touched.add(peer)
                if flight.is_awaited(stage):
                    commands += self._router.place(flight, now_s, suppliers={stage})
        return commands

    def _gone(self, event: PeerGone, now_s: float) -> list[Command]:
        stage = self._stage_of.pop(event.peer, None)
        if stage is None:
            return []
        self._freed_s.pop(event.peer, None)
        self._evidence[stage].gone(event.peer)
        for flight in self._flights.values():
            if flight.hops[stage].accumulated_by == event.peer:
                flight.hops[stage].accumulated_by = None
        if event.left:
            self._wirings[stage].remove(event.peer)
        else:
            self._wirings[stage].ban(event.peer, now_s)
        commands: list[Command] = []
        moved: set[tuple[bytes, int]] = set()
        for flight, s, hop in list(self._hops(event.peer)):
            done = hop.phase is Phase.SETTLED or self._evidence[s].is_held(flight.id)
            if done or (hop.phase is Phase.ACCUMULATED and not self._strict):
                if s > 0 and flight.hops[s - 1].phase < Phase.ACCUMULATED:
                    commands += self._router.place(flight, now_s, suppliers={s})  # is its gradient out?
                continue
            if hop.awaits_verdict:
                continue  # it only supplied its neighbours; the verdict says what is to be done here
            if event.silent and not self._strict and not flight.evaluate:
                # It may have accumulated this just before its lease ended, and be in a step that closes now.
                self._await_verdict(flight, hop, now_s + self._verdict_s)
                hop.step, hop.cancelling, hop.due_s = self._evidence[stage].newest, False, None
                continue
            self._reopen(flight)  # strict: what was accumulated there is computed again, too
            moved.add((flight.id, s))
            commands += self._router.reroute(flight, s, now_s)
        if moved and not event.left:
            self._recovering[event.peer] = (now_s, moved, len(moved))
        return commands + self._settle(stage, now_s)

    def _ask(self, peer: PeerId) -> list[Command]:
        """Events of this peer may have been lost: withdraw its hops; what it has accumulated stands."""
        asked = []
        for flight in self._flights.values():
            hop = flight.hops[self._stage_of[peer]]
            if hop.peer == peer and hop.phase < Phase.ACCUMULATED:
                hop.cancelling = True
                asked.append((flight.id, flight.attempt))
            elif hop.accumulated_by == peer and hop.phase is Phase.ACCUMULATED:
                asked.append((flight.id, flight.attempt))
        return _cancels(peer, asked)

    # what peers say of a hop

    def _hop_event(self, event: HopEvent, now_s: float) -> list[Command]:
        flight = self._flights.get(event.microbatch)
        stage = self._stage_of.get(event.peer)
        if flight is None:  # late: a peer that was stopped got it when all was done elsewhere
            return [] if event.kind == pb.DROPPED else [Release(event.peer, (event.microbatch,))]
        if stage is None:
            return []
        hop = flight.hops[stage]
        if event.kind == pb.DROPPED and hop.accumulated_by == event.peer:
            return self._given_up(flight, stage, now_s)
        if event.kind == pb.HANDED_OVER:
            return self._handed_over(flight, stage, event, now_s)
        if hop.peer != event.peer:
            return []  # late: this peer was replaced
        match event.kind:
            case pb.ARRIVED:
                return self._has_input(flight, stage, now_s)
            case pb.FORWARDED:
                commands = self._has_input(flight, stage, now_s)
                if hop.phase is Phase.ASSIGNED:
                    hop.phase = Phase.FORWARDED
                    self._done(flight, stage, now_s)
                if stage + 1 == len(flight.hops):
                    return commands
                if event.attempt < flight.hops[stage + 1].placed and not flight.unplaced:
                    # Along a route that did not lead there, or did not need to: once more.
                    return [*commands, self._router.deliver(flight, stage + 1, backward=False)]
                return commands + self._has_input(flight, stage + 1, now_s)
            case pb.BACKWARDED:
                if hop.phase < Phase.ACCUMULATED:
                    self._done(flight, stage, now_s)
                    if hop.took_s > 0:  # else it was heard before the stage before it
                        self._wirings[stage].observe(event.peer, flight.token_count, hop.took_s)
                return self._accumulated(flight, stage, event.step, event.loss, now_s)
            case pb.EVALUATED:
                flight.loss = event.loss
                return self._complete(flight)
            case pb.DROPPED:
                return self._dropped(flight, stage, event, now_s)
            case pb.PUSH_FAILED:
                return self._push_failed(flight, stage, event, now_s)
        return []

    def _done(self, flight: Flight, stage: int, now_s: float) -> None:
        """The peer of a hop has done a job of it: how long did that take?

        From when the hop was due, or the peer was done with the job before, as one waits for the other: how
        many of our own hops wait there says nothing of the peer, and varies so much that its share of the
        work would vary with it. By this trainer's own clock: peers' claims may be boasts.
        """
        hop = flight.hops[stage]
        if hop.due_s is not None and hop.peer is not None:
            hop.took_s += now_s - max(hop.due_s, self._freed_s.get(hop.peer, 0.0))
            self._freed_s[hop.peer] = now_s

    def _has_input(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        hop = flight.hops[stage]
        if not hop.has_input:
            hop.has_input, hop.due_s = True, now_s
        return self._recovered(flight.id, stage, now_s)

    def _accumulated(self, flight: Flight, stage: int, step: int, loss: float, now_s: float) -> list[Command]:
        hop = flight.hops[stage]
        if hop.phase >= Phase.ACCUMULATED:
            if hop.accumulated_by == hop.peer:
                hop.step = max(hop.step, step)  # its peer fell behind and counts it in a later step
            return []
        hop.phase, hop.step, hop.cancelling, hop.due_s = Phase.ACCUMULATED, step, False, None
        hop.awaits_verdict = False
        hop.accumulated_by = hop.peer
        commands = self._has_input(flight, stage, now_s)
        if stage == len(flight.hops) - 1:
            flight.loss = loss
        if stage > 0 and flight.hops[stage - 1].phase < Phase.ACCUMULATED:
            flight.hops[stage - 1].due_s = now_s
        if all(h.phase >= Phase.ACCUMULATED for h in flight.hops) and not flight.completed:
            commands += self._complete(flight)
        return commands + self._settle_hop(flight, stage, now_s)

    def _complete(self, flight: Flight) -> list[Command]:
        self._incomplete -= not flight.completed
        flight.completed = True
        commands: list[Command] = []
        if flight.evaluate or not self._retain:
            commands += self._release(flight)
        if flight.evaluate:
            self._forget(flight)
        if not flight.counted:  # once, however often a hop is computed again
            flight.counted = True
            self.counters["completed"] += not flight.evaluate
            commands.append(Completed(flight.id, flight.token_count, flight.loss, flight.evaluate))
        return commands

    def _reopen(self, flight: Flight) -> None:
        """Something of it is to be computed again."""
        self._incomplete += flight.completed
        flight.completed = False

    def _release(self, flight: Flight) -> list[Command]:
        # Who was gone may be back, and have found this in its mail, before it is ready for work.
        return [Release(peer, (flight.id,)) for peer in sorted(flight.touched)]

    def _dropped(self, flight: Flight, stage: int, event: HopEvent, now_s: float) -> list[Command]:
        if event.status == pb.CLOSED:  # strict: the step was closed with this microbatch in it
            return self._in_closed_step(flight, stage, now_s)
        if flight.hops[stage].phase >= Phase.ACCUMULATED:
            return []  # it only supplied its neighbours
        if event.status == pb.STALE:  # it has not heard of this trainer: nothing is wrong with the data
            flight.avoid.add(event.peer)
            return self._router.reroute(flight, stage, now_s)
        return self._again(flight, stage, event.peer, event.reason, now_s)

    def _given_up(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        """The peer that had accumulated this hop has thrown its sum away."""
        hop = flight.hops[stage]
        if hop.phase is Phase.SETTLED:
            return []
        hop.accumulated_by = None  # also if it is in a state: that may be given up, too
        return [] if self._evidence[stage].is_held(flight.id) else self._lost(flight, stage, now_s)

    def _handed_over(self, flight: Flight, stage: int, event: HopEvent, now_s: float) -> list[Command]:
        """The peer that had accumulated this hop leaves; a stage mate has the gradient in its sum now."""
        hop = flight.hops[stage]
        if hop.accumulated_by != event.peer or self._stage_of.get(event.target) != stage:
            return []  # whom nobody here knows has nothing: what the leaver had is computed again
        self.counters["handed_over"] += 1
        if hop.peer == event.peer:
            hop.peer = event.target
            flight.touched.add(event.target)
        hop.accumulated_by, hop.step = event.target, max(hop.step, event.step)
        if stage > 0 and flight.hops[stage - 1].phase < Phase.ACCUMULATED:  # the leaver sends it no more
            return self._router.place(flight, now_s, suppliers={stage})
        return []

    def _lost(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        """A gradient is in no sum and in no step: compute it again if that can be done, else count it."""
        hop = flight.hops[stage]
        if hop.phase < Phase.ACCUMULATED or self._retain or not flight.completed:
            self._reopen(flight)
            return self._router.reroute(flight, stage, now_s)
        self.counters["lost"] += 1
        hop.phase = Phase.SETTLED
        return self._finish_if_settled(flight)

    def _in_closed_step(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        commands = self._accumulated(flight, stage, flight.step, flight.loss, now_s)
        hop = flight.hops[stage]
        hop.phase, hop.accumulated_by = Phase.SETTLED, None
        if flight.id not in self._flights:
            return commands
        near = flight.hops[max(0, stage - 1) : stage + 2]
        if any(h.phase < Phase.ACCUMULATED for h in near):  # its neighbours need what it would have sent
            return commands + self._router.place(flight, now_s, suppliers={stage})
        return commands + self._finish_if_settled(flight)

    def _again(self, flight: Flight, stage: int, culprit: PeerId, reason: str, now_s: float) -> list[Command]:
        """Compute one hop again elsewhere, unless this microbatch has failed too often."""
        flight.rejections += 1
        flight.avoid.add(culprit)
        if flight.rejections > MAX_REJECTIONS:
            self._forget(flight)
            self.counters["lost"] += not flight.evaluate
            commands = [Cancel(p, ((flight.id, flight.attempt),)) for p in sorted(flight.touched)]
            return [*commands, Abandoned(flight.id, flight.evaluate, reason)]
        return self._router.reroute(flight, stage, now_s)

    def _push_failed(self, flight: Flight, stage: int, event: HopEvent, now_s: float) -> list[Command]:
        next_stage = stage - 1 if event.backward else stage + 1
        if not 0 <= next_stage < len(flight.hops):
            return []  # a peer that makes no sense
        target = flight.hops[next_stage]
        if event.status == pb.CLOSED and target.peer == event.target:
            return self._in_closed_step(flight, next_stage, now_s)
        if flight.unplaced:
            return []  # a new route is about to be made
        if target.phase >= Phase.ACCUMULATED and target.accumulated_by == target.peer:
            return []  # it got there another way
        if target.peer != event.target or event.attempt != flight.attempt:  # it speaks of an older route
            return [Resend(event.peer, self._router.route(flight), event.backward)]
        if event.status == pb.BUSY:
            return self._router.busy(flight, next_stage, event.backward, now_s)
        if event.status == pb.REJECTED:
            if event.backward:  # the sender has accumulated: nothing can be taken back
                flight.rejections = MAX_REJECTIONS
            return self._again(flight, stage, event.peer, event.reason, now_s)
        if event.status == pb.LINK:
            self._wirings[next_stage].ban_link(event.peer, event.target, now_s)
            self._router.avoid(flight, event.target, now_s)
            target.cancelling = True
            return [Cancel(event.target, ((flight.id, flight.attempt),))]
        return self._router.refused(flight, next_stage, now_s)  # STALE: it does not hold it

    def _answered(self, event: Answered, now_s: float) -> list[Command]:
        flight = self._flights.get(event.microbatch)
        stage = self._stage_of.get(event.peer)
        if flight is None and event.push and event.status == pb.ACCEPTED:
            return [Release(event.peer, (event.microbatch,))]  # late: all is done elsewhere
        if flight is None or stage is None or flight.hops[stage].peer != event.peer:
            return []
        hop = flight.hops[stage]
        if not event.push:
            if event.status == pb.UNKNOWN and hop.has_input and hop.phase < Phase.ACCUMULATED:
                hop.cancelling = True  # it may have arrived since it said so
                return [Cancel(event.peer, ((flight.id, flight.attempt),))]
            if event.status == pb.UNKNOWN and hop.phase >= Phase.ACCUMULATED and not flight.completed:
                return self._router.place(flight, now_s, suppliers={stage})  # it no longer has what it sent
            return []
        if event.status in (pb.ACCEPTED, pb.DUPLICATE):
            return self._has_input(flight, 0, now_s)
        if hop.has_input or (hop.phase >= Phase.ACCUMULATED and not hop.only_supplies):
            return []
        if flight.unplaced:
            if 0 not in flight.unplaced:  # else whoever gets it is pushed the tokens anyway
                flight.retries.append((now_s, 0, False))
            return []
        if event.attempt != flight.attempt and event.status != pb.CLOSED:
            return [self._router.push_tokens(flight)]  # refused for an older route: ask again for this one
        if event.status == pb.CLOSED:
            return self._in_closed_step(flight, 0, now_s)
        if event.status == pb.BUSY:
            return self._router.busy(flight, 0, False, now_s)
        if event.status == pb.LINK:
            self._router.avoid(flight, event.peer, now_s)
            hop.cancelling = True
            return [Cancel(event.peer, ((flight.id, flight.attempt),))]
        if event.status == pb.REJECTED:
            return self._again(flight, 0, event.peer, "the first peer refused the token ids", now_s)
        return self._router.refused(flight, 0, now_s)

    def _cancel_answered(self, event: CancelAnswered, now_s: float) -> list[Command]:
        commands: list[Command] = []
        stage = self._stage_of.get(event.peer)
        if stage is None:
            return []
        stands = {microbatch: (step, loss) for microbatch, step, loss in event.accumulated}
        for microbatch, attempt in event.microbatches:
            flight = self._flights.get(microbatch)
            if flight is None:
                continue
            hop = flight.hops[stage]
            if hop.accumulated_by == event.peer:
                if microbatch not in stands and attempt == flight.attempt:
                    commands += self._given_up(flight, stage, now_s)
            elif hop.peer != event.peer or not hop.cancelling:
                continue
            elif microbatch in stands:
                commands += self._accumulated(flight, stage, *stands[microbatch], now_s)
            elif attempt < flight.attempt and hop.phase < Phase.ACCUMULATED:
                # It has promised nothing of the attempt that was made meanwhile, with it in the route.
                commands += _cancels(event.peer, [(microbatch, flight.attempt)])
            elif hop.phase < Phase.ACCUMULATED or hop.only_supplies:
                commands += self._router.reroute(flight, stage, now_s)
        return commands

    # steps

    def _stepped(self, event: SteppedEvent, now_s: float) -> list[Command]:
        stage, evidence = event.stage, self._evidence[event.stage]
        if event.whole:
            evidence.replaced(event.peer, event.version)
        newest = evidence.newest
        evidence.reached(event.peer, event.version)
        commands: list[Command] = []
        ours = sorted(event.microbatches & self._flights.keys())
        evidence.holds(event.peer, event.version - 1, ours)
        for microbatch in ours:
            flight = self._flights[microbatch]
            if flight.hops[stage].phase < Phase.ACCUMULATED or flight.hops[stage].awaits_verdict:
                commands += self._inside(flight, stage, event.peer, event.version - 1, now_s)
        if event.whole:
            return commands + self._settle(stage, now_s)
        known = [microbatch for microbatch in ours if microbatch in self._flights]
        for microbatch in evidence.safe_ones(known):  # of others it says nothing
            if microbatch in self._flights:
                commands += self._settle_hop(self._flights[microbatch], stage, now_s)
        return commands + (self._judge_all(now_s, stage) if evidence.newest > newest else [])

    def _inside(self, flight: Flight, stage: int, holder: PeerId, step: int, now_s: float) -> list[Command]:
        """A step was applied, by `holder`, with this microbatch in it, whoever was thought to work on it."""
        hop = flight.hops[stage]
        hop.awaits_verdict = False
        flight.unplaced.discard(stage)
        if hop.phase >= Phase.ACCUMULATED:
            return []
        commands = self._accumulated(flight, stage, step, flight.loss, now_s)
        hop.accumulated_by = None  # not whom we had asked
        is_served = hop.peer in self._stage_of
        hop.peer = hop.peer or holder  # a route has a peer at every stage
        if stage > 0 and flight.hops[stage - 1].phase < Phase.ACCUMULATED:
            if not is_served:
                commands += self._router.place(flight, now_s, suppliers={stage})
        elif is_served:
            commands.append(Cancel(flight.peer(stage), ((flight.id, flight.attempt),)))
        return commands

    def _settle(self, stage: int, now_s: float) -> list[Command]:
        commands: list[Command] = []
        for flight in list(self._flights.values()):
            commands += self._settle_hop(flight, stage, now_s)
        return commands + self._judge_all(now_s, stage)

    def _settle_hop(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        """Settle an accumulated hop once the state of every live peer of its stage holds it."""
        hop, evidence = flight.hops[stage], self._evidence[stage]
        if hop.phase is not Phase.ACCUMULATED:
            return []
        if evidence.is_safe(flight.id):
            hop.phase, hop.awaits_verdict = Phase.SETTLED, False
            return self._finish_if_settled(flight)
        doubtful = hop.accumulated_by not in self._stage_of and not evidence.is_held(flight.id)
        if doubtful and not hop.awaits_verdict:
            # Strict: a step cannot close without it, so there is nothing to wait for.
            self._await_verdict(flight, hop, now_s if self._strict else float("inf"))
        return []

    def _await_verdict(self, flight: Flight, hop: Hop, until_s: float) -> None:
        hop.awaits_verdict, hop.verdict_s = True, until_s
        self._awaiting[flight.id] = None

    def _judge_all(self, now_s: float, only: int | None = None) -> list[Command]:
        """Judge what awaits a verdict, at one stage or at all of them."""
        commands: list[Command] = []
        for microbatch in list(self._awaiting):
            flight = self._flights.get(microbatch)
            for stage, hop in enumerate(flight.hops if flight is not None else ()):
                if flight is not None and hop.awaits_verdict and only in (None, stage):
                    commands += self._judge(flight, stage, now_s)
            if flight is None or not any(hop.awaits_verdict for hop in flight.hops):
                self._awaiting.pop(microbatch, None)
        return commands

    def _judge(self, flight: Flight, stage: int, now_s: float) -> list[Command]:
        """Whoever may have accumulated this hop is gone: is its gradient in a step?

        It is not once the step it was meant for, or a later one, has closed without it.
        """
        hop, evidence = flight.hops[stage], self._evidence[stage]
        if evidence.is_held(flight.id):
            commands = self._inside(flight, stage, flight.peer(stage), hop.step, now_s)
            return commands + self._settle_hop(flight, stage, now_s)
        if evidence and evidence.newest <= hop.step and now_s < hop.verdict_s:
            return []
        hop.awaits_verdict = False
        return self._lost(flight, stage, now_s)

    def _finish_if_settled(self, flight: Flight) -> list[Command]:
        if any(hop.phase is not Phase.SETTLED for hop in flight.hops) or flight.id not in self._flights:
            return []
        commands = self._complete(flight) if not flight.completed else []
        self._forget(flight)
        return commands + (self._release(flight) if self._retain else [])

    def _forget(self, flight: Flight) -> None:
        del self._flights[flight.id]
        self._incomplete -= not flight.completed
        for evidence in self._evidence:
            evidence.forget(flight.id)

    # time

    def _tick(self, now_s: float) -> list[Command]:
        commands = self._judge_all(now_s)
        self.stuck = sum(self._is_stuck(f) for f in self._flights.values() if not f.completed)
        for flight in [flight for flight in self._flights.values() if not flight.completed]:
            if flight.unplaced:
                commands += self._router.place(flight, now_s)
            commands += self._router.deliver_again(flight, now_s)
        if now_s >= self._looked_s + self._hop_deadline_s / LOOKS_PER_DEADLINE:
            self._looked_s = now_s
            commands += self._look_for_late(now_s)
        return commands

    def _is_stuck(self, flight: Flight) -> bool:
        """Does it wait for one that may have stopped, or for what became of one?"""
        return not flight.evaluate and any(
            hop.awaits_verdict or (hop.phase < Phase.ACCUMULATED and hop.peer in wiring.suspended)
            for hop, wiring in zip(flight.hops, self._wirings, strict=True)
        )

    def _look_for_late(self, now_s: float) -> list[Command]:
        """Withdraw what takes longer than the deadline."""
        commands: list[Command] = []
        slow: defaultdict[PeerId, list[Flight]] = defaultdict(list)
        for flight in [flight for flight in self._flights.values() if not flight.completed]:
            commands += self._router.replace_suppliers(flight, now_s)
            for stage, hop in enumerate(flight.hops):
                if self._is_late(flight, stage, now_s) and hop.peer is not None:
                    hop.cancelling = True
                    slow[hop.peer].append(flight)
        for peer, flights in sorted(slow.items()):
            self.counters["deadline"] += len(flights)
            served = self._stage_of.get(peer)
            if served is not None:
                for flight in flights:  # in the prototype a timeout teaches the wiring nothing
                    self._wirings[served].observe(peer, flight.token_count, 2 * self._hop_deadline_s)
                    flight.avoid.add(peer)
            commands += _cancels(peer, [(flight.id, flight.attempt) for flight in flights])
        return commands

    def _is_late(self, flight: Flight, stage: int, now_s: float) -> bool:
        """Has its peer had all that this hop needs, or should have, for longer than the deadline?"""
        hop = flight.hops[stage]
        if hop.due_s is None or now_s - hop.due_s <= self._hop_deadline_s or hop.cancelling:
            return False
        waits = hop.phase is Phase.FORWARDED and not self._has_gradient(flight, stage)
        return hop.phase < Phase.ACCUMULATED and not hop.awaits_verdict and not waits

    @staticmethod
    def _has_gradient(flight: Flight, stage: int) -> bool:
        return stage == len(flight.hops) - 1 or flight.hops[stage + 1].phase >= Phase.ACCUMULATED

    # bookkeeping

    def _hops(self, peer: PeerId) -> Iterator[tuple[Flight, int, Hop]]:
        for flight in list(self._flights.values()):
            for stage, hop in enumerate(flight.hops):
                if hop.peer == peer:
                    yield flight, stage, hop

    def _recovered(self, microbatch: bytes, stage: int, now_s: float) -> list[Command]:
        done: list[Command] = []
        for peer, (noticed_s, moved, hops) in list(self._recovering.items()):
            moved.discard((microbatch, stage))
            moved -= {m for m in moved if m[0] not in self._flights}
            if not moved:
                del self._recovering[peer]
                done.append(Recovered(peer, noticed_s, now_s, hops))
        return done


def _cancels(peer: PeerId, ids: Sequence[tuple[bytes, int]]) -> list[Command]:
    """Withdraw these (microbatch, attempt) from `peer`, in messages of bounded size."""
    return [Cancel(peer, tuple(ids[i : i + MOST_ASKED])) for i in range(0, len(ids), MOST_ASKED)]


def batched_releases(commands: Iterable[Command]) -> list[Command]:
    """Join releases to the same peer into one command each."""
    others: list[Command] = []
    by_peer: defaultdict[PeerId, list[bytes]] = defaultdict(list)
    for command in commands:
        if isinstance(command, Release):
            by_peer[command.peer] += command.microbatches
        else:
            others.append(command)
    return others + [Release(peer, tuple(ids)) for peer, ids in by_peer.items()]
