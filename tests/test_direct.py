"""Direct links between processes: who gets in, and what becomes of everybody else. Real sockets, real TLS."""

import asyncio
import socket

import pytest
import uvloop

from averaging import direct
from averaging.direct import HELLO, OFFER, DirectListener, DirectPaths
from averaging.network import Calls
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
        elsewhere = other.port_of(other.listener.offer_to("ann"))
        await paths.find("door", OFFER.pack(elsewhere, token, certificate), ["127.0.0.1"])
        assert not paths.knows("door") and not other.came
        await paths.find("door", offer, ["127.0.0.1"])
        assert paths.knows("door")

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


def test_those_who_say_nothing_shut_others_out_for_a_moment_only(monkeypatch):
    monkeypatch.setattr(direct, "HELLO_S", 0.5)
    monkeypatch.setattr(direct, "MOST_WAITING", 4)

    async def main():
        door, paths = await Door().open(), DirectPaths()
        offer = door.listener.offer_to("ann")
        silent = [socket.create_connection(("127.0.0.1", door.port_of(offer))) for _ in range(4)]
        while len(door.listener._waiting) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await paths.find("door", offer, ["127.0.0.1"])
        assert not paths.knows("door")
        while door.listener._waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await paths.find("door", offer, ["127.0.0.1"])
        assert paths.knows("door")
        for each in silent:
            each.close()

    uvloop.run(main())


def test_a_hello_of_another_length_or_an_unknown_service_is_hung_up_on():
    async def main():
        async with direct_pair() as (a, b):
            ends = await a._paths.open(b.peer_id, "no such service")
            with pytest.raises((EOFError, OSError)):
                await ends[0].readexactly(1)
            path = a._paths._paths[b.peer_id]
            reader, writer = await a._paths._connect(path)
            writer.write(HELLO.pack(path.token, b"first")[:-1])
            writer.write_eof() if writer.can_write_eof() else writer.close()
            with pytest.raises((EOFError, OSError)):
                await reader.readexactly(1)

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
