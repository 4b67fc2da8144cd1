"""Executes the ledger's commands on the network and feeds it what comes back.

    roster      read every period, and when a peer says that another has come; each one found is watched
    watch       one stream per peer: its events and heartbeats in, echoes out (they renew its lease)
    commands    push, resend, cancel, release: calls, whose answers are events again

A watch stream that breaks is dialled again at once. If that is refused, the peer is dead. If nothing
answers, it may be alive behind a broken link: it counts as gone when its lease is over, not before.

I/O: one event loop. The decisions are the ledger's.
"""

import asyncio
import contextlib
import functools
import logging
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from google.protobuf.message import DecodeError

from averaging.bounded import forget_oldest
from averaging.codecs import CODECS
from averaging.errors import AveragingError, LinkError
from averaging.network import Calls, Network, PeerId, Stream
from swarm import swarm_pb2 as pb
from swarm import watch
from swarm.config import RunConfig
from swarm.directory import Directory
from swarm.errors import RejectedError
from swarm.messages import Push, parse_reply
from swarm.scope import at_stage
from swarm.server import SERVICE
from trainers import events as ev
from trainers.assembly import ledger_of, take, throttle_of, wirings_of
from trainers.hearing import Hearing
from trainers.ledger import batched_releases

TICK_S = 0.05
REDIALS = 6  # that a peer which fell silent leaves unanswered, for a minute: it comes back on the roster then
UNREACHED_S = 1.0  # before a peer is dialled again that was not there: its record outlives it
LOOK_S = 0.1  # between two readings of the roster, at least
RETRY_S = 0.5
GOODBYE_S = 1.0
TOLD_AGAIN_S, MOST_TOLD = 30.0, 256  # of a link that fails, on the log
log = logging.getLogger(__name__)


