"""The coordinator's side of a step: collect reports, decide, hand out the plan, collect the verdict.

Every peer is ready to coordinate: whoever reports to it opens a ballot for that step. A ballot closes
when `averaging.plan.decide` says so; then all reporters get the plan on the stream they reported on, and
the same streams carry back who holds what of the mean, and repairs if somebody was lost
(`averaging.repair`). When all who are left hold the whole mean, and they are a quorum, the verdict is to
commit. A reporter whose state differs from the majority's is told to fetch the state anew.

Peers that should report but do not are asked where they are: one that does not answer is not waited for,
one that has gone ahead shows that the others have moved on, and when two coordinators collect for the
same step the one with fewer reports sends its reporters to the other.

I/O: one event loop. Design section 6.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection

from google.protobuf.message import DecodeError

from averaging import averaging_pb2 as pb
from averaging.ballot import Ballot
from averaging.errors import LinkError, ProtocolError
from averaging.mates import Mates
from averaging.network import BEATS, LOOKS, Network, PeerId, Stream, kept_alive
from averaging.plan import Decision, Report, StepRules, decide, majority_hash, make_plan
from averaging.queries import Queries
from averaging.repair import Holdings
from averaging.round import Round
from averaging.shares import Mode
from averaging.wire import MODES, done_of, plan_message, repair_message, report_of

STEP_SERVICE = "step"
ALIVE = pb.FromCoordinator(alive=True).SerializeToString()
OPEN_BALLOTS = 8
MAX_IDS, ID_BYTES = 16_384, 16  # of one member in one step
TOO_FEW = "too few members are left"
log = logging.getLogger(__name__)


class Coordinator:
    """Closes steps for whoever reports to this peer, itself included."""

    def __init__(
        self,
        *,
        network: Network,
        rules: StepRules,
        version: Callable[[], int],
        mates: Mates,
        reporting_to: Callable[[], PeerId],
        pending: Callable[[bytes], bool],
        rng: random.Random,
    ) -> None:
        """`version` counts the steps that this peer has applied, `reporting_to` is its own coordinator, and
        `pending` whether it still hears that of a plan; `rng` names plans."""
        self._network, self._rules, self._rng = network, rules, rng
        self._version, self._mates = version, mates
        self._ballots: list[Ballot] = []
        self.queries = Queries(
            network=network,
            rules=rules,
            version=version,
            mates=mates,
            reporting_to=reporting_to,
            pending=pending,
            reports=lambda step: max((len(b.reports) for b in self._ballots if b.step == step), default=0),
        )

    async def start(self) -> None:
        await self._network.serve(STEP_SERVICE, self._attend)
        await self.queries.start()

    def close(self) -> None:
        """Answer nobody any more; ballots that are open here end."""
        self._network.unserve(STEP_SERVICE)
        for ballot in list(self._ballots):
            self._end(ballot)
        self.queries.close()

    # one reporter

    async def _attend(self, stream: Stream) -> None:
        """Serve one reporter from its first report to the verdict."""
        peer = stream.remote
        ballot: Ballot | None = None
        rules, time_s = self._rules, asyncio.get_running_loop().time
        try:
            report = await self._receive(stream, rules.silence_s)
            if report is None or report.WhichOneof("content") != "report":
                raise ProtocolError(peer, "does not begin with a report")
            if not self._mates.has_a_say:
                raise ProtocolError(peer, "asks an auxiliary to coordinate")
            step = report.report.step
            if step >= self._version():
                await self.queries.get_to_know([peer])
                if peer not in self._mates.live():
                    raise ProtocolError(peer, "is not on the roster")
            assists = report.report.mode == MODES.index(Mode.AUXILIARY)  # it follows, wherever it was
            if step < self._version() or (assists and step > self._version() + 1):
                await self._say(stream, pb.FromCoordinator(behind=self._version()))
                return await self._linger(stream)
            ballot = self._ballot(step)
            ballot.streams[peer] = stream
            async with kept_alive(stream, ALIVE, rules.silence_s):
                while not ballot.ended:
                    if ballot.streams.get(peer) is not stream:
                        break  # sent away, or it has opened another stream
                    if report is not None:
                        ballot.heard_s[peer] = time_s()
                        self._mates.hear(peer)
                        self._take(ballot, peer, report)
                    elif self._mates.has_stopped(peer, time_s() - ballot.last_heard_s(peer)):
                        if ballot.closed_s is not None:
                            raise LinkError(peer, "silent while averaging", silent=True)
                        self._mute(ballot, peer)
                    if ballot.closed_s is not None and time_s() > ballot.closed_s + rules.round_s:
                        raise LinkError(peer, f"still averages after {rules.round_s:.0f} s")
                    report = await self._receive(stream, rules.silence_s / LOOKS)
            await self._linger(stream)
        except (LinkError, ProtocolError) as error:
            log.debug("a reporter left: %s", error)
            if isinstance(error, LinkError) and error.silent:
                self._mates.suspect(error)
            stream.abort()
        finally:
            if ballot is not None and ballot.streams.get(peer) is stream:
                self._leave(ballot, peer)
                if not ballot.ended:
                    await self._look_for(ballot)  # is it dead, or only its stream?

    def _mute(self, ballot: Ballot, peer: PeerId) -> None:
        """A reporter is silent: in the plan all would wait for it in vain. Its next report counts."""
        if ballot.reports.pop(peer, None) is not None:
            log.info("step %d: %s reports no more", ballot.step, peer[-8:])
            self._mates.suspect(LinkError(peer, "reports no more", silent=True))
            self.consider(ballot)

    async def _receive(self, stream: Stream, wait_s: float) -> pb.FromMember | None:
        """The next message; None if there is none for so long."""
        try:
            async with asyncio.timeout(wait_s):
                frame = await stream.receive()
        except TimeoutError:
            return None
        if frame is None:
            raise LinkError(stream.remote, "is done here")
        try:
            return pb.FromMember.FromString(frame.header)
        except DecodeError:
            raise ProtocolError(stream.remote, "malformed report") from None

    async def _linger(self, stream: Stream) -> None:
        """Let the reporter hear the last word: it is the one to close, before long."""
        try:
            async with asyncio.timeout(self._rules.progress_s):
                while True:
                    await self._receive(stream, self._rules.silence_s)
        except TimeoutError:
            raise LinkError(stream.remote, "has heard the last word and stays") from None

    def _take(self, ballot: Ballot, peer: PeerId, message: pb.FromMember) -> None:
        kind = message.WhichOneof("content")
        if message.heard:
            ballot.claims_s[peer] = asyncio.get_running_loop().time()
        if kind == "report" and ballot.plan is None and not ballot.ended:
            ballot.reports[peer] = self._checked(ballot, peer, message.report)
            self.consider(ballot)
        elif kind == "frozen" and ballot.plan is not None and peer not in ballot.ids:
            ids = set(message.frozen.ids)
            if len(ids) > MAX_IDS or any(len(each) != ID_BYTES for each in ids):
                raise ProtocolError(peer, f"froze {len(ids)} microbatches, or some without a proper id")
            if any(not ids.isdisjoint(others) for others in ballot.ids.values()):
                ballot.duplicates.add(peer)
            ballot.ids[peer] = ids
            self._finish(ballot)
        elif kind == "failed" and ballot.holdings is not None:
            ballot.holdings.failed = f"{peer[-8:]} cannot carry it out"
            self._finish(ballot)
        elif kind == "done" and ballot.holdings is not None:
            self._repeat(ballot, ballot.holdings.take(peer, done_of(message.done, ballot.holdings.members)))

    def _checked(self, ballot: Ballot, peer: PeerId, said: pb.StepReport) -> Report:
        """Raises ProtocolError."""
        report = report_of(said, peer)
        if said.step != ballot.step or report.weight > self._rules.max_weight:
            raise ProtocolError(peer, f"report of weight {said.weight} for step {said.step}")
        brought = {other.passes for other in ballot.reports.values()} - {()}
        if report.passes and brought - {report.passes}:
            raise ProtocolError(peer, f"brings {report.passes}, the others {brought}")
        return report

    def _repeat(self, ballot: Ballot, rounds: Collection[Round]) -> None:
        """Hand out repairs, and see whether the plan has come to its end."""
        for round_ in rounds if not ballot.holdings or not ballot.holdings.failed else ():
            log.info("step %d: attempt %d at a round of %d", ballot.step, round_.attempt, len(round_.members))
            message = pb.FromCoordinator(repair=repair_message(round_))
            for peer in round_.members:
                if (stream := ballot.streams.get(peer)) is not None:
                    self._say_soon(stream, message)
        self._finish(ballot)

    def _leave(self, ballot: Ballot, peer: PeerId) -> None:
        ballot.streams.pop(peer, None)
        if ballot.plan is None:
            ballot.reports.pop(peer, None)
            if not ballot.streams:
                self._end(ballot)
        elif ballot.holdings is not None and not ballot.ended:
            rounds = ballot.holdings.lose(peer)
            if not self._is_quorum(ballot, ballot.holdings):  # nor will they be: let them begin anew at once
                ballot.holdings.failed = ballot.holdings.failed or TOO_FEW
            self._repeat(ballot, rounds)

    async def _look_after(self, ballot: Ballot) -> None:
        """See what keeps a ballot from closing."""
        pause_s = self._rules.silence_s / BEATS
        await asyncio.sleep(0 if self._mates.silent() else pause_s)  # are they dead, or only out of reach?
        while not ballot.ended and ballot.plan is None:
            await self._look_for(ballot)
            self._reconsider(ballot)  # whoever was waited for may be gone by now
            await asyncio.sleep(pause_s)

    # the decision

    def _ballot(self, step: int) -> Ballot:
        for ballot in self._ballots:
            if ballot.step == step and ballot.plan is None:
                return ballot
        if len(self._ballots) >= OPEN_BALLOTS:
            oldest = self._ballots[0]
            self._end(oldest)
            for stream in oldest.streams.values():
                stream.abort()
        self._ballots.append(ballot := Ballot(step))
        ballot.looking = asyncio.create_task(self._look_after(ballot))
        return ballot

    def consider(self, ballot: Ballot) -> Decision:
        """Close the ballot if it is time."""
        loop = asyncio.get_running_loop()
        rules = self._rules
        if (furthest := self._mates.furthest()) > ballot.step:  # who has been away does not go on alone
            self._send_all(ballot, pb.FromCoordinator(behind=furthest))
            return Decision(False, f"others are at version {furthest}")
        enough = sum(report.weight for report in ballot.reports.values()) >= rules.target
        if not enough:
            ballot.reached_s = None  # a reporter has died since
        elif ballot.reached_s is None:
            ballot.reached_s = loop.time()
            loop.call_later(rules.grace_s + 0.001, self._reconsider, ballot)
        electors = self._electors(ballot)
        decision = decide(
            ballot.reports,
            target=rules.target,
            expected=self._mates.voters(),
            quorum=self._mates.has_quorum(ballot.reports, electors, heard=ballot.heard_outside(loop.time())),
            # Who is one step behind may have taken it since; who is further needs longer than the grace.
            silent={*self._mates.silent(), *ballot.behind(by=2)},
            unheard=[p for p in ballot.reports if loop.time() > ballot.heard_s[p] + rules.overdue_s],
            waited_s=0.0 if ballot.reached_s is None else loop.time() - ballot.reached_s,
            grace_s=rules.grace_s,
        )
        if decision.reason != ballot.reason:
            ballot.reason = decision.reason
            log.debug("step %d: %s", ballot.step, decision.reason)
        if decision.close and not self._send_drifted_away(ballot):
            self._close(ballot)
        return decision

    def _reconsider(self, ballot: Ballot) -> None:
        if ballot.plan is None and not ballot.ended:
            self.consider(ballot)

    def _send_drifted_away(self, ballot: Ballot) -> bool:
        """Reporters whose state is not the majority's must fetch it before they can average."""
        stated = {p: r.state_hash for p, r in ballot.reports.items() if r.mode is not Mode.AUXILIARY}
        majority = majority_hash(stated, [p for p in stated if ballot.reports[p].dated])
        drifted = [peer for peer, state in stated.items() if state != majority]
        for peer in drifted:
            log.warning("step %d: %s holds another state than the majority", ballot.step, peer[-8:])
            del ballot.reports[peer]
            self._say_soon(ballot.streams.pop(peer), pb.FromCoordinator(drifted=True))
        return bool(drifted)

    def _close(self, ballot: Ballot) -> None:
        plan = make_plan(
            step=ballot.step,
            coordinator=self._network.peer_id,
            reports=ballot.reports,
            nonce=self._rng.randbytes(16),
            rules=self._rules,
        )
        ballot.plan, ballot.closed_s = plan, asyncio.get_running_loop().time()
        ballot.holdings = Holdings(plan, self._rules)
        message = pb.FromCoordinator(plan=plan_message(plan))
        for peer, stream in list(ballot.streams.items()):
            if peer in plan.by_peer:
                self._say_soon(stream, message)
            else:  # it has been silent: let it begin anew
                del ballot.streams[peer]
                self._say_soon(stream, pb.FromCoordinator(moved=self._network.peer_id))

    def _finish(self, ballot: Ballot) -> None:
        """Speak the verdict once it is known."""
        if ballot.ended or ballot.plan is None or ballot.holdings is None:
            return
        plan, holdings = ballot.plan, ballot.holdings
        left_out = holdings.left_out() if holdings.complete else set()
        commit = holdings.complete and not ballot.duplicates
        if not (commit or holdings.failed or ballot.duplicates):
            return
        why = self._short_of(ballot, holdings, left_out) if commit else holdings.failed
        if why:
            log.info("step %d: abandoned: %s", ballot.step, why)
            commit = False
        commit = commit and not self.queries.is_abandoned(plan.key)
        if not commit:
            self.queries.abandon(plan.key)
        self._end(ballot)
        ids = sorted(set().union(*(ids for peer, ids in ballot.ids.items() if peer not in left_out)))
        for peer, stream in ballot.streams.items():
            verdict = pb.Verdict(
                commit=commit,
                ids=ids if commit else [],
                left_out=sorted(left_out) if commit else [],
                outdated=sorted(holdings.outdated) if commit else [],
                duplicate=peer in ballot.duplicates,
            )
            self._say_soon(stream, pb.FromCoordinator(verdict=verdict))

    def _short_of(self, ballot: Ballot, holdings: Holdings, left_out: Collection[PeerId]) -> str:
        """Why a mean that is there may not be used; empty if it may."""
        assert ballot.plan is not None
        inside = [peer for peer in ballot.plan.bringers if peer not in left_out]
        if not self._is_quorum(ballot, holdings):
            return TOO_FEW
        if sum(ballot.plan.by_peer[peer].weight for peer in inside) < self._rules.target:
            return "what is left weighs too little"
        # Whatever it weighed when it last reported: it went on until it froze its vector.
        if any(peer not in ballot.ids for peer in inside):
            return "nobody knows what was in the vector of a member that was lost"
        return ""

    def _is_quorum(self, ballot: Ballot, holdings: Holdings) -> bool:
        """Of all live peers, as for closing: who left may be in a plan with those who are not in this one."""
        assert ballot.plan is not None
        peers = {*self._electors(ballot), *ballot.plan.bringers}
        heard = ballot.heard_outside(asyncio.get_running_loop().time())
        return self._mates.has_quorum(holdings.alive, peers, heard=heard)

    def _electors(self, ballot: Ballot) -> set[PeerId]:
        """Those who might close the step without the others: not who has yet to come to it.

        That one hears of this step before it takes it itself: of its mates, or of the witnesses.
        """
        voters = set(self._mates.voters())
        if self._rules.strict:
            return voters
        ballot.versions[self._network.peer_id] = self._version()
        return voters.difference(ballot.behind()) or voters

    def step_closed(self, version: int) -> None:
        """This peer has reached `version`: whoever still reports for an earlier step is behind."""
        for ballot in [b for b in self._ballots if b.step < version and b.plan is None]:
            self._send_all(ballot, pb.FromCoordinator(behind=version))

    # where is everybody?

    async def _look_for(self, ballot: Ballot) -> None:
        """Ask live peers that have not reported here where they are, all at once."""
        missing = [p for p in self._mates.voters() if p not in ballot.reports]
        await asyncio.gather(*(self._look_for_one(ballot, peer) for peer in missing))

    async def _look_for_one(self, ballot: Ballot, peer: PeerId) -> None:
        try:
            info = await self.queries.ask(peer, pb.StepQuery(step=ballot.step))
            if info.version > ballot.step:
                return self._send_all(ballot, pb.FromCoordinator(behind=info.version))
            ballot.versions[peer] = info.version
            rival = info.coordinator
            if rival == self._network.peer_id or rival not in self._mates.live():
                return
            theirs = info if rival == peer else await self.queries.ask(rival, pb.StepQuery(step=ballot.step))
            mine = len(ballot.reports)
            if ballot.plan is None and (
                theirs.reports > mine or (theirs.reports == mine and rival < self._network.peer_id)
            ):
                self._send_all(ballot, pb.FromCoordinator(moved=rival))
        except LinkError as error:
            self._mates.suspect(error)

    def _send_all(self, ballot: Ballot, message: pb.FromCoordinator) -> None:
        """Tell every reporter of a ballot that will not close here."""
        if ballot.plan is None and not ballot.ended:
            self._end(ballot)
            for stream in ballot.streams.values():
                self._say_soon(stream, message)

    def _end(self, ballot: Ballot) -> None:
        ballot.ended = True
        if ballot.looking is not None:
            ballot.looking.cancel()
        if ballot in self._ballots:
            self._ballots.remove(ballot)

    def _say_soon(self, stream: Stream, message: pb.FromCoordinator) -> None:
        task = asyncio.create_task(self._say(stream, message))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _say(self, stream: Stream, message: pb.FromCoordinator) -> None:
        try:
            async with asyncio.timeout(self._rules.progress_s):
                await stream.send(message.SerializeToString())
        except (LinkError, TimeoutError):
            stream.abort()
