"""Which nodes of the DHT this process knows, and does it reach any of them?

The engine alone knows too few: it forgets whoever does not answer once, and meets only those whom the
libp2p daemon finds by itself, which in many networks is the organizer and nobody else.

I/O: pings, and dials at addresses that were announced.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from averaging.daemon import connect
from averaging.errors import LinkError
from averaging.network import PeerId

CALL_S = 10.0
REMEMBERED_NODES, WITNESSES, TRIES = 64, 3, 3
DIAL_S, DIAL_AGAIN_S = 3.0, 10.0
MOST_DIALS = 8  # at the same time
T = TypeVar("T")


class Nodes:
    """Of one process's DHT node."""

    def __init__(self, node: DHTNode, joined: Sequence[str]) -> None:
        """`joined` are the addresses through which this process entered."""
        self._node = node
        self.asked = {str(Multiaddr(address)).rpartition("/p2p/")[2]: address for address in joined}
        self._met: list[PeerID] = []  # nodes that were known, the latest first
        self._relied_on: set[PeerID] = set()  # those of the last call
        self._meeting = asyncio.Lock()
        self._times_met = 0  # so often some of those who had been forgotten did answer
        self._dials: set[asyncio.Task[bool]] = set()
        self._dial_after_s: dict[PeerId, float] = {}

    async def with_others(self, call: Callable[[], Awaitable[T]], failed: str) -> T:
        """What `call` comes to, if others took part in it. Raises LinkError.

        Who has forgotten everybody reads nothing but its own records, and would take itself for the only
        peer; who was stopped and has forgotten most reads what the others happen to store.
        """
        try:
            async with asyncio.timeout(CALL_S):
                for _ in range(TRIES):
                    before, times_met = self._known(), self._times_met
                    result = await call()
                    if await self._meets_forgotten() or self._times_met != times_met:
                        continue  # they were not asked
                    if await self._were_others_there(before):
                        return result
                    await self._meet_again()
        except TimeoutError:
            raise LinkError("dht", f"{failed} within {CALL_S:.0f} s") from None
        raise LinkError("dht", f"{failed}: nobody answers, is this machine online?")

    def introduce(self, addresses: Mapping[PeerId, Sequence[str]]) -> None:
        """Get to know some of these, in the background: the DHT must not hang on who was there first.

        Who was may come back, and bring others.
        """
        addresses = {**{peer: [address] for peer, address in self.asked.items()}, **addresses}
        known, now_s = {peer.to_base58() for peer in self._known()}, asyncio.get_running_loop().time()
        self._dial_after_s = {peer: at_s for peer, at_s in self._dial_after_s.items() if at_s > now_s}
        passed_over = {self._node.peer_id.to_base58(), *known, *self._dial_after_s}
        strangers = [peer for peer, found in addresses.items() if found and peer not in passed_over]
        room = min(MOST_DIALS - len(self._dials), REMEMBERED_NODES - len(known), len(strangers))
        for peer in random.sample(strangers, max(0, room)):  # not the same ones as everybody else
            self._dial_after_s[peer] = now_s + DIAL_AGAIN_S
            dial = asyncio.create_task(self._dial(peer, addresses[peer]))
            self._dials.add(dial)
            dial.add_done_callback(self._dials.discard)

    async def close(self) -> None:
        for dial in self._dials:
            dial.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)

    def _known(self) -> list[PeerID]:
        known = list(self._node.protocol.routing_table.peer_id_to_uid)
        self._met = list(dict.fromkeys([*known, *self._met]))[:REMEMBERED_NODES]
        return known

    async def _were_others_there(self, before: Sequence[PeerID]) -> bool:
        """Has anybody answered a call, of those who were known before it?"""
        await asyncio.sleep(0)  # the engine notes in a task of its own who has not answered
        known = self._known()
        if not self.asked:
            return True  # the first node may be alone
        if set(before) <= set(known):
            return bool(known)
        return any(await asyncio.gather(*(self._meet(peer) for peer in known[:WITNESSES])))

    async def _meets_forgotten(self) -> bool:
        """Has the engine forgotten some since the last call who do answer? It knows them again then."""
        await asyncio.sleep(0)
        async with self._meeting:  # of calls at the same time, all wait for what the first finds out
            known = self._known()
            forgotten = [peer for peer in self._relied_on if peer not in known][:REMEMBERED_NODES]
            self._relied_on = {*known}
            there = await asyncio.gather(*(self._meet(peer) for peer in forgotten))
            self._relied_on.update(peer for peer, answers in zip(forgotten, there, strict=True) if answers)
            self._times_met += any(there)
            return any(there)

    async def _meet_again(self) -> None:
        asked = (self._dial(peer, [address]) for peer, address in self.asked.items())
        await asyncio.gather(*asked, *map(self._meet, self._met))

    async def _dial(self, peer: PeerId, addresses: Sequence[str]) -> bool:
        """Where the daemon itself would find nobody."""
        with contextlib.suppress(P2PDaemonError, TimeoutError):
            async with asyncio.timeout(DIAL_S):
                await connect(self._node.p2p, peer, addresses)
                return await self._meet(PeerID.from_base58(peer))
        return False

    async def _meet(self, peer: PeerID) -> bool:
        answers = await self._node.protocol.call_ping(peer) is not None
        if answers:
            self._node.blacklist.register_success(peer)
        return answers
