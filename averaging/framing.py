"""Frames on a raw byte stream: a 12-byte prefix (header length, payload length), header, payload.

The protocol reads straight into the buffer a frame ends up in: the payload's buffer is allocated once
its length has passed the bound, and the socket fills it. A frame under way must keep moving: a piece
that makes no progress within `progress_s` breaks the stream, on both ends. Between frames a stream
may rest as long as its users like.

I/O: one asyncio loop; no threads.
"""

import asyncio
import struct
from collections import deque

from averaging.errors import LinkError
from averaging.network import LOOKS, MAX_HEADER_BYTES, Buffer, Frame, PeerId

PREFIX = struct.Struct("<IQ")
LAST_FRAME = 0xFFFFFFFF  # as header length: the explicit end
PIECE_BYTES = 1 << 18  # one write: small enough to notice a stalled reader, large enough to be cheap
FINISH_S = 3.0
UNREAD_FRAMES = 2  # beyond this the socket is not read until the user has caught up


class FrameProtocol(asyncio.BufferedProtocol):
    """Turns bytes into frames and back; `FramedStream` is its user's side."""

    def __init__(self, remote: PeerId, max_payload_bytes: int, progress_s: float) -> None:
        self.remote, self.progress_s, self._max_payload_bytes = remote, progress_s, max_payload_bytes
        self._prefix = bytearray(PREFIX.size)
        self._target: bytearray = self._prefix
        self._filled, self._payload_bytes = 0, 0
        self._header: bytes | None = b""  # None: it is what is being read
        self._frames: deque[Frame | None] = deque()
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
        transport.set_write_buffer_limits(high=2 * PIECE_BYTES)
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
            header_bytes, self._payload_bytes = PREFIX.unpack(target)
            if header_bytes == LAST_FRAME:
                self._emit(None)
                self._expect(self._prefix)
            elif header_bytes > MAX_HEADER_BYTES or self._payload_bytes > self._max_payload_bytes:
                self.fail(f"frame of {header_bytes} + {self._payload_bytes} bytes exceeds the bound")
            else:
                self._header = None
                self._expect(bytearray(header_bytes))
        elif self._header is None:
            self._header = bytes(target)
            self._expect(bytearray(self._payload_bytes))
        else:
            self._emit(Frame(self._header, target))
            self._expect(self._prefix)

    def _expect(self, target: bytearray) -> None:
        self._target, self._filled = target, 0

    def _emit(self, frame: Frame | None) -> None:
        self._frames.append(frame)
        self._readable.set()
        if len(self._frames) >= UNREAD_FRAMES and not self._paused and self.transport is not None:
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
            under_way = self._target is not self._prefix or self._filled > 0
            try:
                async with asyncio.timeout(limit_s / LOOKS):
                    await self._readable.wait()
            except TimeoutError:
                if self._received_bytes != seen or not (under_way or silence_s):
                    heard_s, seen = loop.time(), self._received_bytes
                elif loop.time() - heard_s >= limit_s:
                    self.fail(f"silent for {limit_s:.1f} s{' in a frame' * under_way}")
        frame = self._frames.popleft()
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


class FramedStream:
    """A stream of frames over a byte transport; satisfies `averaging.network.Stream`."""

    def __init__(self, protocol: FrameProtocol, owner: object) -> None:
        self.remote = protocol.remote
        self._protocol, self._sending = protocol, asyncio.Lock()
        self._finishing = False
        self._owner = owner  # the engine's reader and writer: dropping them would close the transport

    async def send(self, header: bytes, payload: Buffer = b"") -> None:
        protocol = self._protocol
        async with self._sending:
            await protocol.room()
            assert protocol.transport is not None
            view = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
            protocol.transport.write(PREFIX.pack(len(header), len(view)) + header)
            for start in range(0, len(view), PIECE_BYTES):
                await protocol.room()
                protocol.transport.write(view[start : start + PIECE_BYTES])

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
