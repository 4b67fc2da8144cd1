"""Direct links between processes: who gets in, and what becomes of everybody else. Real sockets, real TLS."""

import asyncio
import os
import socket
from dataclasses import replace

import pytest
import uvloop

from averaging import direct
from averaging.direct import HELLO, OFFER, DirectListener, DirectPaths
from averaging.errors import LinkError
from averaging.network import Calls
from swarm.process import DIRECT_PORT, joined
from tests.test_network import direct_pair, echo

pytestmark = pytest.mark.real


class Door:
    """A listener that notes who comes and says `hi`."""

    def __init__(self):
        self.came = []
        self.listener = DirectListener(self._answer)

    async def _answer(self, peer, service, reader, writer):
        self.came.append((peer, service))
        writer.write(b"hi")

    async def open(self):
        await self.listener.start("127.0.0.1", 0)
        return self

    def port_of(self, offer):
        return OFFER.unpack(offer)[0]


def test_whoever_has_an_offer_is_known_by_it():
    async def main():
        door = await Door().open()
        for peer in ("ann", "bob"):
            paths = DirectPaths()
            await paths.find("door", door.listener.offer_to(peer), ["127.0.0.1"])
            reader, _ = await paths.open("door", "hop")
            assert await reader.readexactly(2) == b"hi"
        assert door.came == [("ann", "hop"), ("bob", "hop")]
        door.listener.close()

    uvloop.run(main())


def test_nobody_says_a_token_to_another_certificate():
    async def main():
        door, other = await Door().open(), await Door().open()
        offer, paths = door.listener.offer_to("ann"), DirectPaths()
        _, token, certificate = OFFER.unpack(offer)
        other.listener._peers[token] = "ann"  # it would know her by it
        elsewhere = other.port_of(other.listener.offer_to("ann"))
        await paths.find("door", OFFER.pack(elsewhere, token, certificate), ["127.0.0.1"])
        assert not paths.knows("door")
        paths._paths["door"] = direct._Path("127.0.0.1", elsewhere, token, certificate)
        with pytest.raises(OSError, match="certificate"):
            await paths.open("door", "hop")
        await paths.find("door", offer, ["127.0.0.1"])
        reader, _ = await paths.open("door", "hop")
        assert await reader.readexactly(2) == b"hi" and not other.came

    uvloop.run(main())


def test_an_invented_token_opens_nothing():
    async def main():
        door, paths = await Door().open(), DirectPaths()
        port, _, certificate = OFFER.unpack(door.listener.offer_to("ann"))
        await paths.find("door", OFFER.pack(port, bytes(16), certificate), ["127.0.0.1"])
        reader, _ = await paths.open("door", "hop")
        with pytest.raises((EOFError, OSError)):
            await reader.readexactly(2)
        assert not door.came

    uvloop.run(main())


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100_000)])
def test_who_speaks_no_tls_is_hung_up_on(monkeypatch, words):
    monkeypatch.setattr(direct, "HELLO_S", 0.3)

    async def main():
        door = await Door().open()
        port = door.port_of(door.listener.offer_to("ann"))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(words)
        with pytest.raises((EOFError, OSError)):
            async with asyncio.timeout(5):
                await reader.readexactly(1 << 20)
        assert not door.came

    uvloop.run(main())


def test_those_who_say_nothing_shut_out_their_own_host_for_a_moment_only(monkeypatch):
    usual_s = direct.HELLO_S
    monkeypatch.setattr(direct, "HELLO_S", 2.0)
    monkeypatch.setattr(direct, "MOST_WAITING_EACH", 4)

    async def main():
        door, paths = await Door().open(), DirectPaths()
        offer = door.listener.offer_to("ann")
        port = door.port_of(offer)
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
        async with asyncio.timeout(10):
            while len(door.listener._waiting) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await paths.find("door", offer, ["127.0.0.1"])
        assert not paths.knows("door") and len(door.listener._waiting) == 4
        _, elsewhere = await asyncio.open_connection(
            "127.0.0.1", port, ssl=paths._context, local_addr=("127.0.0.2", 0)
        )
        elsewhere.close()
        async with asyncio.timeout(10):
            while door.listener._waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        monkeypatch.setattr(direct, "HELLO_S", usual_s)
        await paths.find("door", offer, ["127.0.0.1"])
        assert paths.knows("door")
        for each in silent:
            each.close()

    uvloop.run(main())


