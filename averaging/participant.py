"""A member's side of a step: report -> plan -> average -> verdict, until the step is closed.

    report the weight to the step's coordinator whenever it changes
    on the plan: meet its members, freeze what is to be averaged
    average it; tell the coordinator after every round what is missing here, and repeat what it asks for
    on the verdict: return the mean, or begin anew

A coordinator that does not answer is passed over: the next one in the order takes its place. If it
vanishes between plan and verdict, the members ask each other: if any has committed, all do (and then all
held the whole mean already); a member that says no promises never to, and as long as one still hears the
coordinator the others wait.

I/O: one event loop. Design section 6.
"""

import asyncio
import contextlib
import functools
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from google.protobuf.message import DecodeError

from averaging import averaging_pb2 as pb
from averaging.allreduce import ButterflyAllReduce
from averaging.coordinator import STEP_SERVICE, Coordinator
from averaging.errors import (
    AveragingError,
    BehindError,
    LinkError,
    MovedError,
    ProtocolError,
    RoundAbandonedError,
)
from averaging.mates import Mates
from averaging.moshpit import Averaged, Contribution, Rounds
from averaging.network import BEATS, LOOKS, Network, PeerId, Stream, kept_alive, while_heard
from averaging.plan import Pass, Plan, Report, StepRules, check_plan, coordinator_order
from averaging.queries import REMEMBERED_PLANS, Committed
from averaging.round import Done
from averaging.shares import Mode
from averaging.wire import done_message, plan_of, repair_of, report_message
from averaging.witnesses import NO_WITNESSES, Witnesses

VERDICT_TRIES, VERDICT_PAUSE_S = 4, 0.25
ASKED = 8  # members, whether a step is closed
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mean:
    """A closed step."""

    plan: Plan
    vector: torch.Tensor  # [values] float32 of the last pass, bit-identical on all members
    members: tuple[PeerId, ...]  # whose contributions are in it
    ids: tuple[bytes, ...]  # of those contributions
    sent_bytes: int
    averaging_s: float


