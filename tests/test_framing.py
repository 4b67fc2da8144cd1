"""Frames over a real socket: whole, bounded on the way; strangers' bytes end one stream only."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from averaging.errors import LinkError
from averaging.flow import FIRST_BYTES, LEAST_BYTES, MOST_BYTES, QUEUE_S, Window
from averaging.framing import ASK, CHUNK, ECHO, PREFIX, UNREAD_ECHO_BYTES, FramedStream, FrameProtocol

MOST = 8 << 20


def on_a_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: object) -> None:
        uvloop.run(test(**arguments))

    return run


async def attached(
    end: socket.socket, *, progress_s: float = 5.0, window: Window | None = None
) -> FramedStream:
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=end)
    protocol = FrameProtocol("remote", MOST, progress_s, window)
    protocol.attach(transport)
    return FramedStream(protocol, None)


@contextlib.asynccontextmanager
async def pair(window: Window | None = None):
    """Both ends of one stream."""
    ours, theirs = socket.socketpair()
    a, b = await attached(ours, window=window), await attached(theirs, window=window)
    try:
        yield a, b
    finally:
        a.abort()
        b.abort()


@contextlib.asynccontextmanager
async def stream_and_socket(*, progress_s: float = 5.0):
    """One end of a stream, and the bare socket at the other."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    stream = await attached(ours, progress_s=progress_s)
    try:
        yield stream, theirs
    finally:
        stream.abort()
        theirs.close()


@pytest.mark.parametrize("megabytes_per_s", [0.05, 0.5, 5, 50])
def test_a_window_settles_where_bytes_wait_a_moment_and_no_longer(megabytes_per_s):
    window, rate, took_s, sent_bytes = Window(), megabytes_per_s * 1e6, [], 0
    for _ in range(2000):
        sent_bytes += window.stride
        queued_bytes = 2 * min(sent_bytes, window.bytes)  # of two streams
        took_s.append(max(0.03, queued_bytes / rate))
        window.echoed(window.stride, took_s[-1], held_back=True)
    waiting_s = took_s[-1] - took_s[0]
    assert 0.8 * QUEUE_S < waiting_s < 1.2 * QUEUE_S + 0.3 * took_s[0]


def test_a_window_that_holds_nobody_back_does_not_grow_and_a_short_way_opens_it():
    window = Window()
    window.echoed(FIRST_BYTES, 0.001, held_back=False)
    assert window.bytes == FIRST_BYTES
    for _ in range(40):
        window.echoed(window.stride, 0.001, held_back=True)
    assert window.bytes == MOST_BYTES


@pytest.mark.parametrize("bytes_", [0, 1, 1000, LEAST_BYTES // 4, LEAST_BYTES + 1, 3_000_001])
@on_a_loop
async def test_frames_arrive_whole_in_both_directions_at_once(bytes_):
    window = Window()
    window.bytes = LEAST_BYTES
    payload = bytes(range(256)) * (bytes_ // 256) + bytes(bytes_ % 256)
    async with pair(window) as (a, b), asyncio.timeout(30):

        async def send(stream: FramedStream) -> None:
            for index in range(5):
                await stream.send(b"%d" % index, payload)

        async def receive(stream: FramedStream) -> list[tuple[bytes, bytes]]:
            frames = [await stream.receive() for _ in range(5)]
            return [(frame.header, bytes(frame.payload)) for frame in frames]

        _, _, *heard = await asyncio.gather(send(a), send(b), receive(a), receive(b))
    assert heard == [[(b"%d" % index, payload) for index in range(5)]] * 2


@on_a_loop
async def test_no_more_is_under_way_than_the_window_and_silence_ends_the_stream():
    async with stream_and_socket(progress_s=0.3) as (stream, other):
        sending = asyncio.create_task(stream.send(b"", bytes(MOST)))
        arrived, loop = 0, asyncio.get_running_loop()
        while arrived < FIRST_BYTES:
            arrived += len(await loop.sock_recv(other, 1 << 16))
        with pytest.raises(LinkError, match=r"nothing arrived for 0\.3 s"):
            await sending
        while some := await loop.sock_recv(other, 1 << 16):
            arrived += len(some)
    assert FIRST_BYTES < arrived < 1.3 * FIRST_BYTES


@on_a_loop
async def test_signs_of_life_that_nobody_reads_do_not_hold_up_what_comes_the_other_way():
    async with pair() as (a, b), asyncio.timeout(30):
        for _ in range(100):
            await a.send(b"alive")
        sending = asyncio.create_task(b.send(b"mean", bytes(MOST)))
        frame = await a.receive()
        await sending
        assert frame.header == b"mean" and len(frame.payload) == MOST


@on_a_loop
async def test_a_reader_that_is_behind_holds_the_sender_back():
    async with pair() as (a, b), asyncio.timeout(30):
        sending = [asyncio.create_task(a.send(b"%d" % index, bytes(1 << 20))) for index in range(40)]
        await asyncio.sleep(0.3)
        assert sum(task.done() for task in sending) < 20
        for index in range(40):
            frame = await b.receive()
            assert frame.header == b"%d" % index
        await asyncio.gather(*sending)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (PREFIX.pack(ECHO, 5), "echo of 5 bytes that nobody asked for"),
        (PREFIX.pack(CHUNK, 5), "chunk of 5 bytes in the wrong place"),
        (PREFIX.pack(2, 8) + b"hi" + PREFIX.pack(CHUNK, 9), "chunk of 9 bytes in the wrong place"),
        (PREFIX.pack(2, 8) + b"hi" + PREFIX.pack(CHUNK, 0), "chunk of 0 bytes in the wrong place"),
        (PREFIX.pack(2, 8) + b"hi" + PREFIX.pack(2, 0), "frame within a frame"),
        (PREFIX.pack(2, MOST + 1), "exceeds the bound"),
        (PREFIX.pack(1 << 31, 0), "exceeds the bound"),
    ],
)
@on_a_loop
async def test_malformed_bytes_end_the_stream_and_say_why(said, why):
    async with stream_and_socket() as (stream, other), asyncio.timeout(10):
        await asyncio.get_running_loop().sock_sendall(other, said)
        with pytest.raises(LinkError, match=why):
            await stream.receive()


@on_a_loop
async def test_who_asks_and_does_not_read_is_cut_off():
    async with stream_and_socket() as (stream, other), asyncio.timeout(60):
        questions = PREFIX.pack(ASK, 0) * 1000
        with contextlib.suppress(OSError):
            for _ in range(100 * UNREAD_ECHO_BYTES // len(questions)):
                await asyncio.get_running_loop().sock_sendall(other, questions)
        with pytest.raises(LinkError, match="asks, but does not read"):
            await stream.receive()