def test_a_short_hello_or_an_unknown_service_is_hung_up_on(monkeypatch):
    async def main():
        async with direct_pair() as (a, b):
            monkeypatch.setattr(direct, "HELLO_S", 2.0)
            path = a._paths._paths[b.peer_id]
            for hello in (HELLO.pack(path.token, b"no such service"), HELLO.pack(path.token, b"first")[:-1]):
                reader, writer = await a._paths._connect(path)
                writer.write(hello)
                with pytest.raises((EOFError, ConnectionError)):
                    async with asyncio.timeout(10):
                        await reader.readexactly(1)

    uvloop.run(main())


def test_both_ends_notice_when_the_other_machine_vanishes():
    async def main():
        door, paths, ends = await Door().open(), DirectPaths(), []

        async def answer(peer, service, reader, writer):
            ends.append(writer)
            writer.write(b"hi")

        door.listener._answer = answer
        await paths.find("door", door.listener.offer_to("ann"), ["127.0.0.1"])
        reader, writer = await paths.open("door", "hop")
        await reader.readexactly(2)
        for end in (*ends, writer):
            connection = end.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 35_000
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 20

    uvloop.run(main())


def test_a_stream_for_which_there_is_no_room_is_closed_although_the_other_end_does_not_agree(monkeypatch):
    def visit(paths, path):
        connection = socket.create_connection((path.host, path.port))
        with paths._context.wrap_socket(connection) as tls, socket.socket(fileno=os.dup(tls.fileno())) as raw:
            tls.sendall(HELLO.pack(path.token, b"first"))
            assert tls.recv(4) == b"SWRM"  # busy, not gone
            raw.settimeout(5)
            while raw.recv(4096):  # without TLS, so without a goodbye
                pass

    async def main():
        async with direct_pair() as (a, b):
            monkeypatch.setattr("averaging.hivemind_network.STREAMS_EACH", 0)
            await asyncio.to_thread(visit, a._paths, a._paths._paths[b.peer_id])

    uvloop.run(main())


def test_a_path_on_which_nobody_answers_any_more_is_given_up_even_by_impatient_callers():
    async def main():
        async with direct_pair() as (a, b):
            with socket.create_server(("127.0.0.1", 0)) as silent:
                path = a._paths._paths[b.peer_id]
                a._paths._paths[b.peer_id] = replace(path, port=silent.getsockname()[1])
                calls = Calls(a, "first", deadline_s=1.0)
                with pytest.raises(LinkError):
                    await calls.call(b.peer_id, b"")
                assert not a._paths.knows(b.peer_id)
                await calls.call(b.peer_id, b"", deadline_s=10)  # through the daemons

    uvloop.run(main())


def test_a_taken_port_leaves_direct_links_at_another():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] - DIRECT_PORT

        async def main():
            async with joined([], port=port) as here:
                assert 0 != here.network._listener._port != taken.getsockname()[1]

        uvloop.run(main())


def test_kept_streams_move_to_the_direct_path_and_back_when_it_breaks():
    async def main():
        async with direct_pair() as (a, b):
            await b.serve("echo", echo, max_payload_bytes=1000)
            calls = Calls(a, "echo", deadline_s=10, max_payload_bytes=1000)
            path = a._paths._paths.pop(b.peer_id)
            await calls.call(b.peer_id, b"through the daemons")
            a._paths._paths[b.peer_id] = path

            def is_direct(stream):
                return stream._protocol.transport.get_extra_info("ssl_object") is not None

            for _ in range(2):
                assert (await calls.call(b.peer_id, b"x", b"y")).payload == b"y"
            (kept,) = calls._idle[b.peer_id]
            assert is_direct(kept) and not kept.superseded
            b._listener.close()
            kept.abort()
            assert (await calls.call(b.peer_id, b"x", b"z")).payload == b"z"
            (kept,) = calls._idle[b.peer_id]
            assert not is_direct(kept) and not a._paths.knows(b.peer_id)

    uvloop.run(main())
