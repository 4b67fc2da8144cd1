"""Finding and losing peers on the real network: where they are dialled, and what proves that one is gone."""

import asyncio
import socket
import sys

import pytest
import uvloop
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from averaging.daemon import connect
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


async def is_refused(network, peer):
    """Does dialling `peer` fail with proof that it is gone?"""
    with pytest.raises(LinkError) as caught:
        await network.open(peer, "echo")
    return caught.value.refused


async def until_refused(network, peer):
    """Wait for the daemon of a killed process to end, too."""
    async with asyncio.timeout(10):
        while not await is_refused(network, peer):
            pass


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
                await until_refused(here.network, peer)
                for _ in range(3):  # also while the daemon waits before it dials there again
                    assert await is_refused(here.network, peer)
        finally:
            if server.returncode is None:
                server.kill()
            await server.wait()

    uvloop.run(main())


def test_also_one_that_had_dialled_us_is_known_to_be_gone():
    async def main():
        async with joined([]) as here, joined([]) as other:
            await here.network.serve("echo", echo)
            await other.network.serve("echo", echo)
            other.network.use_addresses(at(here.addresses))
            here.network.use_addresses(at(other.addresses))
            peer = other.network.peer_id
            await Calls(other.network, "echo", deadline_s=10).call(here.network.peer_id, b"hello")
            stream = await here.network.open(peer, "echo")  # over the connection that is there
            other.network._p2p._child.kill()
            with pytest.raises(LinkError):
                await stream.receive()
            await until_refused(here.network, peer)

    uvloop.run(main())


def test_connecting_without_a_daemon_or_an_address_fails_as_one_thing():
    async def main():
        async with joined([]) as here, joined([]) as other:
            p2p, peer = here.network._p2p, other.network.peer_id
            with pytest.raises(P2PDaemonError, match="no address in 'nonsense'"):
                await connect(p2p, peer, ["nonsense"])
            p2p._child.kill()
            await p2p._child.wait()
            with pytest.raises(P2PDaemonError, match="does not answer"):
                await connect(p2p, peer, ["nonsense", *other.addresses])

    uvloop.run(main())


def test_a_process_that_does_not_serve_yet_may_be_alive():
    async def main():
        async with joined([]) as a, joined([]) as b:
            a.network.use_addresses(at(b.addresses))
            with pytest.raises(LinkError, match="serves no") as caught:
                await a.network.open(b.network.peer_id, "echo")
            assert not caught.value.refused

    uvloop.run(main())


def test_a_dialer_that_says_nothing_is_hung_up_on(monkeypatch):
    monkeypatch.setattr("averaging.hivemind_network.FIRST_FRAME_S", 1.0)

    async def main():
        async with joined([]) as a, joined([]) as b:
            await b.network.serve("echo", echo)
            a.network.use_addresses(at(b.addresses))
            talking = await a.network.open(b.network.peer_id, "echo")
            await talking.send(b"hello")
            assert (await talking.receive()).header == b"hello"
            silent = await a.network.open(b.network.peer_id, "echo")
            with pytest.raises(LinkError):
                await silent.receive()
            await talking.send(b"still here")
            assert (await talking.receive()).header == b"still here"

    uvloop.run(main())


def test_a_refusal_where_the_peer_never_answered_proves_nothing():
    """Its private address may be somebody else's machine in this network."""

    async def main():
        async with joined([]) as here, joined([]) as other:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            here.network.use_addresses(at([f"/ip4/127.0.0.1/tcp/{port}"]))
            assert not await is_refused(here.network, other.network.peer_id)

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
