"""The seam through which both packages talk to other peers: streams of frames.

A stream carries frames in both directions: a header (a small protobuf, never interpreted here) and a
raw payload. It ends with an explicit last frame; any other end is a `LinkError`, because streams of
the engine that lose their other end finish without an exception, truncated.

`Calls` is the pooled request/response pattern on top: one request at a time per stream, streams kept
open for the next request. Requests must be idempotent: one that failed on a kept stream is sent once
more on a fresh one.

Pure protocol definitions plus the pool; the shells are `averaging.hivemind_network` and
`averaging.memory_network`, and one contract suite runs on both.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol, TypeVar

from averaging.errors import LinkError

PROTOCOL_VERSION = 11  # of all that peers say to each other
PeerId = str
Buffer = bytes | bytearray | memoryview
HasStopped = Callable[[PeerId, float], bool]  # (who, seconds for which nothing has come from it)
T = TypeVar("T")

MAX_HEADER_BYTES = 1 << 20  # token ids travel in headers
IDLE_STREAMS_PER_PEER = 8
BEATS = 4  # of a live process within the time that counts as silence
LOOKS = 8  # for bytes of a frame under way, within the time that counts as silence


@dataclass(frozen=True, slots=True)
class Frame:
    header: bytes
    payload: Buffer = b""


class Stream(Protocol):
    """One open stream; `send` and `receive` may run concurrently, but each by one task at a time."""

    remote: PeerId

    @property
    def superseded(self) -> bool:
        """Has a better way to the other end been found? Then it is not worth keeping."""
        ...

    async def send(self, header: bytes, payload: Buffer = b"") -> None:
        """Send one frame. Raises LinkError when the other end is gone or makes no progress."""
        ...

    async def receive(self, silence_s: float | None = None) -> Frame | None:
        """Wait for the next frame; None after the explicit last one.

        Raises LinkError, also when not a byte has come for `silence_s`.
        """
        ...

    async def finish(self) -> None:
        """Send the explicit last frame, wait until the other end is done, too, and close."""
        ...

    def abort(self) -> None:
        """Close at once; the other end sees a broken stream."""
        ...


Handler = Callable[[Stream], Awaitable[None]]
Respond = Callable[[PeerId, Frame], Awaitable[tuple[bytes, Buffer]]]


class Network(Protocol):
    """What a peer needs of the outside: its own name, dialling, and being dialled."""

    @property
    def peer_id(self) -> PeerId: ...

    async def open(self, peer: PeerId, service: str, *, max_payload_bytes: int = 0) -> Stream:
        """Dial `service` of `peer`; replies above `max_payload_bytes` break the stream. Raises LinkError.

        The dialer speaks first: what a listener sends before it has heard anything may be lost.
        """
        ...

    async def serve(self, service: str, handler: Handler, *, max_payload_bytes: int = 0) -> None:
        """Answer streams to `service`: `handler` runs as a task per stream; a stream that it has not
        finished is aborted when it returns. Takes the place of an earlier handler for new streams."""
        ...

    def unserve(self, service: str) -> None:
        """Answer no more: abort the streams to `service`, too. No-op if it is not served."""
        ...


class Scoped:
    """A network whose services are apart from those of other scopes: what has left one answers no more there.

    Satisfies `Network`.
    """

    def __init__(self, network: Network, scope: str) -> None:
        self._network, self._scope = network, scope

    @property
    def peer_id(self) -> PeerId:
        return self._network.peer_id

    async def open(self, peer: PeerId, service: str, *, max_payload_bytes: int = 0) -> Stream:
        return await self._network.open(peer, self._name(service), max_payload_bytes=max_payload_bytes)

    async def serve(self, service: str, handler: Handler, *, max_payload_bytes: int = 0) -> None:
        await self._network.serve(self._name(service), handler, max_payload_bytes=max_payload_bytes)

    def unserve(self, service: str) -> None:
        self._network.unserve(self._name(service))

    def _name(self, service: str) -> str:
        return f"{service}/{self._scope}"


@contextlib.asynccontextmanager
async def kept_alive(
    stream: Stream, alive: bytes | Callable[[], bytes], silence_s: float
) -> AsyncIterator[None]:
    """Say `alive`, or what it returns, to the other end, so that it hears no silence of `silence_s`."""

    async def beat() -> None:
        with contextlib.suppress(LinkError):  # whoever uses the stream notices
            while True:
                await stream.send(alive if isinstance(alive, bytes) else alive())
                await asyncio.sleep(silence_s / BEATS)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


async def while_heard(
    peer: PeerId, awaited: Coroutine[None, None, T], has_stopped: HasStopped, *, look_s: float
) -> T:
    """What comes of `peer`, which is looked after every `look_s`.

    Raises LinkError when nothing has come for so long that it counts as stopped.
    """
    time_s, task = asyncio.get_running_loop().time, asyncio.create_task(awaited)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, in any case
    began_s = time_s()
    try:
        while not task.done():
            await asyncio.wait([task], timeout=look_s)
            if not task.done() and has_stopped(peer, unheard_s := time_s() - began_s):
                raise LinkError(peer, f"silent for {unheard_s:.1f} s", silent=True)
        return task.result()
    finally:
        task.cancel()


async def answer(stream: Stream, respond: Respond) -> None:
    """Serve the requests of one `Calls` client until it goes away."""
    try:
        while (frame := await stream.receive()) is not None:
            header, payload = await respond(stream.remote, frame)
            await stream.send(header, payload)
        await stream.finish()
    except LinkError:
        stream.abort()


class Calls:
    """Pooled request/response on one service of many peers."""

    def __init__(self, network: Network, service: str, *, deadline_s: float, max_payload_bytes: int = 0):
        self._network, self._service = network, service
        self._deadline_s, self._max_payload_bytes = deadline_s, max_payload_bytes
        self._idle: dict[PeerId, deque[Stream]] = {}

    async def call(
        self, peer: PeerId, header: bytes, payload: Buffer = b"", *, deadline_s: float | None = None
    ) -> Frame:
        """Send one request to `peer` and return its answer. Raises LinkError after the deadline too."""
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(limit_s):
                idle = self._idle.get(peer)
                if idle:
                    try:
                        return await self._exchange(idle.pop(), header, payload)
                    except LinkError:
                        self.forget(peer)  # the other kept streams most likely broke with it
                stream = await self._network.open(
                    peer, self._service, max_payload_bytes=self._max_payload_bytes
                )
                return await self._exchange(stream, header, payload)
        except TimeoutError:
            what = f"no answer on {self._service!r} within {limit_s:.1f} s"
            raise LinkError(peer, what, silent=True) from None

    async def _exchange(self, stream: Stream, header: bytes, payload: Buffer) -> Frame:
        try:
            await stream.send(header, payload)
            frame = await stream.receive()
        except BaseException:  # also a cancelled call: its late answer must not meet the next request
            stream.abort()
            raise
        if frame is None:
            stream.abort()
            raise LinkError(stream.remote, "closed the stream instead of answering")
        idle = self._idle.setdefault(stream.remote, deque())
        if len(idle) < IDLE_STREAMS_PER_PEER and not stream.superseded:
            idle.append(stream)
        else:
            stream.abort()
        return frame

    def forget(self, peer: PeerId) -> None:
        """Close the kept streams to `peer`; no-op if there are none."""
        for stream in self._idle.pop(peer, ()):
            stream.abort()

    def close(self) -> None:
        """Close all kept streams."""
        for peer in list(self._idle):
            self.forget(peer)
