"""A peer's place on the roster of its stage: announce, renew, read who else is there, withdraw.

I/O: the directory.
"""

import asyncio
import logging
from collections.abc import Callable

from averaging.errors import LinkError
from averaging.network import PeerId
from swarm.directory import Directory
from swarm.records import PeerRecord

WITHDRAW_S = 2.0
log = logging.getLogger(__name__)


class Membership:
    """Of one peer in one stage."""

    def __init__(
        self,
        directory: Directory,
        *,
        peer: PeerId,
        stage: int,
        record: Callable[[], PeerRecord],
        period_s: float,
    ) -> None:
        """`record` says what to announce now."""
        self._directory, self._peer, self._stage = directory, peer, stage
        self._record, self._period_s = record, period_s
        self.others: dict[PeerId, PeerRecord] = {}  # as of the last `read`

    def auxiliaries(self) -> list[PeerId]:
        """Those of the others that only reduce."""
        return [peer for peer, record in self.others.items() if record.aggregates_only]

    async def enter(self) -> None:
        """Be found from now on. Raises LinkError."""
        await self._directory.announce(self._record())
        await self.read()  # after announcing: of two that start together, one sees the other

    async def read(self) -> None:
        """Who else is there? Raises LinkError."""
        records = await self._directory.roster(self._stage)
        self.others.clear()
        self.others.update({record.peer: record for record in records if record.peer != self._peer})

    async def keep(self) -> None:
        """Renew the record and read the roster, every period, until cancelled."""
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self.enter()
            except LinkError as error:
                log.warning("%s; trying again", error)

    async def withdraw(self) -> None:
        """Be found no more, at the latest when the record expires."""
        try:
            async with asyncio.timeout(WITHDRAW_S):
                await self._directory.withdraw(self._record())
        except (LinkError, TimeoutError):
            log.info("the record could not be withdrawn; it expires by itself")
