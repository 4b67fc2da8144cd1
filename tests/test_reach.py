"""Whether somebody is there, before a daemon is given their addresses."""

import asyncio
import socket

import pytest

from averaging.errors import NoAnswerError
from swarm.reach import reachable, some_reachable

PEER = "p2p/QmNvKxFYBNVeWoKv1xXcYFRzTpPhHbPvTvDsuTAzRvDpKp"
DEAD = f"/ip4/127.0.0.1/tcp/1/{PEER}"
UNKNOWN = f"/dns4/swarm.example/tcp/31337/{PEER}"


def test_of_plain_addresses_those_where_somebody_listens():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            alive = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}/{PEER}"
            assert await reachable([DEAD, alive, UNKNOWN, f"/ip4/127.0.0.1/tcp/99999/{PEER}"]) == [alive]
            assert await some_reachable([DEAD, alive, UNKNOWN]) == [alive, UNKNOWN], (
                "a daemon may know better"
            )

    asyncio.run(main())


def test_who_comes_within_the_time_is_found_and_else_it_is_told():
    async def main():
        with socket.socket() as late:
            late.bind(("127.0.0.1", 0))
            address = f"/ip4/127.0.0.1/tcp/{late.getsockname()[1]}/{PEER}"
            asyncio.get_running_loop().call_later(0.3, late.listen)
            assert await some_reachable([address], patience_s=5) == [address]
        with pytest.raises(
            NoAnswerError, match=r"no answer from .* within 1 s: check that the organizer runs"
        ):
            await some_reachable([DEAD], patience_s=1)
        assert await some_reachable([]) == []

    asyncio.run(main())
