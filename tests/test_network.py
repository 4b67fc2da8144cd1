"""One contract suite for all networks: hivemind's, with and without its daemons, and the in-memory twin."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
import uvloop

from averaging import virtual_time
from averaging.errors import LinkError
from averaging.memory_network import Link, MemoryHub
from averaging.network import Calls, Frame, answer
from swarm.process import joined


@contextlib.asynccontextmanager
async def memory_pair():
    hub = MemoryHub(link=lambda a, b: Link(latency_s=0.001))
    yield hub.network("a"), hub.network("b")


@contextlib.asynccontextmanager
async def hivemind_pair():
    async with joined([]) as a, joined([a.addresses[0]]) as b:
        yield a.network, b.network


@contextlib.asynccontextmanager
async def daemon_pair():
    """As where no direct connection is possible."""
    async with hivemind_pair() as (a, b):
        for network in (a, b):
            network._listener.close()
        yield a, b


@contextlib.asynccontextmanager
async def direct_pair():
    """With the direct path from the first to the second known."""
    async with hivemind_pair() as (a, b):
        await b.serve("first", echo)
        await Calls(a, "first", deadline_s=10).call(b.peer_id, b"")
        async with asyncio.timeout(10):
            while not a._paths.knows(b.peer_id):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield a, b


PAIRS = {"memory": memory_pair, "daemons": daemon_pair, "direct": direct_pair}


def on_all(test):
    """Run a coroutine test on every network: `test(dialer, listener)`."""
    real = [pytest.param(kind, marks=pytest.mark.real) for kind in ("daemons", "direct")]

    @pytest.mark.parametrize("kind", ["memory", *real])
    def run(kind):
        async def main():
            async with PAIRS[kind]() as (a, b):
                await test(a, b)

        (virtual_time.run if kind == "memory" else uvloop.run)(main())

    run.__name__ = test.__name__
    return run


async def echo(stream):
    async def respond(sender, frame):
        return frame.header + sender.encode(), frame.payload

    await answer(stream, respond)


@on_all
async def test_a_frame_arrives_whole_and_its_answer_too(a, b):
    await b.serve("echo", echo, max_payload_bytes=1 << 24)
    calls = Calls(a, "echo", deadline_s=10, max_payload_bytes=1 << 24)
    for size in (0, 1, 65_537, 3_000_000):
        payload = os.urandom(size)
        frame = await calls.call(b.peer_id, b"hello", payload)
        assert frame.header == b"hello" + a.peer_id.encode()
        assert bytes(frame.payload) == payload
    calls.close()


@on_all
async def test_a_service_that_is_withdrawn_breaks_its_streams_and_may_be_served_anew(a, b):
    async def other(stream):
        async def respond(sender, frame):
            return b"another", b""

        await answer(stream, respond)

    for network in (a, b):  # also to itself
        await b.serve("echo", echo)
        await b.serve("other", echo)
        calls = Calls(network, "echo", deadline_s=5)
        others = Calls(network, "other", deadline_s=5)
        assert (await calls.call(b.peer_id, b"x")).header == b"x" + network.peer_id.encode()
        await others.call(b.peer_id, b"x")
        b.unserve("echo")
        b.unserve("echo")
        with pytest.raises(LinkError):
            await calls.call(b.peer_id, b"x")
        await b.serve("echo", other)
        assert (await calls.call(b.peer_id, b"x")).header == b"another"
        assert (await others.call(b.peer_id, b"y")).header == b"y" + network.peer_id.encode()
        calls.close()
        others.close()


@on_all
async def test_many_calls_at_once_do_not_mix(a, b):
    await b.serve("echo", echo, max_payload_bytes=1 << 20)
    calls = Calls(a, "echo", deadline_s=10, max_payload_bytes=1 << 20)
    payloads = [os.urandom(1000 + 37 * i) for i in range(40)]
    frames = await asyncio.gather(*(calls.call(b.peer_id, b"", p) for p in payloads))
    assert [bytes(f.payload) for f in frames] == payloads
    calls.close()


@on_all
async def test_a_finished_stream_ends_with_none_and_an_aborted_one_with_an_error(a, b):
    ends = asyncio.Queue()

    async def listen(stream):
        try:
            while (frame := await stream.receive()) is not None:
                await ends.put(frame.header)
            await ends.put("finished")
        except LinkError:
            await ends.put("broken")

    await b.serve("listen", listen)
    stream = await a.open(b.peer_id, "listen")
    await stream.send(b"1")
    await stream.finish()
    assert [await ends.get(), await ends.get()] == [b"1", "finished"]
    stream = await a.open(b.peer_id, "listen")
    await stream.send(b"2")
    assert await ends.get() == b"2"
    stream.abort()
    assert await ends.get() == "broken"


@on_all
async def test_everything_sent_before_the_end_arrives(a, b):
    """Closing must not cut off what is under way (it did, with a plain close)."""

    async def pour(stream):
        await stream.receive()
        for number in range(40):
            await stream.send(str(number).encode(), bytes(100_000))
        await stream.finish()

    await b.serve("pour", pour)
    stream = await a.open(b.peer_id, "pour", max_payload_bytes=100_000)
    await stream.send(b"pour")
    got = []
    while (frame := await stream.receive()) is not None:
        got.append(int(frame.header))
    stream.abort()
    assert got == list(range(40))


@on_all
async def test_a_payload_over_the_bound_breaks_only_its_own_stream(a, b):
    await b.serve("echo", echo, max_payload_bytes=1000)
    calls = Calls(a, "echo", deadline_s=10, max_payload_bytes=1000)
    with pytest.raises(LinkError):
        await calls.call(b.peer_id, b"", bytes(1001))
    assert bytes((await calls.call(b.peer_id, b"", bytes(1000))).payload) == bytes(1000)
    calls.close()


@on_all
async def test_a_service_that_is_not_served_is_a_link_error(a, b):
    with pytest.raises(LinkError):
        await a.open(b.peer_id, "nothing")


@on_all
async def test_a_process_can_dial_itself(a, b):
    await a.serve("echo", echo)
    calls = Calls(a, "echo", deadline_s=10)
    assert (await calls.call(a.peer_id, b"me")).header == b"me" + a.peer_id.encode()
    calls.close()


@on_all
async def test_a_handler_that_returns_early_breaks_the_stream(a, b):
    async def leave(stream):
        await stream.receive()

    await b.serve("leave", leave)
    stream = await a.open(b.peer_id, "leave")
    await stream.send(b"x")
    with pytest.raises(LinkError):
        await stream.receive()


@on_all
async def test_a_call_that_is_not_answered_in_time_is_a_link_error(a, b):
    async def sleep(stream):
        await stream.receive()
        await asyncio.sleep(60)

    await b.serve("sleep", sleep)
    calls = Calls(a, "sleep", deadline_s=0.3)
    with pytest.raises(LinkError, match="within"):
        await calls.call(b.peer_id, b"x")


def test_the_memory_network_drops_duplicates_and_breaks_as_told():
    async def main():
        fates = iter(["twice", "deliver", "break_before", "deliver", "deliver", "break_after", "deliver"])
        hub = MemoryHub(fate=lambda a, b, service, request: next(fates, "deliver") if request else "deliver")
        a, b = hub.network("a"), hub.network("b")
        heard = []

        async def listen(stream):
            async def respond(sender, frame):
                heard.append(frame.header)
                return frame.header, b""

            await answer(stream, respond)

        await b.serve("listen", listen)
        calls = Calls(a, "listen", deadline_s=5)
        assert (await calls.call("b", b"1")) == Frame(b"1", b"")
        await asyncio.sleep(1)
        assert heard == [b"1", b"1"]

    virtual_time.run(main())


@pytest.mark.real
def test_the_daemon_does_not_outlive_a_killed_process(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    program = (
        "import asyncio, pathlib, sys, uvloop\n"
        "from swarm.process import joined\n"
        "async def main():\n"
        f"    async with joined([], identity=pathlib.Path({str(tmp_path / 'identity')!r})) as here:\n"
        "        print(here.network._p2p._child.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "uvloop.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    daemon = int(process.stdout.readline())
    assert _is_running(daemon)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while _is_running(daemon):
        assert time.monotonic() < end, "the daemon is a ghost"
        os.sched_yield()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
