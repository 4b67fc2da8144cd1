"""Serve hops: admit what arrives, compute, push on, and report to the trainer that wired it.

    push      a tensor for one hop        -> ACCEPTED, DUPLICATE, BUSY, STALE, CLOSED or REJECTED
    resend    send a retained tensor to another peer, now or as soon as it exists
    cancel    withdraw microbatches; names those whose gradient was already accumulated
    release   forget microbatches that are done

Forward: compute, push to the next peer, report FORWARDED when it has accepted. The last stage computes
loss and gradients at once. Backward: compute, accumulate, report BACKWARDED, push to the peer before. A
duplicate push changes nothing but the route; a gradient is accumulated once, whatever arrives.

An error is one microbatch's: a tensor that is malformed or not finite is refused at the door and counted
against its sender; a computation that runs out of memory drops its microbatch and admits fewer.

I/O: one event loop; computation in `Compute`. Design section 4.
"""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from averaging.codecs import CODECS
from averaging.errors import LinkError
from averaging.network import Buffer, Calls, Frame, Network, PeerId, Stream, answer
from swarm import swarm_pb2 as pb
from swarm.compute import Compute, Priority
from swarm.config import RunConfig
from swarm.errors import RejectedError
from swarm.jobs import HopJobs, NotFiniteError, WithdrawnError, decode, is_out_of_memory
from swarm.mailbox import Hop, Mailbox, Phase
from swarm.messages import (
    Push,
    Route,
    nobodys,
    pack_event,
    parse_hop_request,
    parse_push,
    parse_reply,
    parse_route,
    reply,
)
from swarm.scope import at_stage
from swarm.stage import Accumulator, Stage
from swarm.watch import Session, Watchers

SERVICE = "hop"  # of every stage
EVERY_ATTEMPT = 2**32 - 1
IDLE_LOOK_S = 0.02
MAX_CANCELLED = 256  # microbatches in one request
log = logging.getLogger(__name__)


def max_payload_bytes(config: RunConfig) -> int:
    """The largest tensor that travels between stages, in the widest codec."""
    return 4 * config.training.microbatch_tokens * config.model.width


