"""Is anybody there? A look at addresses before the libp2p daemon is given them: it does not try again.

I/O: connections that are closed at once.
"""

import asyncio
import logging
import re
from collections.abc import Sequence

from averaging.daemon import no_answer

DIAL_S, AGAIN_S = 1.0, 0.5
MOST_PORT = 65_535
PATIENCE_S = 20.0  # an organizer that is started again is back by then
_TCP_ADDRESS = re.compile(r"/ip[46]/([^/]+)/tcp/(\d{1,5})/p2p/\w+")
log = logging.getLogger(__name__)


def tcp_place(address: str) -> tuple[str, int] | None:
    """(host, port) of an address that is plain TCP."""
    found = _TCP_ADDRESS.fullmatch(address)
    place = (found[1], int(found[2])) if found else None
    return place if place and place[1] <= MOST_PORT else None


async def reachable(addresses: Sequence[str]) -> list[str]:
    """Those where somebody listens; of addresses that are not plain TCP nobody knows, so not those."""
    alive = await asyncio.gather(*map(_listens, addresses))
    return [address for address, listening in zip(addresses, alive, strict=True) if listening]


async def some_reachable(addresses: Sequence[str], *, patience_s: float = PATIENCE_S) -> list[str]:
    """As soon as somebody listens at one of them, those where somebody may. Raises NoAnswerError."""
    time_s = asyncio.get_running_loop().time
    end_s, told = time_s() + patience_s, False
    unknown = [address for address in addresses if tcp_place(address) is None]
    while addresses and not (found := [*await reachable(addresses), *unknown]):
        if time_s() > end_s:
            raise no_answer(addresses, patience_s)
        if not told:
            told = True
            log.info("no answer from %s: trying for %.0f s", ", ".join(addresses), patience_s)
        await asyncio.sleep(AGAIN_S)
    return found if addresses else []


async def _listens(address: str) -> bool:
    place = tcp_place(address)
    if place is None:
        return False
    try:
        async with asyncio.timeout(DIAL_S):
            _, writer = await asyncio.open_connection(*place)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
