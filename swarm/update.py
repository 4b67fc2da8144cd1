"""A member's side of a step: accumulate -> plan -> average -> step, over and over.

    report the accumulated tokens to the step's coordinator whenever they change
    on the plan: freeze the accumulated gradient (a new one starts behind it)
    average it with the plan's members; tell the coordinator whether the whole mean is here
    on the verdict: apply the mean as one optimizer step, or keep the gradient and begin anew: what was
    lost with a member is computed again, so that every step has its whole target

With delayed updates hops go on all the while; otherwise they wait from the freeze to the step. A
coordinator that does not answer is passed over: the next one in the order takes its place. If it
vanishes between plan and verdict, the members ask each other: if any has committed, all do; a member
that says no promises never to.

I/O: one event loop; torch in `Compute`. Design section 6.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from averaging import moshpit
from averaging.allreduce import ButterflyAllReduce
from averaging.codecs import CODECS
from averaging.errors import AveragingError, LinkError, RoundAbandonedError
from averaging.network import Network, PeerId, Stream
from averaging.plan import Member, Plan, check_plan, coordinator_order
from swarm import swarm_pb2 as pb
from swarm.compute import Compute, Priority
from swarm.config import RunConfig
from swarm.coordinator import ALIVE_S, MOST_TARGETS, REMEMBERED_PLANS, STEP_SERVICE, Coordinator
from swarm.history import REMEMBERED_STEPS
from swarm.server import HopServer
from swarm.stage import Accumulator, Stage

MAX_MEMBERS = 4096
VERDICT_TRIES, VERDICT_PAUSE_S = 4, 0.25
log = logging.getLogger(__name__)


class BehindError(AveragingError):
    """The stage has gone on without this peer, or holds another state: fetch it."""


class MovedError(AveragingError):
    """Another peer coordinates this step."""

    def __init__(self, coordinator: PeerId) -> None:
        super().__init__(f"moved to {coordinator[-8:]}")
        self.coordinator = coordinator


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """One applied step."""

    version: int
    members: tuple[PeerId, ...]
    tokens: float
    averaging_s: float
    sent_bytes: int
    state_hash: bytes
    hash_before: bytes


class Updater:
    """Takes part in every step of this peer's stage."""

    def __init__(
        self,
        *,
        network: Network,
        stage: Stage,
        compute: Compute,
        server: HopServer,
        config: RunConfig,
        run: str,
        roster: Callable[[], Collection[PeerId]],
        refresh_roster: Callable[[], Awaitable[None]],
        refetch: Callable[[], Awaitable[bool]],
        on_step: Callable[[AppliedStep], None] = lambda done: None,
    ) -> None:
        """`roster` are the live peers of the stage without this one, as of the last `refresh_roster`;
        `refetch` loads a donor's state, if there is one."""
        self._network, self._stage, self._compute, self._server = network, stage, compute, server
        self._config, self._run, self._roster = config, run, roster
        self._refresh_roster, self._refetch, self._on_step = refresh_roster, refetch, on_step
        self._deadline_s = config.averaging.progress_deadline_s
        self._all_reduce = ButterflyAllReduce(
            network,
            codec=CODECS[config.averaging.codec],
            progress_s=self._deadline_s,
            max_weight=MOST_TARGETS * config.training.target_batch_tokens,
        )
        self._dead_s: dict[PeerId, float] = {}  # when their dials were refused
        self._unreachable_s: dict[PeerId, float] = {}  # when they last did not answer
        self._reporting_to: PeerId = ""
        self._seen_plans: deque[bytes] = deque(maxlen=REMEMBERED_PLANS)
        self._contributed: dict[int, tuple[bytes, ...]] = {}  # step -> microbatches this peer put into it
        self.state_hash = b""
        self._news = asyncio.Event()
        self.counters: Counter[str] = Counter()
        self.coordinator = Coordinator(
            network=network,
            config=config,
            version=lambda: stage.version,
            expected=self._live,
            reporting_to=lambda: self._reporting_to,
            suspect=self._suspect,
            refresh=refresh_roster,
        )
        server.on_progress = self._news.set

    async def start(self) -> None:
        """Answer reports, queries and rounds of averaging from now on."""
        await self._all_reduce.start()
        await self.coordinator.start()

    async def run(self) -> None:
        """Close one step after the other, for ever."""
        self.state_hash = await self._in_compute(self._stage.hash)
        moved_to: PeerId | None = None
        while True:
            coordinator = moved_to or self._next_coordinator()
            moved_to = None
            try:
                await self._step_with(coordinator)
            except MovedError as moved:
                moved_to = moved.coordinator
            except BehindError as error:
                log.info("step %d: %s", self._stage.version, error)
                await self._catch_up()
            except LinkError as error:
                log.info("step %d: coordinator %s", self._stage.version, error)
                self._suspect(error)
            except AveragingError as error:
                log.info("step %d: %s", self._stage.version, error)

    # who

    def _live(self) -> list[PeerId]:
        """The peers of the stage that are not known to be dead, this one included."""
        recent_s = asyncio.get_running_loop().time() - self._config.network.expire_s
        self._dead_s = {p: at for p, at in self._dead_s.items() if at > recent_s}
        return [*(p for p in self._roster() if p not in self._dead_s), self._network.peer_id]

    def _suspect(self, error: LinkError) -> None:
        """A dial failed: its peer is dead, or cannot be reached from here for now."""
        if error.peer != self._network.peer_id:
            suspected = self._dead_s if error.refused else self._unreachable_s
            suspected[error.peer] = asyncio.get_running_loop().time()

    def _next_coordinator(self) -> PeerId:
        recent_s = asyncio.get_running_loop().time() - self._deadline_s
        self._unreachable_s = {p: at for p, at in self._unreachable_s.items() if at > recent_s}
        reachable = [peer for peer in self._live() if peer not in self._unreachable_s]
        step = self._stage.version
        return coordinator_order(reachable, run=self._run, stage=self._stage.stage, step=step)[0]

    # one step

    async def _step_with(self, coordinator: PeerId) -> None:
        step = self._stage.version
        await self._give_up_unusable()
        stream = await self._network.open(coordinator, STEP_SERVICE)
        self._reporting_to = coordinator
        try:
            plan = await self._report_until_plan(stream, step, coordinator)
            await self._carry_out(plan, stream)
            await stream.finish()
        except BaseException:
            stream.abort()
            raise
        finally:
            self._reporting_to = ""

    async def _report_until_plan(self, stream: Stream, step: int, coordinator: PeerId) -> Plan:
        reporting = asyncio.create_task(self._report(stream, step))
        try:
            while True:
                answer = await self._hear(stream)
                match answer.WhichOneof("content"):
                    case "plan":
                        return await self._checked(answer.plan, step, coordinator)
                    case "behind":
                        raise BehindError(f"the stage is at version {answer.behind}")
                    case "drifted":
                        raise BehindError("the majority holds another state")
                    case "moved" if answer.moved in self._live():
                        raise MovedError(answer.moved)
        finally:
            reporting.cancel()

    async def _report(self, stream: Stream, step: int) -> None:
        while True:
            self._news.clear()
            report = pb.StepReport(step=step, weight=self._weight(), state_hash=self.state_hash)
            try:
                await stream.send(pb.FromMember(report=report).SerializeToString())
            except LinkError:
                return  # the receiving side notices, too
            await self._news.wait()

    def _weight(self) -> float:
        """Tokens this peer has for the step that closes."""
        most = MOST_TARGETS * self._config.training.target_batch_tokens
        return min(most, float(sum(held.tokens for held in self._stage.sums)))

    async def _hear(self, stream: Stream) -> pb.FromCoordinator:
        try:
            async with asyncio.timeout(self._deadline_s):
                frame = await stream.receive()
        except TimeoutError:
            raise LinkError(stream.remote, f"silent for {self._deadline_s:.1f} s") from None
        if frame is None:
            raise LinkError(stream.remote, "closed the step stream")
        try:
            return pb.FromCoordinator.FromString(frame.header)
        except DecodeError:
            raise LinkError(stream.remote, "malformed message of a coordinator") from None

    async def _checked(self, message: pb.StepPlan, step: int, coordinator: PeerId) -> Plan:
        members = tuple(Member(m.peer, m.weight) for m in message.members[: MAX_MEMBERS + 1])
        group_size = self._config.averaging.group_size
        plan = Plan(bytes(message.key), message.step, coordinator, members, group_size)
        me_and_coordinator = {self._network.peer_id, coordinator}
        if any(member.peer not in {*self._roster(), *me_and_coordinator} for member in members):
            await self._refresh_roster()  # a newcomer that announced itself a moment ago
        roster = {*self._roster(), *me_and_coordinator}
        wrong = check_plan(plan, me=self._network.peer_id, step=step, my_weight=self._weight(), roster=roster)
        if wrong is None and (len(plan.key) != 16 or len(members) > MAX_MEMBERS):
            wrong = "it is malformed"
        if wrong is None and plan.key in self._seen_plans:
            wrong = "its key has been used"
        if wrong is not None:
            raise LinkError(coordinator, f"its plan is refused: {wrong}")
        self._seen_plans.append(plan.key)
        return plan

    async def _carry_out(self, plan: Plan, stream: Stream) -> None:
        """Freeze, average, and apply or take back, as the verdict says."""
        training = self._config.training
        if not training.delayed_updates:
            self._compute.hold(True)
        try:
            frozen = await self._in_compute(self._stage.freeze)
            if not self._server.may_count(frozen):
                raise RoundAbandonedError("gradients in it are with other peers or in a step")
            log.debug("step %d: averaging with %d members", plan.step, len(plan.members))
            began_s = asyncio.get_running_loop().time()
            result = await self._average(plan, frozen, stream)
            done = pb.StepDone(ok=result is not None, microbatches=frozen.microbatches)
            microbatches = await self._verdict(plan, stream, done)
            if microbatches is None:
                self.counters["abandoned_plans"] += 1
                raise RoundAbandonedError(f"its plan of {len(plan.members)} members was abandoned")
            assert result is not None
            self._contributed[plan.step] = tuple(frozen.microbatches)
            self._contributed.pop(plan.step - REMEMBERED_STEPS, None)
            averaging_s = asyncio.get_running_loop().time() - began_s
            hash_before = self.state_hash
            self.state_hash = await self._in_compute(lambda: self._apply(result.mean, microbatches))
        finally:
            self._compute.hold(False)
        self.counters["averaging_bytes"] += result.sent_bytes
        self._applied(plan, microbatches, averaging_s, result.sent_bytes, hash_before)

    def _apply(self, mean: torch.Tensor, microbatches: Collection[bytes]) -> bytes:
        self._stage.apply(mean, microbatches)
        return self._stage.hash()

    def _applied(
        self,
        plan: Plan,
        microbatches: Collection[bytes],
        averaging_s: float,
        sent_bytes: int,
        hash_before: bytes,
    ) -> None:
        version, members = self._stage.version, tuple(m.peer for m in plan.members)
        self.coordinator.step_closed(version)
        self._say_steps([pb.Stepped(version=version, microbatches=microbatches)])
        self._server.announced_version = version
        self._server.forget_released(microbatches)
        self._server.resume_held()
        log.debug("applied step %d with %d members, state %s", plan.step, len(members), self.state_hash.hex())
        done = AppliedStep(
            version, members, plan.weight, averaging_s, sent_bytes, self.state_hash, hash_before
        )
        self._on_step(done)

    async def _average(self, plan: Plan, frozen: Accumulator, stream: Stream) -> moshpit.RoundResult | None:
        """The mean, or None if a member was lost; tells the coordinator meanwhile that this peer lives."""
        alive = asyncio.create_task(self._say_alive(stream))
        try:
            vector = await self._in_compute(lambda: self._stage.mean(frozen))
            return await moshpit.average(
                plan,
                self._network.peer_id,
                vector=vector,
                weight=min(MOST_TARGETS * self._config.training.target_batch_tokens, float(frozen.tokens)),
                all_reduce=self._all_reduce,
            )
        except RoundAbandonedError as error:
            log.info("step %d: %s", plan.step, error)
            return None
        finally:
            alive.cancel()

    @staticmethod
    async def _say_alive(stream: Stream) -> None:
        alive = pb.FromMember(alive=True).SerializeToString()
        try:
            while True:
                await stream.send(alive)
                await asyncio.sleep(ALIVE_S)
        except LinkError:
            return  # whoever waits for the verdict notices

    async def _verdict(self, plan: Plan, stream: Stream, done: pb.StepDone) -> tuple[bytes, ...] | None:
        """Report whether the mean is here, and learn what becomes of the plan.

        Returns the microbatches in the mean if the plan is committed, else None.
        """
        try:
            if not done.ok:
                self.coordinator.abandon(plan.key)
            await stream.send(pb.FromMember(done=done).SerializeToString())
            end_s = asyncio.get_running_loop().time() + self._config.averaging.round_deadline_s
            while True:
                answer = await self._hear(stream)
                if asyncio.get_running_loop().time() > end_s:
                    raise LinkError(stream.remote, "speaks no verdict")
                if answer.WhichOneof("content") == "verdict":
                    if answer.verdict.duplicate:
                        self._server.orphans.update(done.microbatches)
                    microbatches = tuple(answer.verdict.microbatches)
                    commit = answer.verdict.commit and done.ok
                    return (
                        microbatches if commit and self.coordinator.commit(plan.key, microbatches) else None
                    )
        except LinkError as error:
            log.info("step %d: coordinator %s before its verdict", plan.step, error)
        return await self._committed_elsewhere(plan) if done.ok else None

    async def _committed_elsewhere(self, plan: Plan) -> tuple[bytes, ...] | None:
        """The coordinator is gone: has any member committed? If none has, none will any more.

        Members that do not answer leave a doubt, which the history of the stage will answer.
        """
        self.coordinator.abandon(plan.key)
        silent = [m.peer for m in plan.members if m.peer != self._network.peer_id]
        for _ in range(VERDICT_TRIES):
            answers = await asyncio.gather(*(self._ask(peer, plan) for peer in silent))
            for answer in answers:
                if isinstance(answer, pb.StepInfo) and answer.committed:
                    self.coordinator.learn_committed(plan.key, tuple(answer.microbatches))
                    return tuple(answer.microbatches)
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

    async def _catch_up(self) -> None:
        """Load a donor's state; gradients for earlier versions stay, unless they are in it or too old."""
        before = self._stage.version
        if not await self._refetch():
            return
        stale = self._stage.version - before > self._config.training.max_staleness
        for held in self._stage.sums:
            if stale or not self._server.may_count(held):
                self.counters["too_stale"] += stale * len(held.microbatches)
                await self._give_up(held)
        await self._in_compute(self._stage.thaw)
        self._server.moved_to_step(self._stage.accumulator)
        self._server.lost_gradients(self._overwritten())
        self._server.forget_released(self._stage.history)
        self.state_hash = await self._in_compute(self._stage.hash)
        self.coordinator.step_closed(self._stage.version)
        self._server.announced_version = self._stage.version
        self._say_steps(self._server.told_history())
        self._server.resume_held()

    def _overwritten(self) -> list[bytes]:
        """Microbatches that this peer has put into steps which the state it loaded never took."""
        history = self._stage.history
        oldest = min(history.steps, default=0)
        recent = [m for step, inside in self._contributed.items() if step >= oldest for m in inside]
        self._contributed.clear()
        return [microbatch for microbatch in recent if microbatch not in history]

    def _say_steps(self, told: Iterable[pb.Stepped]) -> None:
        for stepped in told:
            self._server.watchers.say_all(pb.WatchFrame(stepped=stepped).SerializeToString())

    async def _give_up_unusable(self) -> None:
        """Throw away sums with gradients that other peers have been given, or that are in a step already.

        A sum cannot be taken apart, so all of it goes, and the trainers that are still here are told.
        """
        for held in [s for s in self._stage.sums if not self._server.may_count(s)]:
            await self._give_up(held)

    async def _give_up(self, held: Accumulator) -> None:
        self.counters["orphaned"] += len(held.microbatches)
        await self._in_compute(lambda: self._stage.discard(held))
        self._server.lost_gradients(held.microbatches)
        self._server.orphans.difference_update(held.microbatches)

    async def _in_compute(self, work: Callable[[], object]):  # type: ignore[no-untyped-def]
        return await asyncio.wrap_future(self._compute.submit(Priority.STEP, work))