class Contributor(Protocol):
    """What a participant asks of its owner."""

    state_hash: bytes  # 8 bytes: members that start from different states are told apart
    changed: asyncio.Event  # set whenever `weight` or `state_hash` may have changed

    @property
    def weight(self) -> float: ...

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Sizes of what it brings."""
        ...

    async def prepare(self) -> None:
        """Called before every attempt to close the step."""
        ...

    async def freeze(self) -> Contribution:
        """What goes into this step; nothing is added to it from now on. Raises RoundAbandonedError."""
        ...

    def abandoned(self, *, duplicate: bool) -> None:
        """The plan came to nothing; if `duplicate`, another member brought some of the same ids."""
        ...


@dataclass(slots=True)
class _Plan:
    """A plan that is being carried out."""

    plan: Plan
    stream: Stream  # to its coordinator
    rounds: Rounds


class Participant:
    """Closes one step after the other with whoever is on the roster."""

    def __init__(
        self,
        *,
        network: Network,
        all_reduce: ButterflyAllReduce,
        rules: StepRules,
        name: str,
        roster: Callable[[], Collection[PeerId]],
        refresh_roster: Callable[[], Awaitable[None]],
        version: Callable[[], int],
        rng: random.Random,
        mode: Mode = Mode.MEMBER,
        auxiliaries: Callable[[], Collection[PeerId]] = tuple,
        newcomers: Callable[[], Collection[PeerId]] = tuple,
        witnesses: Witnesses = NO_WITNESSES,
    ) -> None:
        """`name` is shared by all who average together; `roster` are the others that live, as of the last
        `refresh_roster`; `version` counts the steps that this peer has applied; `rng` names plans;
        `auxiliaries` are those on the roster that only reduce: they close no steps, and have no say;
        `newcomers` those, perhaps this peer, that not all others may know yet."""
        self._network, self._all_reduce, self._rules, self._name = network, all_reduce, rules, name
        self._version, self._mode = version, mode
        self.mates = mates = Mates(
            me=network.peer_id,
            rules=rules,
            roster=roster,
            refresh=refresh_roster,
            auxiliaries=auxiliaries,
            newcomers=newcomers,
            witnesses=witnesses,
            helps=mode is Mode.AUXILIARY,
        )
        all_reduce.has_stopped = mates.has_stopped
        self._seen_plans: deque[bytes] = deque(maxlen=REMEMBERED_PLANS)
        self._finishing: set[asyncio.Task[None]] = set()
        self._pending: bytes = b""  # the plan whose coordinator is still heard
        self._planned_s = float("-inf")  # when the plan came of the newest step that was closed here
        self.reporting_to: PeerId = ""
        self.coordinator = Coordinator(
            network=network,
            rules=rules,
            version=version,
            mates=mates,
            reporting_to=lambda: self.reporting_to,
            pending=lambda plan: plan == self._pending,
            rng=rng,
        )
        self._queries = self.coordinator.queries

    async def start(self) -> None:
        """Answer reports, queries and rounds of averaging from now on."""
        await self._all_reduce.start()
        await self.coordinator.start()

    def close(self) -> None:
        """Take no part any more."""
        self._all_reduce.close()
        self.coordinator.close()

    def leave_soon(self) -> None:
        """Whoever asks is told so from now on."""
        self._queries.leaving = True

    async def close_step(self, contributor: Contributor) -> Mean:
        """Take part until the step after `version()` is closed; the mean is for the caller to apply.

        Raises:
            BehindError: the others have gone on, or hold another state: fetch it.
        """
        moved_to: PeerId | None = None
        while True:
            step, coordinator = self._version(), moved_to or self._next_coordinator()
            moved_to = None
            try:
                if coordinator is None:
                    await asyncio.sleep(self._rules.silence_s / LOOKS)
                    await self.mates.refresh()
                    continue
                return await self._step_with(coordinator, step, contributor)
            except MovedError as moved:
                moved_to = moved.coordinator
            except LinkError as error:
                log.info("step %d: coordinator %s", step, error)
                self.mates.suspect(error)
            except BehindError:
                raise
            except AveragingError as error:
                log.info("step %d: %s", step, error)

    def is_in(self, mean: Mean) -> bool:
        """Is this member's own contribution in it?"""
        return self._network.peer_id in mean.members

    # who

    def _next_coordinator(self) -> PeerId | None:
        """None if there is nobody an auxiliary could help."""
        silent = self.mates.silent()
        reachable = [peer for peer in self.mates.voters() if peer not in silent]
        if self._mode is Mode.CLIENT and len(reachable) > 1:
            reachable.remove(self._network.peer_id)  # nobody could report to it
        return next(iter(coordinator_order(reachable, name=self._name, step=self._version())), None)

    async def is_behind(self) -> bool:
        """Has one of those who would close the next step closed it already?"""
        step, me = self._version(), self._network.peer_id
        others = [peer for peer in self.mates.voters() if peer != me]
        asked = coordinator_order(others, name=self._name, step=step)[:ASKED]
        return max(await asyncio.gather(*map(self._version_of, asked)), default=step) > step

    async def stays(self, peer: PeerId) -> bool:
        """Does it live, with all that this peer's state has, and mean to? Its record does for a while, in any
        case."""
        for _ in range(VERDICT_TRIES):  # it may be about to take the step that was taken here just now
            info = await self._asked(peer)
            if info is None or info.leaving:
                return False
            if info.version >= self._version():
                return True
            await asyncio.sleep(VERDICT_PAUSE_S)
        return False

    async def _version_of(self, peer: PeerId) -> int:
        """0 if it does not answer."""
        info = await self._asked(peer)
        return 0 if info is None else info.version

    async def _asked(self, peer: PeerId) -> pb.StepInfo | None:
        """Where a peer is, if it answers."""
        try:
            return await self._queries.ask(peer, pb.StepQuery(step=self._version()))
        except LinkError as error:
            self.mates.suspect(error)
            return None

    # one step

    async def _step_with(self, coordinator: PeerId, step: int, contributor: Contributor) -> Mean:
        await contributor.prepare()
        stream = await self._while_heard(coordinator, self._network.open(coordinator, STEP_SERVICE))
        self.reporting_to = coordinator
        try:
            plan = await self._report_until_plan(stream, step, contributor)
            planned_s = asyncio.get_running_loop().time()
            mean = await self._carry_out(plan, stream, contributor)
            self._planned_s = planned_s
            self._finish_soon(stream)
            return mean
        except BaseException:
            stream.abort()
            raise
        finally:
            self.reporting_to = ""

    def _finish_soon(self, stream: Stream) -> None:
        """Close in order, while the mean is being used."""
        task = asyncio.create_task(_finish(stream))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    async def _report_until_plan(self, stream: Stream, step: int, contributor: Contributor) -> Plan:
        reporting = asyncio.create_task(self._keep_reporting(stream, step, contributor))
        try:
            while True:
                answer = await self._hear(stream)
                match answer.WhichOneof("content"):
                    case "plan":
                        return await self._checked(answer.plan, step, stream.remote, contributor)
                    case "behind":
                        raise BehindError(f"the others are at version {answer.behind}", version=answer.behind)
                    case "drifted":
                        raise BehindError("the majority holds another state")
                    case "moved":
                        await self._queries.get_to_know([answer.moved])
                        if answer.moved not in self.mates.live():
                            raise AveragingError(f"its coordinator {answer.moved[-8:]} is not known here")
                        raise MovedError(answer.moved)
        finally:
            reporting.cancel()

    async def _hear(self, stream: Stream) -> pb.FromCoordinator:
        frame = await self._while_heard(stream.remote, stream.receive())
        if frame is None:
            raise LinkError(stream.remote, "closed the step stream")
        try:
            return pb.FromCoordinator.FromString(frame.header)
        except DecodeError:
            raise LinkError(stream.remote, "malformed message of a coordinator") from None

    async def _while_heard(self, peer: PeerId, awaited: Coroutine[None, None, T]) -> T:
        """Raises LinkError once the coordinator counts as lost."""
        look_s = self._rules.silence_s / LOOKS
        return await while_heard(peer, awaited, self.mates.has_stopped, look_s=look_s)

    async def _checked(
        self, message: pb.StepPlan, step: int, coordinator: PeerId, contributor: Contributor
    ) -> Plan:
        try:
            plan = plan_of(message, coordinator, self._rules)
        except ProtocolError as error:
            raise LinkError(coordinator, str(error)) from None
        known = {*self.mates.roster(), coordinator}
        await self._queries.get_to_know([peer for peer in plan.by_peer if peer not in known])
        roster = {*self.mates.roster(), *self.mates.live(), coordinator}
        mine = self._report(contributor)
        wrong = check_plan(plan, me=self._network.peer_id, step=step, mine=mine, roster=roster)
        if wrong is None and plan.key in self._seen_plans:
            wrong = "its key has been used"
        if wrong is not None:
            raise LinkError(coordinator, f"its plan is refused: {wrong}")
        self._seen_plans.append(plan.key)
        return plan

    def _report(self, contributor: Contributor) -> Report:
        bandwidth = self._all_reduce.uplink.reported
        dated = self.mates.was_away_since(self._planned_s)
        weight, state_hash, passes = contributor.weight, contributor.state_hash, contributor.passes
        return Report(weight, state_hash, passes, bandwidth, self._mode, dated)

    async def _keep_reporting(self, stream: Stream, step: int, contributor: Contributor) -> None:
        """Whenever there is news; and now and then in any case, or this member would be thought silent."""
        while True:
            contributor.changed.clear()
            report = report_message(step, self._report(contributor))
            try:
                message = pb.FromMember(report=report, heard=self.mates.is_heard())
                await stream.send(message.SerializeToString())
            except LinkError:
                return  # the receiving side notices, too
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rules.silence_s / BEATS):
                    await contributor.changed.wait()

    async def _carry_out(self, plan: Plan, stream: Stream, contributor: Contributor) -> Mean:
        """Freeze, average, and hear the verdict. Raises RoundAbandonedError if it came to nothing."""
        time_s = asyncio.get_running_loop().time
        began_s, verdict = time_s(), None
        rounds = Rounds(
            plan,
            self._network.peer_id,
            all_reduce=self._all_reduce,
            say=functools.partial(self._say_done, stream),
        )
        averaging = asyncio.create_task(self._average(plan, rounds, stream, contributor))
        averaging.add_done_callback(functools.partial(_abort_if_failed, stream))
        self._pending = plan.key
        try:
            under_way = _Plan(plan, stream, rounds)
            async with kept_alive(stream, self._alive, self._rules.silence_s):
                verdict = await self._verdict(under_way)
            if averaging.done():
                averaging.result()  # raises what is a bug
            committed = await self._committed(under_way, verdict)
            if committed is None:
                raise RoundAbandonedError(f"its plan of {len(plan.members)} members was abandoned")
            if self._network.peer_id in committed.outdated:
                raise BehindError("the others have repaired their mean without this member")
            await asyncio.wait([averaging], timeout=self._rules.silence_s)  # at once, if all is here
            if not averaging.done():
                raise BehindError("the others hold a mean that is not all here")
            result = averaging.result()
            members = tuple(peer for peer in plan.by_peer if peer not in committed.left_out)
            return Mean(plan, result.vector, members, committed.ids, result.sent_bytes, time_s() - began_s)
        except BaseException:
            contributor.abandoned(duplicate=verdict is not None and verdict.duplicate)
            raise
        finally:
            self._pending = b""
            averaging.cancel()
            rounds.close()

    async def _average(
        self, plan: Plan, rounds: Rounds, stream: Stream, contributor: Contributor
    ) -> Averaged:
        """Freeze, and average; what was frozen is known to the coordinator before any of it is sent."""
        try:
            mine = await contributor.freeze()
        except RoundAbandonedError as error:
            log.info("cannot carry out the plan: %s", error)
            await _say(stream, pb.FromMember(failed=True))
            rounds.close()  # nothing of this member will come: who is in touch with it would wait for ever
            return await asyncio.get_running_loop().create_future()  # until the verdict
        log.debug("step %d: averaging with %d members", plan.step, len(plan.members))
        await _say(stream, pb.FromMember(frozen=pb.Frozen(ids=mine.ids)))
        return await rounds.average(replace(mine, weight=min(self._rules.max_weight, mine.weight)))

    def _alive(self) -> bytes:
        return pb.FromMember(alive=True, heard=self.mates.is_heard()).SerializeToString()

    async def _say_done(self, stream: Stream, done: Done) -> None:
        await _say(stream, pb.FromMember(done=done_message(done), heard=self.mates.is_heard()))

    async def _committed(self, under_way: _Plan, verdict: pb.Verdict | None) -> Committed | None:
        """What all members commit to, this one with them; None if the plan is abandoned."""
        if verdict is None:
            return await self._committed_elsewhere(under_way.plan)
        committed = _committed_of(verdict)
        key = under_way.plan.key
        return committed if verdict.commit and self._queries.commit(key, committed) else None

    async def _verdict(self, under_way: _Plan) -> pb.Verdict | None:
        """What becomes of the plan; None if the coordinator vanished before it said so."""
        plan, stream = under_way.plan, under_way.stream
        end_s = asyncio.get_running_loop().time() + 2 * self._rules.round_s
        try:
            while asyncio.get_running_loop().time() < end_s:
                answer = await self._hear(stream)
                match answer.WhichOneof("content"):
                    case "verdict":
                        return answer.verdict
                    case "repair":
                        repair = repair_of(answer.repair, plan, self._rules)
                        under_way.rounds.repeat(repair)
            raise LinkError(stream.remote, "speaks no verdict")
        except AveragingError as error:
            log.info("step %d: coordinator %s before its verdict", plan.step, error)
            self.mates.suspect(
                LinkError(stream.remote, str(error), silent=isinstance(error, LinkError) and error.silent)
            )
        self._pending = b""
        return None

    async def _committed_elsewhere(self, plan: Plan) -> Committed | None:
        """The coordinator is gone: has any member committed? If most have not, none will any more.

        Members that do not answer leave a doubt, which later reports of the others will settle.
        """
        self._queries.abandon(plan.key)
        undecided = sorted(peer for peer in plan.by_peer if peer != self._network.peer_id)
        tries, end_s = 0, asyncio.get_running_loop().time() + self._rules.round_s
        while undecided and tries < VERDICT_TRIES and asyncio.get_running_loop().time() < end_s:
            answers = await self._ask_all(undecided, plan)
            for answer in answers.values():
                if answer.committed:
                    committed = _committed_of(answer)
                    self._queries.learn_committed(plan.key, committed)
                    return committed
            pending = [peer for peer, answer in answers.items() if answer.pending]
            undecided = [peer for peer in undecided if peer in pending or peer not in answers]
            if not pending and self._is_enough(plan, undecided):
                return None
            tries += not pending
            await asyncio.sleep(VERDICT_PAUSE_S)
        return None

    def _is_enough(self, plan: Plan, undecided: Collection[PeerId]) -> bool:
        """Can those who promised not to commit `plan` do without an answer of the rest?"""
        promised = [peer for peer in plan.by_peer if peer not in undecided]
        return not undecided or (not self._rules.strict and self.mates.has_quorum(promised, plan.bringers))

    async def _ask_all(self, peers: Collection[PeerId], plan: Plan) -> dict[PeerId, pb.StepInfo]:
        """What they know of the plan; once there are enough answers, the others have little time left.

        Likewise if the rest have stopped, which may show only while they are asked.
        """
        asked = {asyncio.create_task(self._ask(peer, plan)): peer for peer in peers}
        answers: dict[PeerId, pb.StepInfo] = {}
        waiting = set(asked)
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=VERDICT_PAUSE_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if (answer := task.result()) is not None:
                        answers[asked[task]] = answer
                rest = [peer for peer in peers if peer not in answers]
                if not done and (
                    self._is_enough(plan, rest) or all(map(self.mates.is_silent_elsewhere, rest))
                ):
                    break
        finally:
            for task in waiting:
                task.cancel()
        return answers

    async def _ask(self, peer: PeerId, plan: Plan) -> pb.StepInfo | None:
        """What `peer` knows of the plan: nothing if it is dead, None if it does not answer."""
        try:
            return await self._queries.ask(peer, pb.StepQuery(plan=plan.key))
        except LinkError as error:
            return pb.StepInfo() if error.refused else None


def _committed_of(message: pb.Verdict | pb.StepInfo) -> Committed:
    return Committed(tuple(message.ids), tuple(message.left_out), tuple(message.outdated))


async def _finish(stream: Stream) -> None:
    try:
        await stream.finish()
    except LinkError:
        stream.abort()


def _abort_if_failed(stream: Stream, task: "asyncio.Task[Averaged]") -> None:
    if not task.cancelled() and task.exception() is not None:
        stream.abort()  # a bug: nobody is to wait for it


async def _say(stream: Stream, message: pb.FromMember) -> None:
    with contextlib.suppress(LinkError):  # whoever waits for the verdict notices
        await stream.send(message.SerializeToString())
