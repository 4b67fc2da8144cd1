"""Who is there: the roster of every stage, announced and read. Protocol and in-memory twin.

The shell on hivemind's DHT is in `swarm.dht`.
"""

from collections.abc import Callable
from typing import Protocol

from averaging.errors import LinkError
from averaging.network import PeerId
from swarm.errors import NoAnswerError
from swarm.records import PeerRecord


class Directory(Protocol):
    async def announce(self, record: PeerRecord) -> None:
        """Publish this peer's record; it expires unless it is announced again."""
        ...

    async def withdraw(self, record: PeerRecord) -> None:
        """Let this peer's record expire now."""
        ...

    async def roster(self, stage: int) -> list[PeerRecord]:
        """The valid records of a stage, in no particular order."""
        ...


async def read_rosters(directory: Directory, stages: int) -> list[list[PeerRecord]]:
    """Of all stages. Raises LinkError."""
    return [await directory.roster(number) for number in range(stages)]


async def all_rosters(directory: Directory, stages: int) -> list[list[PeerRecord]]:
    """For a user who waits. Raises UserError."""
    try:
        return await read_rosters(directory, stages)
    except LinkError as error:
        raise NoAnswerError(
            f"cannot read who serves which stage ({error}): try again, or name one with --stage"
        ) from None


class MemoryDirectory:
    """One process's rosters; satisfies `Directory`."""

    def __init__(self, clock: Callable[[], float], expire_s: float) -> None:
        self._clock, self._expire_s = clock, expire_s
        self._records: dict[int, dict[PeerId, tuple[float, PeerRecord]]] = {}

    async def announce(self, record: PeerRecord) -> None:
        self._records.setdefault(record.stage, {})[record.peer] = (self._clock(), record)

    async def withdraw(self, record: PeerRecord) -> None:
        self._records.get(record.stage, {}).pop(record.peer, None)

    async def roster(self, stage: int) -> list[PeerRecord]:
        oldest_s = self._clock() - self._expire_s
        return [record for at, record in self._records.get(stage, {}).values() if at >= oldest_s]
