"""Frames on a raw byte stream: a 12-byte prefix (header length, payload length), header, payload in chunks.

The protocol reads straight into the buffer a frame ends up in: the payload's buffer is allocated once
its length has passed the bound, and the socket fills it, chunk by chunk, each with a prefix of its own.
A frame under way must keep moving: a chunk that makes no progress within `progress_s` breaks the stream, on
both ends. Between frames a stream may rest as long as its users like. Between chunks go questions, how much
has arrived, and their echoes, which keep what is under way within a window (`averaging.flow`).

I/O: one asyncio loop; no threads.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable

from averaging.errors import LinkError
from averaging.flow import Window
from averaging.network import LOOKS, MAX_HEADER_BYTES, Buffer, Frame, PeerId

PREFIX = struct.Struct("<IQ")
# As header length: the explicit end, a chunk, a question after so many bytes of payload, and its echo.
LAST_FRAME, CHUNK, ASK, ECHO = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD, 0xFFFFFFFC
MOST_CHUNK_BYTES = 1 << 18  # one write: small enough to notice a stalled reader, large enough to be cheap
UNREAD_ECHO_BYTES = 1 << 20  # that lie here because the other end asks, but does not read
FINISH_S = 3.0
# Beyond both the socket is not read until the user has caught up. A few signs of life do not count: echoes of
# what is sent here come the same way.
UNREAD_FRAMES, UNREAD_BYTES = 2, 1 << 16
FRAME_BYTES = 64  # of memory, beside what it holds


def _size(frame: Frame | None) -> int:
    return FRAME_BYTES + (len(frame.header) + len(frame.payload) if frame else 0)


class FrameProtocol(asyncio.BufferedProtocol):
    """Turns bytes into frames and back; `FramedStream` is its user's side."""

    def __init__(
        self, remote: PeerId, max_payload_bytes: int, progress_s: float, window: Window | None = None
    ) -> None:
        self.remote, self.progress_s, self._max_payload_bytes = remote, progress_s, max_payload_bytes
        self._prefix = bytearray(PREFIX.size)
        self._target: bytearray | memoryview = self._prefix
        self._filled, self._payload_bytes = 0, 0
        self._header: bytes | None = b""  # None: it is what is being read
        self._payload: bytearray | None = None  # under way
        self._payload_filled = 0
        self._window = window or Window()
        self._sent_bytes, self._echoed_bytes = 0, 0  # of payloads
        self._asked: deque[tuple[int, float]] = deque()  # bytes sent before, when
        self._echo = asyncio.Event()
        self._held_back = False
        self._frames: deque[Frame | None] = deque()
        self._unread_bytes = 0
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._broken: str | None = None
        self._received_bytes = 0
        self._paused = False
        self.transport: asyncio.Transport | None = None

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over `transport`, on which nothing unread may be buffered."""
        self.transport = transport
        transport.set_write_buffer_limits(high=2 * MOST_CHUNK_BYTES)
        transport.set_protocol(self)
        transport.resume_reading()

    # what the event loop calls

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._target)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        self._received_bytes += nbytes
        while self._filled == len(self._target) and self._broken is None:
            self._advance()

    def _advance(self) -> None:
        target = self._target
        if target is self._prefix:
            self._begin(*PREFIX.unpack(target))
        elif self._header is None:
            self._header = bytes(target)
            self._payload, self._payload_filled = bytearray(self._payload_bytes), 0
            self._go_on()
        else:
            self._payload_filled += len(target)
            self._go_on()

    def _begin(self, kind: int, size: int) -> None:
        """A prefix is there."""
        if kind == CHUNK:
            if self._payload is None or not 0 < size <= self._payload_bytes - self._payload_filled:
                return self.fail(f"chunk of {size} bytes in the wrong place")
            start = self._payload_filled
            return self._expect(memoryview(self._payload)[start : start + size])
        if kind == ASK:
            self._answer(size)
        elif kind == ECHO:
            self._hear_echo(size)
        elif self._payload is not None:
            return self.fail("frame within a frame")
        elif kind == LAST_FRAME:
            self._emit(None)
        elif kind > MAX_HEADER_BYTES or size > self._max_payload_bytes:
            return self.fail(f"frame of {kind} + {size} bytes exceeds the bound")
        else:
            self._header, self._payload_bytes = None, size
            return self._expect(bytearray(kind))
        self._expect(self._prefix)

    def _go_on(self) -> None:
        """A header is there, or a chunk."""
        assert self._header is not None and self._payload is not None
        if self._payload_filled == self._payload_bytes:
            self._emit(Frame(self._header, self._payload))
            self._payload = None
        self._expect(self._prefix)

    def _answer(self, asked: int) -> None:
        assert self.transport is not None
        if self.transport.get_write_buffer_size() > UNREAD_ECHO_BYTES:
            return self.fail("asks, but does not read")
        self.transport.write(PREFIX.pack(ECHO, asked))

    def _hear_echo(self, size: int) -> None:
        if not self._asked or self._asked[0][0] != size:
            return self.fail(f"echo of {size} bytes that nobody asked for")
        _, asked_s = self._asked.popleft()
        took_s = asyncio.get_running_loop().time() - asked_s
        self._window.echoed(size - self._echoed_bytes, took_s, held_back=self._held_back)
        self._echoed_bytes, self._held_back = size, False
        self._echo.set()

    def _expect(self, target: bytearray | memoryview) -> None:
        self._target, self._filled = target, 0

    def _emit(self, frame: Frame | None) -> None:
        self._frames.append(frame)
        self._unread_bytes += _size(frame)
        self._readable.set()
        many = len(self._frames) >= UNREAD_FRAMES and self._unread_bytes >= UNREAD_BYTES
        if many and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the stream ended without its last frame" if exc is None else str(exc) or repr(exc))

    # what the stream calls

    @property
    def has_received(self) -> bool:
        return self._received_bytes > 0

    def fail(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
        self._readable.set()
        self._writable.set()
        self._echo.set()
        if self.transport is not None:
            self.transport.abort()

    async def next_frame(self, silence_s: float | None = None) -> Frame | None:
        loop = asyncio.get_running_loop()
        heard_s, seen = loop.time(), self._received_bytes
        while not self._frames:
            if self._broken is not None:
                raise LinkError(self.remote, self._broken)
            self._readable.clear()
            limit_s = self.progress_s if silence_s is None else silence_s
            under_way = self._target is not self._prefix or self._filled > 0 or self._payload is not None
            try:
                async with asyncio.timeout(limit_s / LOOKS):
                    await self._readable.wait()
            except TimeoutError:
                if self._received_bytes != seen or not (under_way or silence_s):
                    heard_s, seen = loop.time(), self._received_bytes
                elif loop.time() - heard_s >= limit_s:
                    self.fail(f"silent for {limit_s:.1f} s{' in a frame' * under_way}")
        frame = self._frames.popleft()
        self._unread_bytes -= _size(frame)
        if self._paused and len(self._frames) < UNREAD_FRAMES // 2 and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()
        return frame

    async def other_end_is_done(self, deadline_s: float) -> None:
        """Wait for the explicit last frame or the end of the stream, dropping what else arrives."""
        try:
            async with asyncio.timeout(deadline_s):
                while await self.next_frame() is not None:
                    pass
        except (LinkError, TimeoutError):
            pass  # closed is closed

    async def room(self) -> None:
        """Wait until the transport takes more bytes. Raises LinkError when it stops draining."""
        while not self._writable.is_set() and self._broken is None:
            assert self.transport is not None
            queued = self.transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(self.progress_s):
                    await self._writable.wait()
            except TimeoutError:
                if self.transport.get_write_buffer_size() >= queued:
                    self.fail(f"nothing could be sent for {self.progress_s:.1f} s")
        if self._broken is not None:
            raise LinkError(self.remote, self._broken)

    async def credit(self) -> int:
        """Wait until the window has room; how many bytes may be sent now. Raises LinkError."""
        await self.room()
        while self._sent_bytes - self._echoed_bytes >= self._window.bytes:
            self._held_back = True
            if not self._asked:
                self._ask()
            self._echo.clear()
            echoed = self._echoed_bytes
            try:
                async with asyncio.timeout(self.progress_s):
                    await self._echo.wait()
            except TimeoutError:
                if self._echoed_bytes == echoed:
                    self.fail(f"nothing arrived for {self.progress_s:.1f} s")
            await self.room()
        return min(MOST_CHUNK_BYTES, self._window.stride)

    def sent(self, size: int) -> None:
        """So many more bytes of a payload are on their way."""
        self._sent_bytes += size
        last = self._asked[-1][0] if self._asked else self._echoed_bytes
        if self._sent_bytes - last >= self._window.stride:
            self._ask()

    def _ask(self) -> None:
        assert self.transport is not None
        self.transport.write(PREFIX.pack(ASK, self._sent_bytes))
        self._asked.append((self._sent_bytes, asyncio.get_running_loop().time()))


class FramedStream:
    """A stream of frames over a byte transport; satisfies `averaging.network.Stream`."""

    def __init__(
        self, protocol: FrameProtocol, owner: object, superseded: Callable[[], bool] = lambda: False
    ) -> None:
        self.remote, self._superseded = protocol.remote, superseded
        self._protocol, self._sending = protocol, asyncio.Lock()
        self._finishing = False
        self._owner = owner  # the engine's reader and writer: dropping them would close the transport

    @property
    def superseded(self) -> bool:
        return self._superseded()

    async def send(self, header: bytes, payload: Buffer = b"") -> None:
        protocol = self._protocol
        async with self._sending:
            await protocol.room()
            assert protocol.transport is not None
            view = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
            lead = PREFIX.pack(len(header), len(view)) + header
            if not view:
                protocol.transport.write(lead)
            while view:
                chunk = view[: await protocol.credit()]
                protocol.transport.write(lead + PREFIX.pack(CHUNK, len(chunk)))
                protocol.transport.write(chunk)
                protocol.sent(len(chunk))
                view, lead = view[len(chunk) :], b""

    async def receive(self, silence_s: float | None = None) -> Frame | None:
        return await self._protocol.next_frame(silence_s)

    async def finish(self) -> None:
        self._finishing = True
        protocol = self._protocol
        async with self._sending:
            await protocol.room()
            assert protocol.transport is not None
            protocol.transport.write(PREFIX.pack(LAST_FRAME, 0))
        # Whoever closes first may cut off what is still under way: wait until the other end has closed, or
        # has said its own last frame.
        await protocol.other_end_is_done(FINISH_S)
        protocol.fail("closed here")

    def abort(self) -> None:
        self._protocol.fail("closed here")

    def abort_if_silent(self) -> None:
        """For whoever served the stream, when the first frame is due: the dialer speaks first."""
        if not self._protocol.has_received:
            self.abort()

    def abort_unless_finished(self) -> None:
        """For whoever served the stream, after its handler."""
        if not self._finishing:
            self.abort()