class Pipeline:
    """Keeps a trainer's microbatches moving."""

    def __init__(
        self,
        *,
        network: Network,
        directory: Directory,
        config: RunConfig,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        on_completed: Callable[[ev.Completed], None] = lambda done: None,
        on_abandoned: Callable[[ev.Abandoned], None] = lambda gone: None,
        on_recovered: Callable[[ev.Recovered], None] = lambda done: None,
    ) -> None:
        self._network, self._directory, self._config, self._clock = network, directory, config, clock
        self._on_completed, self._on_abandoned, self._on_recovered = on_completed, on_abandoned, on_recovered
        self._wirings = wirings_of(config, rng)
        self.session = secrets.token_bytes(8)
        self.ledger = ledger_of(
            config,
            self._wirings,
            trainer=network.peer_id,
            session=self.session,
            strict=config.training.strict,
        )
        self.throttle = throttle_of(config)
        self._stage_of: dict[PeerId, int] = {}  # as it was when the peer was found
        self._calls = [
            Calls(at_stage(network, stage), SERVICE, deadline_s=config.averaging.progress_deadline_s)
            for stage in range(config.model.stages)
        ]
        self._watched: dict[PeerId, asyncio.Task[None]] = {}  # one stream per peer
        self._followed: set[PeerId] = set()  # those of them that are there
        self.hearing = Hearing(heartbeat_s=config.network.heartbeat_s, expire_s=config.network.expire_s)
        self._told_s: dict[tuple[PeerId, PeerId], float] = {}  # when to say again that a link fails
        self._tasks: set[asyncio.Task[None]] = set()
        self._coming = asyncio.Event()  # somebody does, or may be found elsewhere by now
        self.changed = asyncio.Event()  # something completed, settled, or stepped

    async def run(self) -> None:
        """Read the roster and the clock until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read_rosters())
                tasks.create_task(self._tick())
        finally:
            watching = list(self._watched.values())
            for task in watching:
                task.cancel()  # each says goodbye, so that its peer drops what it holds for us
            await asyncio.gather(*watching, return_exceptions=True)
            for task in self._tasks:
                task.cancel()
            for calls in self._calls:
                calls.close()

    def issue(self, microbatch: bytes, tokens: bytes, *, sequences: int, evaluate: bool, step: int) -> None:
        """Send a microbatch on its way; `on_completed` or `on_abandoned` will name it."""
        self._execute(
            self.ledger.issue(
                microbatch, tokens, sequences=sequences, evaluate=evaluate, step=step, now_s=self._clock()
            )
        )

    @property
    def ready_stages(self) -> int:
        """Stages that have at least one peer."""
        return sum(len(wiring) > 0 for wiring in self._wirings)

    def feed(self, event: ev.LedgerEvent) -> None:
        """Give the ledger an event and do what it says."""
        self._execute(take(self.ledger, self.throttle, event, self._clock()))
        self.changed.set()

    # who is there

    async def _read_rosters(self) -> None:
        while True:
            self._coming.clear()
            # At once: a read takes seconds while others in the directory do not answer.
            await asyncio.gather(*map(self._read_roster, range(self._config.model.stages)))
            period_s = self._config.network.announce_s / 2
            await asyncio.sleep(LOOK_S)
            complete = self.ready_stages == self._config.model.stages
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period_s if complete else LOOK_S):
                    await self._coming.wait()

    async def _read_roster(self, stage: int) -> None:
        try:
            records = await self._directory.roster(stage)
        except LinkError as error:
            return log.warning("%s; trying again", error)
        for record in records:
            banned = self._wirings[stage].is_banned(record.peer, self._clock())
            if record.peer not in self._watched and not banned and record.computes:
                self._stage_of[record.peer] = stage
                task = asyncio.create_task(self._watch(stage, record.peer))
                self._watched[record.peer] = task
                task.add_done_callback(functools.partial(self._unwatch, record.peer))

    def _unwatch(self, peer: PeerId, task: "asyncio.Task[None]") -> None:
        self._watched.pop(peer, None)
        self._coming.set()  # it may stand on another roster by now
        self._raise_bug(task)

    async def _watch(self, stage: int, peer: PeerId) -> None:
        """Follow one peer from the first dial to its end.

        One that has fallen silent is dialled on for a while: so it is heard, and knows that it is, as soon as
        it wakes up, long before it is on the roster again.
        """
        stream = await self._dialled(stage, peer, 1)
        while stream is not None and await self._follow(stage, stream):
            banned_s = self._wirings[stage].banned_for_s(peer, self._clock())
            if banned_s > self._config.network.expire_s:
                return  # it will be read of again
            await asyncio.sleep(banned_s)
            stream = await self._dialled(stage, peer, REDIALS)

    async def _dialled(self, stage: int, peer: PeerId, dials: int) -> Stream | None:
        """A stream to a peer that answers one of so many dials; it takes each several seconds not to."""
        for _ in range(dials):
            try:
                return await at_stage(self._network, stage).open(peer, watch.SERVICE)
            except LinkError as error:
                log.debug("cannot watch: %s", error)
                if not error.silent:
                    break
        await asyncio.sleep(UNREACHED_S)
        return None

    async def _follow(self, stage: int, stream: Stream) -> bool:
        """Hear a peer, over as many streams as it takes, until it is gone: did it speak, and fall silent?"""
        peer, lease_s = stream.remote, self._config.network.lease_s
        again, heard_s = False, self._clock()  # its lease is at most this old
        self._followed.add(peer)
        while True:
            heard_before_s = self.hearing.last_s(peer)
            try:
                if await self._listen(stream, stage, again):
                    log.info("peer %s leaves", peer[-8:])
                    self._gone(ev.PeerGone(peer, left=True))
                    return False
            except asyncio.CancelledError:
                await _say_goodbye(stream)
                raise
            except LinkError as error:
                log.info("watch stream of %s: %s", peer[-8:], error)
                stream.abort()
                if self.hearing.last_s(peer) == heard_before_s:
                    await asyncio.sleep(RETRY_S)  # it takes dials and says nothing: it has no room
                heard_s = max(heard_s, self.hearing.last_s(peer) or heard_s)
            while self._clock() <= heard_s + lease_s:
                try:
                    stream = await at_stage(self._network, stage).open(peer, watch.SERVICE)
                    break
                except LinkError as error:
                    if error.refused:
                        log.info("peer %s is gone: %s", peer[-8:], error)
                        self._gone(ev.PeerGone(peer))
                        return False
                    self.hearing.missed(peer, self._clock())
                    await asyncio.sleep(RETRY_S / 2)
            else:
                log.info("peer %s has fallen silent", peer[-8:])
                has_spoken = peer in self.hearing
                self._gone(ev.PeerGone(peer, silent=True))
                return has_spoken
            again, heard_s = True, self._clock()

    def _gone(self, event: ev.PeerGone) -> None:
        self.hearing.gone(event.peer, self._clock(), left=event.left)
        self.throttle.gone(event.peer)
        self._followed.discard(event.peer)
        self._calls_to(event.peer).forget(event.peer)
        self.feed(event)

    async def _listen(self, stream: Stream, stage: int, again: bool) -> bool:
        """Feed what the peer says to the ledger until it says goodbye. Raises LinkError."""
        peer, beat_s = stream.remote, self._config.network.heartbeat_s
        lease_s, heard_s, first = self._config.network.lease_s, self._clock(), True
        wait_s = watch.QUIET_BEATS * beat_s
        # A peer that had been given up must not go on with hops that are with others by now.
        await stream.send(pb.WatchPing(session=self.session, fresh=not again).SerializeToString())
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    frame = await stream.receive()
            except TimeoutError:
                if self._clock() - heard_s > lease_s:
                    raise LinkError(peer, f"silent for {lease_s:.1f} s") from None
                self._wirings[stage].suspend(peer, True)
                self.hearing.missed(peer, self._clock())
                wait_s = beat_s / 2
                continue
            wait_s = watch.QUIET_BEATS * beat_s
            if frame is None:
                return True
            try:
                message = pb.WatchFrame.FromString(frame.header)
            except DecodeError:
                raise LinkError(peer, "malformed watch frame") from None
            match message.WhichOneof("content"):
                case "heartbeat":
                    heard_s = self._clock()
                    self.hearing.beat(stage, peer, message.heartbeat.version, heard_s)
                    is_behind = self.hearing.is_behind(peer)
                    self._wirings[stage].suspend(peer, is_behind)
                    self.throttle.heard(peer, message.heartbeat.queue)
                    echo = pb.WatchPing(
                        session=self.session,
                        echo_s=message.heartbeat.sent_at_s,
                        silent=self.hearing.silent_mates(peer, heard_s),
                        version=self.hearing.newest(stage),
                    )
                    await stream.send(echo.SerializeToString())
                    # Who comes back behind its stage is loading: nobody waits until its state holds more.
                    if first and (peer in self.ledger.peers or not is_behind):
                        first = False
                        self.feed(ev.PeerReady(stage, peer, message.heartbeat.version))
                        if again:
                            self.feed(ev.WatchBroke(peer))
                    self.feed(ev.SteppedEvent(stage, peer, message.heartbeat.version))
                case "coming":
                    self._coming.set()
                case "loading":
                    heard_s = self._clock()
                case "event":
                    event = _hop_event(peer, message.event)
                    self._note_bad_link(stage, event)
                    self.feed(event)
                case "stepped":
                    if again and first and message.stepped.fresh:  # it has let go of all that was ours
                        again = False
                        self.feed(ev.PeerGone(peer, silent=True))
                    told = message.stepped
                    self.feed(
                        ev.SteppedEvent(
                            stage, peer, told.version, frozenset(told.microbatches), whole=told.whole
                        )
                    )

    def _note_bad_link(self, stage: int, event: ev.HopEvent) -> None:
        """Tell the user, now and then, which peers do not reach each other: nothing else would show it."""
        if event.kind != pb.PUSH_FAILED or event.status != pb.LINK or event.target not in self.hearing:
            return
        link, now_s = (event.peer, event.target), self._clock()
        if now_s >= self._told_s.get(link, 0.0):
            self._told_s[link] = now_s + TOLD_AGAIN_S
            log.warning(
                "%s (stage %d) cannot push to %s: %r", link[0][-8:], stage, link[1][-8:], event.reason
            )
            forget_oldest(self._told_s, MOST_TOLD)

    # commands

    def _calls_to(self, peer: PeerId) -> Calls:
        return self._calls[self._stage_of.get(peer, 0)]

    def _execute(self, commands: Iterable[ev.Command]) -> None:
        for command in batched_releases(commands):
            match command:
                case ev.PushTokens():
                    self._spawn(self._push_tokens(command))
                case ev.Resend():
                    self._spawn(self._resend(command))
                case ev.Cancel():
                    self._spawn(self._cancel(command))
                case ev.Release():
                    self._spawn(self._release(command))
                case ev.Completed():
                    if not command.evaluate:
                        self.throttle.completed()
                    self._on_completed(command)
                case ev.Abandoned():
                    log.warning("gave up a microbatch: %s", command.reason)
                    self._on_abandoned(command)
                case ev.Recovered():
                    self._on_recovered(command)

    async def _push_tokens(self, command: ev.PushTokens) -> None:
        route = command.route
        push = Push(
            route=route,
            stage=0,
            backward=False,
            codec=CODECS[self._config.pipeline.codec],
            shape=(),
            tokens=command.tokens,
            sequences=command.sequences,
        )
        status = await self._status(route.peers[0], push.pack())
        self.feed(ev.Answered(route.peers[0], route.microbatch, route.attempt, status, push=True))

    async def _resend(self, command: ev.Resend) -> None:
        direction = pb.BACKWARD if command.backward else pb.FORWARD
        resend = pb.Resend(route=command.route.pack(), direction=direction)
        status = await self._status(command.peer, pb.HopRequest(resend=resend).SerializeToString())
        route = command.route
        self.feed(ev.Answered(command.peer, route.microbatch, route.attempt, status, push=False))

    async def _status(self, peer: PeerId, request: bytes) -> int:
        try:
            return parse_reply(peer, (await self._calls_to(peer).call(peer, request)).header).status
        except (LinkError, RejectedError) as error:
            log.debug("%s", error)
            return pb.LINK

    async def _cancel(self, command: ev.Cancel) -> None:
        """Ask until the peer answers or is gone: without an answer nobody else may do its work."""
        ids = tuple(microbatch for microbatch, _ in command.microbatches)
        attempts = [attempt for _, attempt in command.microbatches]
        message = pb.Microbatches(session=self.session, ids=ids, attempts=attempts)
        request = pb.HopRequest(cancel=message).SerializeToString()
        while command.peer in self._followed:
            try:
                frame = await self._calls_to(command.peer).call(command.peer, request)
                reply = parse_reply(command.peer, frame.header)
            except (LinkError, RejectedError) as error:
                log.debug("cancel: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            stands = tuple((a.microbatch, a.step, a.loss) for a in reply.accumulated)
            return self.feed(ev.CancelAnswered(command.peer, command.microbatches, stands))

    async def _release(self, command: ev.Release) -> None:
        message = pb.Microbatches(session=self.session, ids=command.microbatches)
        request = pb.HopRequest(release=message).SerializeToString()
        while command.peer in self._followed:
            try:
                await self._calls_to(command.peer).call(command.peer, request)
                return
            except AveragingError as error:
                log.debug("release: %s", error)
                await asyncio.sleep(RETRY_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._raise_bug(task)

    @staticmethod
    def _raise_bug(task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "the pipeline failed: a bug, not the network's doing", "exception": error}
            )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._execute(self.ledger.handle(ev.Tick(), self._clock()))


async def _say_goodbye(stream: Stream) -> None:
    try:
        async with asyncio.timeout(GOODBYE_S):
            await stream.finish()
    except (LinkError, TimeoutError):
        stream.abort()


def _hop_event(peer: PeerId, event: pb.Event) -> ev.HopEvent:
    return ev.HopEvent(
        peer=peer,
        kind=event.kind,
        microbatch=event.microbatch,
        attempt=event.attempt,
        step=event.step,
        loss=event.loss,
        backward=event.direction == pb.BACKWARD,
        target=event.target,
        status=event.status,
        reason=event.reason[:200],
    )
