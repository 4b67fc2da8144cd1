"""A peer's place on the roster of its stage: announce, renew, read who else is there, withdraw.

I/O: the directory.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable

from averaging.errors import LinkError
from averaging.network import PeerId
from swarm.directory import Directory, read_rosters
from swarm.records import PeerRecord

WITHDRAW_S, RETRY_S = 2.0, 1.0
KNOWN_PERIODS = 2  # after which everybody has read a record
log = logging.getLogger(__name__)


class Membership:
    """Of one peer in one stage."""

    def __init__(
        self,
        directory: Directory,
        own: PeerRecord,
        *,
        progress: Callable[[], tuple[int, float, int]],
        period_s: float,
        archivist: PeerId | None = None,
    ) -> None:
        """`own` is what to announce but for `progress`: the version, the speed, and the queue; `archivist` is
        the one whose archive counts, or None for all."""
        self._archivist = archivist
        self._directory, self._own = directory, own
        self._progress, self._period_s = progress, period_s
        self._begun_s = float("-inf")  # the last renewal
        self._first_s: dict[PeerId, float] = {}  # since when the others are on the roster
        self._entered_s, self._came_to_others = float("inf"), False
        self.loading = False  # announced only for others who look for a stage
        self.kept = 0  # the version of the state that a newcomer has on its disk
        self._back_s = float("-inf")  # when this peer last caught up
        self.coming: dict[PeerId, int] = {}  # newcomers of the stage, and what they have
        self.heading: int | None = None  # the stage that this peer is about to move to
        self.fixed = own.fixed
        self.others: dict[PeerId, PeerRecord] = {}  # those who do not load, as of the last `read`
        self.archives: list[PeerId] = []  # who has a state for when nobody else has

    def auxiliaries(self) -> list[PeerId]:
        """Those of the others that only reduce."""
        return [peer for peer, record in self.others.items() if record.aggregates_only]

    def newcomers(self) -> list[PeerId]:
        """Those, perhaps this peer, that some of the others may not have on their rosters yet, or take for
        behind."""
        recent_s = asyncio.get_running_loop().time() - KNOWN_PERIODS * self._period_s
        found = [peer for peer, at_s in self._first_s.items() if at_s > max(recent_s, self._entered_s)]
        is_new = (self._came_to_others and self._entered_s > recent_s) or self._back_s > recent_s
        return [self._own.peer, *found] if is_new else found

    def come_back(self) -> None:
        """This peer had been left behind, and has caught up. Others may close a step without it as yet: what
        they know of it may be older."""
        self._back_s = asyncio.get_running_loop().time()

    async def enter(self) -> None:
        """Be found from now on; tried until it succeeds."""
        while not await self._renewed():
            pass
        if not self.loading and math.isinf(self._entered_s):
            self._entered_s = asyncio.get_running_loop().time()
            self._came_to_others = any(not record.aggregates_only for record in self.others.values())

    async def _renewed(self) -> bool:
        self._begun_s = asyncio.get_running_loop().time()
        try:
            await self._directory.announce(self._record())
            await self.read()  # after announcing: of two that start together, one sees the other
        except LinkError as error:
            log.warning("%s; trying again", error)
            await asyncio.sleep(RETRY_S)
            return False
        return True

    async def read(self) -> None:
        """Who else is there? Raises LinkError."""
        records = await self._directory.roster(self._own.stage)
        self.others.clear()
        others = [record for record in records if record.peer != self._own.peer]
        self.coming = {record.peer: record.version for record in others if record.loading}
        others = [record for record in others if not record.loading]
        self.others.update({record.peer: record for record in others if not record.archives})
        now_s = asyncio.get_running_loop().time()
        self._first_s = {peer: self._first_s.get(peer, now_s) for peer in self.others}
        archives = [record.peer for record in records if record.archives]
        self.archives = [peer for peer in archives if self._archivist in (None, peer)]

    async def furthest(self, stages: int) -> int:
        """The newest version that anybody serves in any stage of the run. Raises LinkError."""
        rosters = await read_rosters(self._directory, stages)
        return max((record.version for roster in rosters for record in roster if record.serves), default=0)

    async def keep(self) -> None:
        """Renew the record and read the roster, every period, until cancelled."""
        while True:  # from beginning to beginning: a slow renewal must not let the record expire
            await asyncio.sleep(self._begun_s + self._period_s - asyncio.get_running_loop().time())
            await self._renewed()

    async def withdraw(self) -> None:
        """Be found no more, at the latest when the record expires."""
        try:
            async with asyncio.timeout(WITHDRAW_S):
                await self._directory.withdraw(self._record())
        except (LinkError, TimeoutError):
            log.info("the record could not be withdrawn; it expires by itself")

    def _record(self) -> PeerRecord:
        version, speed, queue = (self.kept, 0.0, 0) if self.loading else self._progress()
        now: dict[str, object] = {"version": version, "speed": speed, "queue": queue}
        now |= {"loading": self.loading, "heading": self.heading}
        now |= {"fixed": self.fixed, "announced_s": time.time()}
        return self._own.model_copy(update=now)