class HopServer:
    """The hops of one peer at one stage."""

    def __init__(
        self,
        *,
        network: Network,
        stage: Stage,
        compute: Compute,
        config: RunConfig,
        clock: Callable[[], float],
    ) -> None:
        """`network` is everybody's, not only the stage's: tensors go to its neighbours."""
        self._network, self._stage = at_stage(network, stage.stage), stage
        self._compute, self._config = compute, config
        per_step = -(-config.training.target_batch_tokens // config.training.microbatch_tokens)
        self.mailbox = Mailbox(
            capacity=config.pipeline.queue, retained=8 * config.pipeline.queue + 4 * per_step
        )
        self.watchers = Watchers(
            self._network,
            config.network,
            clock=clock,
            status=lambda: (compute.queued, self.announced_version),
            history=self.told_history,
            on_end=self._forget_session,
        )
        self._codec = CODECS[config.pipeline.codec]
        deadline_s = config.averaging.progress_deadline_s
        before, after = (at_stage(network, stage.stage + way) for way in (-1, 1))
        self._calls_before = Calls(before, SERVICE, deadline_s=deadline_s)
        self._calls_after = Calls(after, SERVICE, deadline_s=deadline_s)
        self._pushes: dict[asyncio.Task[None], None] = {}
        self.counters: Counter[str] = Counter()  # cumulative, by metric name
        self._jobs = HopJobs(stage, config, self.counters, may_accumulate=self._may_accumulate)
        self.rejections: Counter[PeerId] = Counter()  # by sender
        self.draining = False
        self.announced_version = 0  # the version that trainers have been told of, after what led to it
        self.orphans: set[bytes] = set()  # accumulated here, but their trainer may have re-issued them
        self._taken: dict[bytes, Route] = {}  # accumulated by stage mates that left, and in a sum here now
        self.on_progress: Callable[[], None] = lambda: None  # called when there is more to report

    async def be_watched(self) -> None:
        """Answer watch streams from now on: no work comes before `start`."""
        await self.watchers.start()

    async def start(self) -> None:
        """Take hops from now on."""

        async def serve(stream: Stream) -> None:
            await answer(stream, self._respond)

        await self._network.serve(SERVICE, serve, max_payload_bytes=max_payload_bytes(self._config))
        self.watchers.ready()

    async def say_goodbye(self) -> None:
        """End every watch stream with its explicit last frame: this peer leaves on purpose."""
        await self.watchers.say_goodbye()

    def close(self) -> None:
        """Answer nobody any more."""
        self._network.unserve(SERVICE)
        self.watchers.close()
        for task in list(self._pushes):
            task.cancel()
        self._calls_before.close()
        self._calls_after.close()

    # requests

    async def _respond(self, sender: PeerId, frame: Frame) -> tuple[bytes, Buffer]:
        try:
            request = parse_hop_request(sender, frame.header)
            kind = request.WhichOneof("request")
            if kind == "push":
                status = self._admit(sender, request.push, frame.payload)
                return reply(status), b""
            if kind == "resend":
                return reply(self._resend(sender, request.resend)), b""
            if kind == "cancel":
                return await self._cancel(sender, request.cancel), b""
            if kind == "release":
                for microbatch in request.release.ids:
                    self._release(sender, request.release.session, microbatch)
            return reply(pb.ACCEPTED), b""
        except RejectedError as error:
            self.rejections[error.sender] += 1
            self.counters["rejected"] += 1
            log.warning("rejected %s", error)
            return reply(pb.REJECTED, error.what), b""

    def _admit(self, sender: PeerId, message: pb.Push, payload: Buffer) -> int:
        """Take one tensor in, or say why not. Raises RejectedError."""
        push = parse_push(sender, message, vocabulary=self._config.model.vocabulary)
        self._check_place(sender, push)
        route = push.route
        if self.watchers.session(route.trainer, route.session) is None:
            return pb.STALE
        hop = self.mailbox.get(route.microbatch)
        if hop is not None:
            if hop.push.route.trainer != route.trainer or hop.push.tokens != push.tokens:
                raise RejectedError(sender, "two microbatches with one id")
            self.mailbox.adopt(hop, route)
            if self._must_count_after_all(hop):
                self.mailbox.forget(route.microbatch)
                hop = None
        if hop is not None:
            if hop.phase is Phase.ACCUMULATED or self._has(hop, push):
                self.counters["duplicates"] += 1
                return pb.DUPLICATE
        elif self.mailbox.is_buried(route):
            return pb.STALE
        elif self._is_closed(route):
            return pb.CLOSED
        elif self.mailbox.is_full or self.draining:
            return pb.BUSY
        tensor = decode(sender, push, payload)
        if hop is None:
            hop = self.mailbox.add(push)
        if route.attempt and not push.backward:
            self._report(hop, pb.ARRIVED)
        if push.backward:
            hop.grad = tensor
            self.counters["gradient_bytes"] += len(payload)
        else:
            hop.x, hop.input, hop.input_push = tensor, payload, push
            self.counters["activation_bytes"] += len(payload)
        self._advance(hop)
        return pb.ACCEPTED

    def _check_place(self, sender: PeerId, push: Push) -> None:
        me, stage = self._network.peer_id, self._stage
        if push.stage != stage.stage or push.route.peers[push.stage] != me:
            raise RejectedError(sender, f"a hop of stage {push.stage}, this peer serves {stage.stage}")
        if len(push.route.peers) != self._config.model.stages:
            raise RejectedError(sender, f"a route through {len(push.route.peers)} stages")
        training = self._config.training
        if push.sequences > training.microbatch_sequences or push.token_count > training.microbatch_tokens:
            raise RejectedError(sender, f"a microbatch of {push.sequences} sequences")
        length = push.token_count // push.sequences
        expected = () if stage.is_first and not push.backward else (
            push.sequences, length, self._config.model.width
        )  # fmt: skip
        if push.shape != expected or (push.backward and stage.is_last):
            raise RejectedError(sender, f"a tensor of shape {push.shape} instead of {expected}")

    def _must_count_after_all(self, hop: Hop) -> bool:
        """It was computed here to supply neighbours; now its gradient is found missing from its step."""
        supplied = hop.phase is Phase.ACCUMULATED and not hop.counted
        return supplied and self._stage.stage not in hop.route.accumulated

    @staticmethod
    def _has(hop: Hop, push: Push) -> bool:
        if push.backward:
            return hop.grad is not None or hop.phase is Phase.RETURNING
        return hop.input is not None

    def _is_closed(self, route: Route) -> bool:
        """Strict mode: its step has been applied, and it is not here just to supply its neighbours again."""
        if not self._config.training.strict or route.evaluate or route.step >= self._stage.version:
            return False
        return not (self._stage.stage in route.accumulated and self._stage.can_compute(route.step))

    def _resend(self, sender: PeerId, message: pb.Resend) -> int:
        route = parse_route(sender, message.route)
        hop = self._of(sender, route.session, route.microbatch)
        if hop is None or hop.released:
            return pb.UNKNOWN
        self.mailbox.adopt(hop, route)
        backward = message.direction == pb.BACKWARD
        if (hop.gradient if backward else hop.output) is not None:
            self._push_soon(hop, backward=backward)
        return pb.ACCEPTED

    async def _cancel(self, sender: PeerId, message: pb.Microbatches) -> bytes:
        answer = pb.HopReply(status=pb.ACCEPTED)
        attempts = dict(zip(message.ids, message.attempts, strict=False))
        if len(message.ids) > MAX_CANCELLED:
            raise RejectedError(sender, f"cancels {len(message.ids)} microbatches at once")
        for microbatch in message.ids:
            hop = self._of(sender, message.session, microbatch)
            withdrawn = hop is not None and hop.job is not None and hop.job.cancel()
            if hop is not None and hop.job is not None and not withdrawn:
                await asyncio.gather(asyncio.wrap_future(hop.job), return_exceptions=True)
                await asyncio.sleep(0)  # let the job's own continuation record what it did
            held = self._stage.holds(microbatch)
            is_orphan = microbatch in self.orphans  # then the whole sum will be given up
            if held is not None and not is_orphan and self._route_of(microbatch) is not None:
                loss = 0.0 if hop is None else hop.loss
                answer.accumulated.add(microbatch=microbatch, step=held.step, loss=loss)
                if withdrawn:  # it was to supply its neighbours: they will ask again
                    self.mailbox.forget(microbatch)
            else:
                self._drop_if_of(sender, message.session, microbatch, attempts.get(microbatch))
        return answer.SerializeToString()

    def _of(self, sender: PeerId, session: bytes, microbatch: bytes) -> Hop | None:
        hop = self.mailbox.get(microbatch)
        if hop is None or hop.route.trainer != sender or hop.route.session != session:
            return None
        return hop

    def _release(self, sender: PeerId, session: bytes, microbatch: bytes) -> None:
        hop = self._of(sender, session, microbatch)
        if hop is not None and hop.counted and microbatch not in self._stage.history:
            self.mailbox.release(hop)
        else:
            self._drop_if_of(sender, session, microbatch, EVERY_ATTEMPT)

    def forget_released(self, microbatches: Iterable[bytes]) -> None:
        """These are in a step now: nothing of the released ones among them is needed any more."""
        for microbatch in microbatches:
            self._taken.pop(microbatch, None)
            hop = self.mailbox.get(microbatch)
            if hop is not None and hop.released:
                self._drop(microbatch, EVERY_ATTEMPT)

    def _drop_if_of(self, sender: PeerId, session: bytes, microbatch: bytes, attempt: int | None) -> None:
        hop = self.mailbox.get(microbatch)
        if hop is None or (hop.route.trainer == sender and hop.route.session == session):
            self._drop(microbatch, attempt)

    def _drop(self, microbatch: bytes, attempt: int | None = None) -> None:
        hop = self.mailbox.get(microbatch)
        if hop is not None:
            if hop.job is not None:
                hop.job.cancel()
            self._jobs.drop_graph(hop)
        self.mailbox.drop(microbatch, attempt)

    def _forget_session(self, session: Session) -> None:
        for hop in self.mailbox.of_session(session.trainer, session.key):
            self._drop(hop.route.microbatch)
            if not session.goodbye:
                if hop.job is None:
                    self._note_orphan(hop)
                else:  # done in the compute thread before the next job of a step can begin
                    hop.job.add_done_callback(functools.partial(self._note_orphan, hop))

        for microbatch, route in list(self._taken.items()):
            if (route.trainer, route.session) == (session.trainer, session.key):
                del self._taken[microbatch]
                if not session.goodbye:
                    self.orphans.add(microbatch)

    def _may_accumulate(self, hop: Hop) -> bool:
        return self._is_live(hop.route)

    def _is_live(self, route: Route) -> bool:
        return self.watchers.may_accumulate(route.trainer, route.session)

    def _route_of(self, microbatch: bytes) -> Route | None:
        """Of what is accumulated here."""
        hop = self.mailbox.get(microbatch)
        return self._taken.get(microbatch) if hop is None else hop.route

    def _note_orphan(self, hop: Hop, job: object = None) -> None:
        if hop.counted:
            self.orphans.add(hop.route.microbatch)

    def may_count(self, accumulator: Accumulator) -> bool:
        """May this sum go into a step?

        Not with gradients that their trainer, unheard for a lease, has given to others, and not with such
        as are in a step already.
        """
        routes = (self._route_of(microbatch) for microbatch in accumulator.microbatches)
        return (
            self.orphans.isdisjoint(accumulator.microbatches)
            and not self._stage.history.touches(accumulator.microbatches)
            and all(route is None or self._is_live(route) for route in routes)
        )

    def told_history(self) -> list[pb.Stepped]:
        """What a trainer that begins to watch is told: all that this state's last steps contain."""
        steps = sorted(self._stage.history.steps.items())
        told = [
            pb.Stepped(version=step + 1, microbatches=sorted(inside))
            for step, inside in steps
            if step < self.announced_version
        ] or [pb.Stepped(version=self.announced_version)]
        told[0].whole = True
        return told

    def moved_to_step(self, accumulator: Accumulator) -> None:
        """Tell the trainers that what was accumulated for an earlier step counts in this one."""
        for microbatch in accumulator.microbatches:
            hop, route = self.mailbox.get(microbatch), self._route_of(microbatch)
            if hop is not None:
                hop.step = accumulator.step
            if route is not None:
                loss = 0.0 if hop is None else hop.loss
                self._say(route, pb.BACKWARDED, step=accumulator.step, loss=loss)

    def lost_gradients(self, microbatches: Iterable[bytes]) -> None:
        """Tell the trainers that what was accumulated is gone: it is to be computed again."""
        for microbatch in microbatches:
            if (route := self._route_of(microbatch)) is not None:
                self._say(route, pb.DROPPED, reason="its accumulated gradient was given up")
                self._taken.pop(microbatch, None)
                self._drop(microbatch)

    # leaving

    async def idle(self) -> None:
        """Wait until what is under way here is accumulated and sent on."""
        while self._pushes or any(  # noqa: ASYNC110 - for seconds, once in a peer's life
            not (hop.phase is Phase.WAITING or hop.is_done or hop.route.evaluate) for hop in self.mailbox
        ):
            await asyncio.sleep(IDLE_LOOK_S)

    def routes_of(self, held: Accumulator) -> list[Route]:
        """Whose gradients these are; without a trainer if nobody asks for one any more."""
        return [self._route_of(microbatch) or nobodys(microbatch) for microbatch in held.microbatches]

    def handed_over(self, routes: Iterable[Route], to: PeerId, step: int) -> None:
        """Tell the trainers who has the gradients now."""
        for route in routes:
            self.counters["handed_over"] += 1
            self._say(route, pb.HANDED_OVER, target=to, step=step)

    def has_room_for(self, routes: Iterable[Route]) -> bool:
        """May gradients of these microbatches be taken over: are their trainers heard?"""
        return not self.draining and all(self._is_live(route) for route in routes if route.trainer)

    def taken_over(self, routes: Iterable[Route]) -> None:
        """Gradients of a stage mate that leaves are in a sum here now."""
        for route in routes:
            self.counters["taken_over"] += 1
            if route.trainer:
                self._taken[route.microbatch] = route
        self.on_progress()

    # one hop

    def _advance(self, hop: Hop) -> None:
        """Queue whatever this hop can do next."""
        if self._config.training.strict and not hop.route.evaluate and hop.route.step > self._stage.version:
            return  # `resume_held` comes back to it
        if hop.phase is Phase.WAITING and hop.x is not None:
            hop.phase = Phase.QUEUED
            self._spawn(self._forward(hop))
        elif hop.phase is Phase.FORWARDED and hop.grad is not None:
            hop.phase = Phase.RETURNING
            self._spawn(self._backward(hop))

    def resume_held(self) -> None:
        """Strict mode: a step was applied; begin what waited for it, drop what it already contains."""
        for hop in self.mailbox:
            if self._is_closed(hop.route) and hop.phase is not Phase.ACCUMULATED:
                self._report(hop, pb.DROPPED, status=pb.CLOSED, reason="its step has been applied")
                self._drop(hop.route.microbatch)
            else:
                self._advance(hop)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._pushes[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._pushes.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "serving a hop failed: a bug, not the network's doing", "exception": error}
            )

    async def _forward(self, hop: Hop) -> None:
        last = self._stage.is_last
        if last and not hop.route.evaluate:
            if await self._compute_hop(hop, Priority.BACKWARD, lambda: self._jobs.loss(hop)):
                await self._accumulated(hop)
            return
        priority = Priority.EVALUATE if hop.route.evaluate else Priority.FORWARD
        if not await self._compute_hop(hop, priority, lambda: self._jobs.forward(hop)):
            return
        hop.phase = Phase.FORWARDED
        if last:
            self._report(hop, pb.EVALUATED, loss=hop.loss)
        elif self._stage.stage < hop.route.forward_until:
            await self._push(hop, backward=False)
        else:
            self._report(hop, pb.FORWARDED)
        if self.mailbox.get(hop.route.microbatch) is hop:
            self._advance(hop)

    async def _backward(self, hop: Hop) -> None:
        if await self._compute_hop(hop, Priority.BACKWARD, lambda: self._jobs.backward(hop)):
            await self._accumulated(hop)

    async def _accumulated(self, hop: Hop) -> None:
        hop.phase = Phase.ACCUMULATED
        self._jobs.drop_graph(hop)
        hop.x = hop.grad = hop.input = None
        self.counters["microbatches"] += 1
        self.counters["tokens"] += hop.push.token_count
        self.on_progress()
        if hop.counted:
            self._report(hop, pb.BACKWARDED, step=hop.step, loss=hop.loss)
        if hop.gradient is not None and self._stage.stage > hop.route.backward_until:
            await self._push(hop, backward=True)

    async def _compute_hop(self, hop: Hop, priority: Priority, work: Callable[[], None]) -> bool:
        """Run `work` in the compute thread; False if the hop was withdrawn or dropped."""
        job = self._compute.submit(priority, work)
        hop.job = job  # type: ignore[assignment]
        try:
            await asyncio.wrap_future(job)
        except WithdrawnError as error:
            self._drop_failed(hop, str(error), status=pb.STALE)
            return False
        except NotFiniteError as error:
            self._drop_failed(hop, str(error))
            return False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.mailbox.capacity = max(1, self.mailbox.capacity // 2)
            self._drop_failed(
                hop, f"out of memory; now at most {self.mailbox.capacity} microbatches wait here"
            )
            return False
        except asyncio.CancelledError:
            if job.cancelled():
                return False
            raise
        finally:
            hop.job = None
        if hop.dropped:  # while it was computed
            self._jobs.drop_graph(hop)
        return not hop.dropped

    def _drop_failed(self, hop: Hop, reason: str, *, status: int = pb.ACCEPTED) -> None:
        """`status` is STALE if not its data are at fault."""
        if hop.dropped:
            return
        self.counters["dropped"] += 1
        log.warning("dropped a microbatch: %s", reason)
        self._report(hop, pb.DROPPED, status=status, reason=reason)
        self._drop(hop.route.microbatch)

    # to the neighbours and the trainer

    def _push_soon(self, hop: Hop, *, backward: bool) -> None:
        if backward not in hop.sending:
            self._spawn(self._push(hop, backward=backward))

    async def _push(self, hop: Hop, *, backward: bool) -> None:
        """Send the output to the next peer or the input's gradient to the one before, and report.

        If the route changes while the bytes are under way, they are sent again along the new one.
        """
        if backward in hop.sending:
            return
        hop.sending.add(backward)
        try:
            while True:
                route = hop.route
                status, reason = await self._send(hop, route, backward)
                if self._target(hop.route, backward) == self._target(route, backward):
                    break
        finally:
            hop.sending.discard(backward)
        if status in (pb.ACCEPTED, pb.DUPLICATE, pb.CLOSED) and not backward:
            self._report(hop, pb.FORWARDED)
        if status not in (pb.ACCEPTED, pb.DUPLICATE):
            self._report(
                hop,
                pb.PUSH_FAILED,
                route=route,
                direction=pb.BACKWARD if backward else pb.FORWARD,
                target=self._target(route, backward),
                status=status,
                reason=reason,
            )

    def _target(self, route: Route, backward: bool) -> PeerId:
        return route.peers[self._stage.stage + (-1 if backward else 1)]

    async def _send(self, hop: Hop, route: Route, backward: bool) -> tuple[int, str]:
        sent = hop.gradient if backward else hop.output
        assert sent is not None
        push = Push(
            route=route,
            stage=self._stage.stage + (-1 if backward else 1),
            backward=backward,
            codec=self._codec,
            shape=sent.shape,
            tokens=hop.push.tokens,
            sequences=hop.push.sequences,
        )
        target = self._target(route, backward)
        try:
            calls = self._calls_before if backward else self._calls_after
            answered = await calls.call(target, push.pack(), sent.data)
            parsed = parse_reply(target, answered.header)
        except (LinkError, RejectedError) as error:
            return pb.LINK, str(error)
        return parsed.status, parsed.reason

    def _report(self, hop: Hop, kind: int, *, route: Route | None = None, **details: object) -> None:
        self._say(route or hop.route, kind, **details)

    def _say(self, route: Route, kind: int, **details: object) -> None:
        self.watchers.say(route.trainer, route.session, pack_event(kind, route, **details))
