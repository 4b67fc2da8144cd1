"""What a donor has: the state of a living stage, and the means of the steps it has closed lately.

    state    a snapshot between two steps, kept for as long as a newcomer holds on to it; or at a version that
             was asked for beforehand: that is how all stages are archived at the same one
    means    of the steps that close while somebody holds on: whoever has a snapshot replays them

All peers of a stage hold the same bits, and so the same objects.

Snapshots are taken in the compute thread; one event loop.
"""

import asyncio
import struct
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from averaging import exact
from averaging.bounded import forget_oldest
from averaging.network import Buffer
from swarm.chunks import Contents, Sliceable, chunks_of, hash_of
from swarm.compute import Compute, between_hops
from swarm.history import ID_BYTES
from swarm.stage import Stage

KEPT_STATES = 2  # another newcomer is offered one of these, and the means after it
MOST_STATES = 4  # if those of slow newcomers are too old by now for anybody else
KEPT_MEANS = 8  # who is further behind takes a newer state: that is less to send
MOST_WISHES, MOST_AHEAD = 2, 1000  # versions that are waited for; steps until then
COUNT = struct.Struct("<I")
Name = tuple[bool, int]  # (a mean?, its step or the state's version)


@dataclass(frozen=True, slots=True)
class Given:
    """An object that can be had, in chunks."""

    name: Name
    data: Sliceable
    contents: Contents


class Holdings(Protocol):
    """What can be had of one stage."""

    @property
    def stage(self) -> int: ...

    @property
    def version(self) -> int: ...

    async def state(self, begun: int | None) -> Given | None:
        """The newest, or `begun` if it is still of use; None if there is no room for another."""
        ...

    async def state_at(self, version: int) -> Given | None:
        """As soon as `version` is reached; None if it is past or never comes."""
        ...

    async def mean(self, step: int) -> Given | None: ...

    def forget(self, wanted: Collection[Name], since: int | None) -> None:
        """Nobody wants any but these objects, and means since a step."""
        ...


class StageHoldings:
    """Those of a peer that serves; satisfies `Holdings`."""

    def __init__(self, stage: Stage, compute: Compute) -> None:
        self._stage, self._compute = stage, compute
        self._states: dict[int, Given] = {}  # by version
        self._means: dict[int, Callable[[], bytes]] = {}  # by step
        self._packed_means: dict[int, Given] = {}
        self._packing = asyncio.Lock()
        self._packers: set[asyncio.Task[Given | None]] = set()
        self._wishes: dict[int, asyncio.Event] = {}  # versions that somebody waits for
        self._waiting = Counter[int]()  # how many do

    @property
    def stage(self) -> int:
        return self._stage.stage

    @property
    def version(self) -> int:
        return self._stage.version

    def keep(self, step: int, mean: torch.Tensor, microbatches: Collection[bytes]) -> None:
        """The mean gradient [values] of a closed step, which newcomers will ask for."""
        self._means[step] = lambda: pack_mean(mean, microbatches)
        forget_oldest(self._means, KEPT_MEANS)
        packer = asyncio.create_task(self.mean(step))
        self._packers.add(packer)
        packer.add_done_callback(self._packers.discard)

    def reached(self) -> None:
        """The stage has come to its present version."""
        for version in [v for v in self._wishes if v <= self.version]:
            self._wishes.pop(version).set()

    def close(self) -> None:
        """Nobody waits any more."""
        for wish in self._wishes.values():
            wish.set()
        self._wishes.clear()
        for packer in self._packers:
            packer.cancel()

    async def state(self, begun: int | None) -> Given | None:
        """Of now, or `begun` or one of a moment ago with all means since."""
        async with self._packing:
            version = self._stage.version
            usable = [v for v in self._states if self._means.keys() >= {*range(v, version)}]
            if begun in usable:
                return self._states[begun]
            if version in self._states:
                return self._states[version]
            if usable and len(self._states) >= KEPT_STATES:
                return self._states[max(usable)]
            if len(self._states) >= MOST_STATES:
                return None
            return await self._snapshot()

    async def state_at(self, version: int) -> Given | None:
        if not self.version <= version <= self.version + MOST_AHEAD:
            return self._states.get(version)
        if version > self.version:
            if version not in self._wishes and len(self._wishes) >= MOST_WISHES:
                return None
            wish = self._wishes.setdefault(version, asyncio.Event())
            self._waiting[version] += 1
            try:
                await wish.wait()
            finally:
                self._waiting[version] -= 1
                if not self._waiting[version]:
                    self._wishes.pop(version, None)
        async with self._packing:  # before the next step: that is a job which cannot be queued yet
            if version not in self._states and len(self._states) < MOST_STATES:
                await self._snapshot()
            return self._states.get(version)

    async def _snapshot(self) -> Given:
        version, data = await between_hops(
            self._compute, lambda: (self._stage.version, self._stage.snapshot())
        )
        given = self._states[version] = await given_of((False, version), data)
        return given

    async def mean(self, step: int) -> Given | None:
        async with self._packing:
            if step not in self._packed_means and step in self._means:
                data = await between_hops(self._compute, self._means[step])
                self._packed_means[step] = await given_of((True, step), data)
            return self._packed_means.get(step)

    def forget(self, wanted: Collection[Name], since: int | None) -> None:
        self._states = {v: given for v, given in self._states.items() if (False, v) in wanted}
        self._means = {s: m for s, m in self._means.items() if since is not None and s >= since}
        self._packed_means = {
            step: given
            for step, given in self._packed_means.items()
            if step in self._means or (True, step) in wanted
        }


def serialized(stage: Stage) -> bytearray:
    """A copy of its state."""
    return stage.snapshot().joined()


def pack_mean(mean: torch.Tensor, microbatches: Collection[bytes]) -> bytes:
    """A mean gradient [values] float32, bit by bit, and the ids of what is in it."""
    return b"".join((COUNT.pack(len(microbatches)), *sorted(microbatches), exact.pack(mean)))


def unpack_mean(data: Buffer, values: int) -> tuple[torch.Tensor, list[bytes]]:
    """Raises ValueError."""
    count = COUNT.unpack_from(data)[0] if len(data) >= COUNT.size else 0
    start = COUNT.size + count * ID_BYTES
    if len(data) < start:
        raise ValueError(f"{len(data)} bytes are no mean with {count} microbatches")
    ids = [bytes(data[at : at + ID_BYTES]) for at in range(COUNT.size, start, ID_BYTES)]
    return exact.unpack(memoryview(data)[start:], values), ids


async def contents_of(data: Sliceable) -> Contents:
    """Hash it, a chunk at a time: others have their turn in between."""
    hashes = []
    for chunk in chunks_of(data):
        hashes.append(hash_of(chunk))
        await asyncio.sleep(0)
    return Contents(len(data), tuple(hashes))


async def given_of(name: Name, data: Sliceable) -> Given:
    return Given(name, data, await contents_of(data))
