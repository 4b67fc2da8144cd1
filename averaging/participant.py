"""A member's side of a step: report -> plan -> average -> verdict, until the step is closed.

    report the weight to the step's coordinator whenever it changes
    on the plan: freeze what is to be averaged
    average it with the plan's members; tell the coordinator whether the whole mean is here
    on the verdict: return the mean, or begin anew

A coordinator that does not answer is passed over: the next one in the order takes its place. If it
vanishes between plan and verdict, the members ask each other: if any has committed, all do; a member
that says no promises never to.

I/O: one event loop. Design section 6.
"""

import asyncio
import contextlib
import functools
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from google.protobuf.message import DecodeError

from averaging import averaging_pb2 as pb
from averaging import moshpit
from averaging.allreduce import ButterflyAllReduce, RoundResult
from averaging.coordinator import ALIVE_S, REMEMBERED_PLANS, STEP_SERVICE, Coordinator
from averaging.errors import AveragingError, BehindError, LinkError, MovedError, RoundAbandonedError
from averaging.network import Network, PeerId, Stream
from averaging.plan import Member, Plan, StepRules, check_plan, coordinator_order

MAX_MEMBERS = 4096
VERDICT_TRIES, VERDICT_PAUSE_S = 4, 0.25
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one member brings to the mean."""

    vector: torch.Tensor  # [values] float32
    weight: float
    ids: Collection[bytes] = ()  # 16 bytes each; no id may be in one mean twice


@dataclass(frozen=True, slots=True)
class Mean:
    """A closed step."""

    plan: Plan
    vector: torch.Tensor  # [values] float32, bit-identical on all members
    ids: tuple[bytes, ...]  # of all contributions in it
    sent_bytes: int
    averaging_s: float


class Contributor(Protocol):
    """What a participant asks of its owner."""

    state_hash: bytes  # 8 bytes: members that start from different states are told apart
    changed: asyncio.Event  # set whenever `weight` or `state_hash` may have changed

    @property
    def weight(self) -> float: ...

    async def prepare(self) -> None:
        """Called before every attempt to close the step."""
        ...

    async def freeze(self) -> Contribution:
        """What goes into this step; nothing is added to it from now on. Raises RoundAbandonedError."""
        ...

    def abandoned(self, *, duplicate: bool) -> None:
        """The plan came to nothing; if `duplicate`, another member brought some of the same ids."""
        ...


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
    ) -> None:
        """`name` is shared by all who average together; `roster` are the others that live, as of the last
        `refresh_roster`; `version` counts the steps that this peer has applied; `rng` names plans."""
        self._network, self._all_reduce, self._rules, self._name = network, all_reduce, rules, name
        self._roster, self._refresh_roster, self._version = roster, refresh_roster, version
        self._dead_s: dict[PeerId, float] = {}  # when their dials were refused
        self._unreachable_s: dict[PeerId, float] = {}  # when they last did not answer
        self._seen_plans: deque[bytes] = deque(maxlen=REMEMBERED_PLANS)
        self._finishing: set[asyncio.Task[None]] = set()
        self.reporting_to: PeerId = ""
        self.coordinator = Coordinator(
            network=network,
            rules=rules,
            version=version,
            expected=self.live,
            reporting_to=lambda: self.reporting_to,
            suspect=self._suspect,
            refresh=refresh_roster,
            rng=rng,
        )

    async def start(self) -> None:
        """Answer reports, queries and rounds of averaging from now on."""
        await self._all_reduce.start()
        await self.coordinator.start()

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
                return await self._step_with(coordinator, step, contributor)
            except MovedError as moved:
                moved_to = moved.coordinator
            except LinkError as error:
                log.info("step %d: coordinator %s", step, error)
                self._suspect(error)
            except BehindError:
                raise
            except AveragingError as error:
                log.info("step %d: %s", step, error)

    # who

    def live(self) -> list[PeerId]:
        """The peers that are not known to be dead, this one included."""
        recent_s = asyncio.get_running_loop().time() - self._rules.expire_s
        self._dead_s = {p: at for p, at in self._dead_s.items() if at > recent_s}
        me = self._network.peer_id
        return [*(p for p in self._roster() if p not in self._dead_s and p != me), me]

    def _suspect(self, error: LinkError) -> None:
        """A dial failed: its peer is dead, or cannot be reached from here for now."""
        if error.peer != self._network.peer_id:
            suspected = self._dead_s if error.refused else self._unreachable_s
            suspected[error.peer] = asyncio.get_running_loop().time()

    def _next_coordinator(self) -> PeerId:
        recent_s = asyncio.get_running_loop().time() - self._rules.progress_s
        self._unreachable_s = {p: at for p, at in self._unreachable_s.items() if at > recent_s}
        reachable = [peer for peer in self.live() if peer not in self._unreachable_s]
        return coordinator_order(reachable, name=self._name, step=self._version())[0]

    # one step

    async def _step_with(self, coordinator: PeerId, step: int, contributor: Contributor) -> Mean:
        await contributor.prepare()
        stream = await self._network.open(coordinator, STEP_SERVICE)
        self.reporting_to = coordinator
        try:
            plan = await self._report_until_plan(stream, step, contributor)
            mean = await self._carry_out(plan, stream, contributor)
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
        reporting = asyncio.create_task(_report(stream, step, contributor))
        try:
            while True:
                answer = await self._hear(stream)
                match answer.WhichOneof("content"):
                    case "plan":
                        return await self._checked(answer.plan, step, stream.remote, contributor.weight)
                    case "behind":
                        raise BehindError(f"the others are at version {answer.behind}")
                    case "drifted":
                        raise BehindError("the majority holds another state")
                    case "moved":
                        if answer.moved not in self.live():
                            await self._refresh_roster()
                        if answer.moved not in self.live():
                            raise AveragingError(f"its coordinator {answer.moved[-8:]} is not known here")
                        raise MovedError(answer.moved)
        finally:
            reporting.cancel()

    async def _hear(self, stream: Stream) -> pb.FromCoordinator:
        try:
            async with asyncio.timeout(self._rules.progress_s):
                frame = await stream.receive()
        except TimeoutError:
            raise LinkError(stream.remote, f"silent for {self._rules.progress_s:.1f} s") from None
        if frame is None:
            raise LinkError(stream.remote, "closed the step stream")
        try:
            return pb.FromCoordinator.FromString(frame.header)
        except DecodeError:
            raise LinkError(stream.remote, "malformed message of a coordinator") from None

    async def _checked(self, message: pb.StepPlan, step: int, coordinator: PeerId, weight: float) -> Plan:
        members = tuple(Member(m.peer, m.weight) for m in message.members[: MAX_MEMBERS + 1])
        plan = Plan(bytes(message.key), message.step, coordinator, members, self._rules.group_size)
        me_and_coordinator = {self._network.peer_id, coordinator}
        if any(member.peer not in {*self._roster(), *me_and_coordinator} for member in members):
            await self._refresh_roster()  # a newcomer that announced itself a moment ago
        roster = {*self._roster(), *me_and_coordinator}
        wrong = check_plan(plan, me=self._network.peer_id, step=step, my_weight=weight, roster=roster)
        if wrong is None and (len(plan.key) != 16 or len(members) > MAX_MEMBERS):
            wrong = "it is malformed"
        if wrong is None and plan.key in self._seen_plans:
            wrong = "its key has been used"
        if wrong is not None:
            raise LinkError(coordinator, f"its plan is refused: {wrong}")
        self._seen_plans.append(plan.key)
        return plan

    async def _carry_out(self, plan: Plan, stream: Stream, contributor: Contributor) -> Mean:
        """Freeze, average, and hear the verdict. Raises RoundAbandonedError if it came to nothing."""
        time_s = asyncio.get_running_loop().time
        began_s, duplicate = time_s(), False
        alive = asyncio.create_task(_say_alive(stream))
        averaging: asyncio.Task[RoundResult | None] | None = None
        try:
            mine = await contributor.freeze()
            log.debug("step %d: averaging with %d members", plan.step, len(plan.members))
            averaging = asyncio.create_task(self._average(plan, stream, mine))
            averaging.add_done_callback(functools.partial(_abort_if_failed, stream))
            verdict = await self._verdict(plan, stream, averaging)
            result = averaging.result() if averaging.done() else None
            duplicate = verdict is not None and verdict.duplicate
            ids = None if result is None else await self._committed(plan, verdict)
            if result is None or ids is None:
                raise RoundAbandonedError(f"its plan of {len(plan.members)} members was abandoned")
            return Mean(plan, result.mean, ids, result.sent_bytes, time_s() - began_s)
        except BaseException:
            contributor.abandoned(duplicate=duplicate)
            raise
        finally:
            alive.cancel()
            if averaging is not None:
                averaging.cancel()

    async def _committed(self, plan: Plan, verdict: pb.Verdict | None) -> tuple[bytes, ...] | None:
        """The ids in the mean if all members commit to `plan`, this one with them; else None."""
        if verdict is None:
            return await self._committed_elsewhere(plan)
        ids = tuple(verdict.ids)
        return ids if verdict.commit and self.coordinator.commit(plan.key, ids) else None

    async def _average(self, plan: Plan, stream: Stream, mine: Contribution) -> RoundResult | None:
        """The mean, or None if a member was lost; the coordinator is told which."""
        try:
            result = await moshpit.average(
                plan,
                self._network.peer_id,
                vector=mine.vector,
                weight=min(self._rules.max_weight, mine.weight),
                all_reduce=self._all_reduce,
            )
        except RoundAbandonedError as error:
            log.info("step %d: %s", plan.step, error)
            self.coordinator.abandon(plan.key)
            result = None
        done = pb.StepDone(ok=result is not None, ids=mine.ids)
        with contextlib.suppress(LinkError):  # whoever waits for the verdict notices
            await stream.send(pb.FromMember(done=done).SerializeToString())
        return result

    async def _verdict(
        self, plan: Plan, stream: Stream, averaging: "asyncio.Task[RoundResult | None]"
    ) -> pb.Verdict | None:
        """What becomes of the plan; None if the coordinator vanished before it said so."""
        end_s = asyncio.get_running_loop().time() + 2 * self._rules.round_s
        try:
            while asyncio.get_running_loop().time() < end_s:
                answer = await self._hear(stream)
                if answer.WhichOneof("content") == "verdict":
                    return answer.verdict
            raise LinkError(stream.remote, "speaks no verdict")
        except LinkError as error:
            log.info("step %d: coordinator %s before its verdict", plan.step, error)
        await asyncio.wait([averaging], timeout=self._rules.round_s)  # the others may have committed by then
        return None

    async def _committed_elsewhere(self, plan: Plan) -> tuple[bytes, ...] | None:
        """The coordinator is gone: has any member committed? If none has, none will any more.

        Members that do not answer leave a doubt, which later reports of the others will settle.
        """
        self.coordinator.abandon(plan.key)
        silent = [m.peer for m in plan.members if m.peer != self._network.peer_id]
        for _ in range(VERDICT_TRIES):
            answers = await asyncio.gather(*(self._ask(peer, plan) for peer in silent))
            for answer in answers:
                if isinstance(answer, pb.StepInfo) and answer.committed:
                    self.coordinator.learn_committed(plan.key, tuple(answer.ids))
                    return tuple(answer.ids)
            silent = [answer for answer in answers if isinstance(answer, str)]
            if not silent:
                return None
            await asyncio.sleep(VERDICT_PAUSE_S)
        return None

    async def _ask(self, peer: PeerId, plan: Plan) -> pb.StepInfo | PeerId | None:
        """What `peer` knows of the plan; None if it is dead, its name if it does not answer."""
        try:
            return await self.coordinator.query(peer, pb.StepQuery(plan=plan.key))
        except LinkError as error:
            return None if error.refused else peer


async def _finish(stream: Stream) -> None:
    try:
        await stream.finish()
    except LinkError:
        stream.abort()


def _abort_if_failed(stream: Stream, task: "asyncio.Task[RoundResult | None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        stream.abort()  # a bug: nobody is to wait for it


async def _report(stream: Stream, step: int, contributor: Contributor) -> None:
    while True:
        contributor.changed.clear()
        report = pb.StepReport(step=step, weight=contributor.weight, state_hash=contributor.state_hash)
        try:
            await stream.send(pb.FromMember(report=report).SerializeToString())
        except LinkError:
            return  # the receiving side notices, too
        await contributor.changed.wait()


async def _say_alive(stream: Stream) -> None:
    alive = pb.FromMember(alive=True).SerializeToString()
    try:
        while True:
            await stream.send(alive)
            await asyncio.sleep(ALIVE_S)
    except LinkError:
        return  # whoever waits for the verdict notices
