"""The peer's side of watch streams: events to trainers, heartbeats, and the lease to accumulate.

A trainer opens one watch stream to every peer it uses. The peer sends events, and heartbeats stamped with
its own clock; the trainer echoes the stamp of each. The echo renews a lease: the peer may accumulate
gradients of that trainer's microbatches until `stamp + lease_s` on its own clock. A trainer that stops
hearing from a peer waits out the same lease before it gives the work to another, so a peer that was
stopped and wakes up cannot accumulate a second time; clocks need not agree, only run equally fast.

A newcomer is watched while its state still comes: it says so, and no more, until it may be given work.

A broken watch stream does not end the session: events wait for the trainer to open the next one. When
the lease has run out, or the trainer says goodbye, the session ends and everything held for it goes.

I/O: one event loop; `may_accumulate` is also called by the compute thread.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from averaging.bounded import forget_oldest
from averaging.errors import LinkError
from averaging.network import Network, PeerId, Stream
from swarm import swarm_pb2 as pb
from swarm.config import NetworkConfig

SERVICE = "watch"
GOODBYE_S, LOOK_S = 1.0, 0.01
QUIET_BEATS = 1.25  # of silence before a trainer gives a peer no more work for now: one beat is late
SILENT_BEATS = 4  # ... and before it tells the peer's mates
MAX_SILENT = 64  # mates, in one ping
MAX_EVENTS = 20_000  # for a trainer that does not read: its session ends
MAX_SESSIONS, SESSIONS_EACH = 64, 4
LOADING = pb.WatchFrame(loading=True).SerializeToString()


def lease_clock() -> float:
    """Seconds that go on while the machine sleeps, where the system can tell: leases run out meanwhile."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(slots=True)
class Session:
    """One life of one trainer, as this peer sees it."""

    trainer: PeerId
    key: bytes
    lease_until_s: float
    silent: frozenset[PeerId] = frozenset()  # mates that the trainer does not hear
    version: int = 0  # of the mate that is furthest
    said_s: float = float("-inf")  # when it last said so
    events: deque[bytes] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    open: list[Stream] = field(default_factory=list)
    goodbye: bool = False  # of the trainer
    leaving: bool = False  # this peer

    def say(self, frame: bytes) -> None:
        self.events.append(frame)
        self.changed.set()


