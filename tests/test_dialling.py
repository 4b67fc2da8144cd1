"""Finding and losing peers on the real network: where they are dialled, and what proves that one is gone."""

import asyncio
import socket
import sys

import pytest
import uvloop

from averaging.errors import LinkError
from averaging.network import Calls, answer
from swarm.process import joined

pytestmark = pytest.mark.real

SERVER = """
import asyncio, uvloop
from swarm.process import joined
from tests.test_dialling import echo
async def main():
    async with joined([]) as here:
        await here.network.serve("echo", echo)
        print(here.network.peer_id, here.addresses[0], flush=True)
        await asyncio.sleep(60)
uvloop.run(main())
"""


async def echo(stream):
    async def respond(sender, frame):
        return frame.header, b""

    await answer(stream, respond)


def at(addresses):
    async def find(peer):
        return addresses

    return find


def test_a_peer_that_the_daemons_do_not_find_is_dialled_at_the_address_it_announced():
    async def main():
        async with joined([]) as a, joined([]) as b:  # no bootstrap peer in common
            await b.network.serve("echo", echo)
            a.network.use_addresses(at(b.addresses))
            calls = Calls(a.network, "echo", deadline_s=10)
            assert (await calls.call(b.network.peer_id, b"hello")).header == b"hello"

    uvloop.run(main())


def test_a_killed_process_is_known_to_be_gone():
    async def main():
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            peer, address = (await server.stdout.readline()).decode().split()
            async with joined([]) as here:
                here.network.use_addresses(at([address]))
                stream = await here.network.open(peer, "echo")
                server.kill()
                with pytest.raises(LinkError):
                    await stream.receive()
                for _ in range(3):  # at once, and while the daemon waits before it dials there again
                    with pytest.raises(LinkError) as caught:
                        await here.network.open(peer, "echo")
                    assert caught.value.refused, caught.value
        finally:
            if server.returncode is None:
                server.kill()
            await server.wait()

    uvloop.run(main())


def test_a_daemon_without_the_service_is_no_peer():
    async def main():
        async with joined([]) as a, joined([]) as b:
            a.network.use_addresses(at(b.addresses))
            with pytest.raises(LinkError, match="serves no") as caught:
                await a.network.open(b.network.peer_id, "echo")
            assert caught.value.refused

    uvloop.run(main())


def test_a_dialer_that_says_nothing_is_hung_up_on(monkeypatch):
    monkeypatch.setattr("swarm.hivemind_network.FIRST_FRAME_S", 0.2)

    async def main():
        async with joined([]) as a, joined([]) as b:
            await b.network.serve("echo", echo)
            a.network.use_addresses(at(b.addresses))
            silent, talking = [await a.network.open(b.network.peer_id, "echo") for _ in range(2)]
            await talking.send(b"hello")
            assert (await talking.receive()).header == b"hello"
            with pytest.raises(LinkError):
                await silent.receive()
            await talking.send(b"still here")
            assert (await talking.receive()).header == b"still here"

    uvloop.run(main())


def test_a_machine_that_cannot_be_reached_proves_nothing():
    async def main():
        async with joined([]) as here, joined([]) as other:
            peer = other.network.peer_id
            with pytest.raises(LinkError, match="announced no address") as caught:
                await here.network.open(peer, "echo")
            assert not caught.value.refused
            with socket.create_server(("127.0.0.1", 0)) as deaf:  # somebody is there, and says nothing
                here.network.use_addresses(at([f"/ip4/127.0.0.1/tcp/{deaf.getsockname()[1]}"]))
                with pytest.raises(LinkError) as caught:
                    await here.network.open(peer, "echo")
                assert not caught.value.refused

    uvloop.run(main())