class Watchers:
    """All sessions of one peer; satisfies `averaging.witnesses.Witnesses`."""

    def __init__(
        self,
        network: Network,
        settings: NetworkConfig,
        *,
        clock: Callable[[], float],
        status: Callable[[], tuple[int, int]],
        history: Callable[[], Iterable[pb.Stepped]],
        on_end: Callable[[Session], None],
    ) -> None:
        """`status` returns (queue, version) for heartbeats, `history` what the stage's steps contain;
        `on_end` drops what a session left behind."""
        self._network, self._settings, self._clock = network, settings, clock
        self._status, self._history, self._on_end = status, history, on_end
        self._sessions: dict[tuple[PeerId, bytes], Session] = {}
        self._ready = False
        self._heard_since_s = float("-inf")
        self._lost_s: dict[
            PeerId, float
        ] = {}  # trainers that may watch others still, and when they were lost

    async def start(self) -> None:
        await self._network.serve(SERVICE, self._watch)

    def ready(self) -> None:
        """This peer has its state: trainers may give it work."""
        self._ready = True
        for session in self._sessions.values():
            session.changed.set()

    def close(self) -> None:
        """Answer nobody any more."""
        self._network.unserve(SERVICE)

    def session(self, trainer: PeerId, key: bytes) -> Session | None:
        return self._sessions.get((trainer, key))

    def may_accumulate(self, trainer: PeerId, key: bytes) -> bool:
        session = self._sessions.get((trainer, key))
        return session is not None and self._clock() < session.lease_until_s

    def silent(self) -> frozenset[PeerId]:
        """Mates that no trainer hears: all say so, and none that might hear them has been lost lately."""
        if not (self._sessions and all(map(self._is_heard, self._sessions.values()))) or self._lost_lately:
            return frozenset()
        return frozenset.intersection(*(session.silent for session in self._sessions.values()))

    def hear_this(self, for_s: float = 0.0) -> bool:
        """Does some trainer hear it, and will not call it silent for so long? Also true if there is none."""
        if not self._sessions:
            return not self._lost_lately
        return any(self._is_heard(session, for_s) for session in self._sessions.values())

    def heard_for_s(self) -> float:
        """For how long there has always been a trainer that hears it; 0 if none does now."""
        return self._clock() - self._heard_since_s if self.hear_this() else 0.0

    def version(self) -> int:
        """Of the mate that is furthest, as all trainers say: one alone cannot hold the stage up."""
        return min((s.version for s in self._sessions.values() if self._is_heard(s)), default=0)

    def _is_heard(self, session: Session, for_s: float = 0.0) -> bool:
        return self._clock() + for_s < session.said_s + SILENT_BEATS * self._settings.heartbeat_s

    def _note_break(self) -> None:
        """Nobody hears this peer, or did before the message that has just come."""
        if not any(map(self._is_heard, self._sessions.values())):
            self._heard_since_s = self._clock()

    @property
    def _lost_lately(self) -> bool:
        recent_s = self._clock() - self._settings.expire_s
        return any(lost_s > recent_s for lost_s in self._lost_s.values())

    def say(self, trainer: PeerId, key: bytes, frame: bytes) -> None:
        """Queue an event for one trainer; no-op when its session has ended."""
        session = self._sessions.get((trainer, key))
        if session is not None:
            session.say(frame)

    def say_all(self, frame: bytes) -> None:
        for session in self._sessions.values():
            session.say(frame)

    async def _watch(self, stream: Stream) -> None:
        """Serve one watch stream until it breaks or the trainer says goodbye."""
        try:
            ping = await self._ping(stream)
        except LinkError:
            return stream.abort()
        if ping is None or len(ping.session) != 8:
            return stream.abort()
        name = (stream.remote, ping.session)
        session = self._sessions.get(name)
        if session is None and not self._has_room(stream.remote):
            return stream.abort()
        if session is not None and ping.fresh:
            del self._sessions[name]
            self._on_end(session)
            session = None
        for older in session.open if session is not None else ():
            older.abort()  # a trainer dials again when a stream is dead: events must not go there
        fresh = session is None
        if session is None:
            lease_s = self._clock() + self._settings.lease_s
            session = self._sessions[name] = Session(stream.remote, ping.session, lease_s)
            self._lost_s.pop(stream.remote, None)
        session.open.append(stream)
        try:
            async with asyncio.TaskGroup() as tasks:
                speaking = tasks.create_task(self._speak(stream, session, fresh=fresh))
                tasks.create_task(self._listen(stream, session, speaking))
        except* LinkError:
            stream.abort()
        finally:
            session.open.remove(stream)
            self._expire(session)

    def _has_room(self, trainer: PeerId) -> bool:
        own = sum(known == trainer for known, _ in self._sessions)
        return len(self._sessions) < MAX_SESSIONS and own < SESSIONS_EACH

    async def _ping(self, stream: Stream) -> pb.WatchPing | None:
        frame = await stream.receive()
        try:
            ping = None if frame is None else pb.WatchPing.FromString(frame.header)
        except DecodeError:
            raise LinkError(stream.remote, "malformed ping") from None
        if ping is not None and len(ping.silent) > MAX_SILENT:
            raise LinkError(stream.remote, f"calls {len(ping.silent)} peers silent")
        return ping

    async def _speak(self, stream: Stream, session: Session, *, fresh: bool) -> None:
        """Send what the state contains, then events as they come, and a heartbeat every period."""
        loop = asyncio.get_running_loop()
        while not (self._ready or session.leaving):
            session.changed.clear()
            await stream.send(LOADING)
            await _within(self._settings.heartbeat_s, session.changed)
        for stepped in self._history():
            stepped.fresh = fresh
            await stream.send(pb.WatchFrame(stepped=stepped).SerializeToString())
        next_beat_s = loop.time()
        while not (session.goodbye or (session.leaving and not session.events)):
            session.changed.clear()
            while session.events:
                await stream.send(session.events[0])
                session.events.popleft()
            # After the events: a heartbeat's version must not overtake what happened before it.
            if loop.time() >= next_beat_s:
                queue, version = self._status()
                beat = pb.Heartbeat(sent_at_s=self._clock(), queue=queue, version=version)
                await stream.send(pb.WatchFrame(heartbeat=beat).SerializeToString())
                next_beat_s = loop.time() + self._settings.heartbeat_s
            await _within(next_beat_s - loop.time(), session.changed)
            if len(session.events) > MAX_EVENTS:
                raise LinkError(session.trainer, "does not read its events")

    async def _listen(self, stream: Stream, session: Session, speaking: "asyncio.Task[None]") -> None:
        """Renew the lease with every echo."""
        while (ping := await self._ping(stream)) is not None:
            if ping.echo_s <= self._clock():  # never beyond what this clock has stamped
                self._note_break()
                session.lease_until_s = max(session.lease_until_s, ping.echo_s + self._settings.lease_s)
                session.said_s = max(session.said_s, ping.echo_s)
                session.silent, session.version = frozenset(ping.silent), ping.version
        session.goodbye = True
        speaking.cancel()

    async def say_goodbye(self) -> None:
        """Tell every trainer that watches that this peer leaves, after all that it has to say."""
        await asyncio.gather(*map(self._part_from, list(self._sessions.values())))

    async def _part_from(self, session: Session) -> None:
        session.leaving = True
        session.changed.set()
        for stream in list(session.open):
            try:
                async with asyncio.timeout(GOODBYE_S):
                    while session.events:  # noqa: ASYNC110 - for a second, once in a peer's life
                        await asyncio.sleep(LOOK_S)
                    await stream.finish()
            except (LinkError, TimeoutError):
                stream.abort()

    def _expire(self, session: Session) -> None:
        """End the session if nobody watches and its lease is over; look again when it will be."""
        name = (session.trainer, session.key)
        if session.open or self._sessions.get(name) is not session:
            return
        left_s = session.lease_until_s - self._clock()
        if session.goodbye or left_s <= 0:
            del self._sessions[name]
            if not session.goodbye:
                self._lost_s.pop(session.trainer, None)
                self._lost_s[session.trainer] = self._clock()
                forget_oldest(self._lost_s, MAX_SESSIONS)
            self._note_break()
            self._on_end(session)
        else:
            asyncio.get_running_loop().call_later(left_s + 0.01, self._expire, session)


async def _within(limit_s: float, event: asyncio.Event) -> None:
    """Wait for it, so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, limit_s)):
            await event.wait()
