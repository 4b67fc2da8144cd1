"""The archive: checkpoints of a run, and a state for a stage that has lost all its peers.

    ask a few peers of every stage, before they get there, for their state at one and the same version
    write what comes, a stage at a time; a checkpoint counts once all stages are on disk
    stand on every stage's roster with the newest one: whoever finds nobody else begins from there

A version that cannot be had of every stage is given up; another one follows before long.

I/O: the directory, files, and streams to donors and newcomers; one event loop.
"""

import asyncio
import contextlib
import functools
import logging
import math
import mmap
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from averaging.bandwidth import UplinkMeter
from averaging.errors import AveragingError, LinkError
from averaging.network import Network
from swarm.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, keep_newest
from swarm.config import RunConfig
from swarm.directory import Directory, read_rosters
from swarm.donor import Donor
from swarm.donors import Donors, NoDonorError
from swarm.holdings import Given, given_of
from swarm.model import stage_shapes
from swarm.records import MAX_ADDRESSES, PeerRecord
from swarm.scope import at_stage
from swarm.source import Offer

ASKED = 2  # peers of a stage, for the state at one version
TRIES = 4  # per interval, until a version can be had of every stage
WITHDRAW_S = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    stage: int
    values: int


class Archive:
    """Of one run, in one process; any process that has joined may run it."""

    def __init__(
        self,
        *,
        network: Network,
        directory: Directory,
        config: RunConfig,
        folder: Path,
        newest: Checkpoint | None = None,
        addresses: Sequence[str] = (),
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
        rng: random.Random | None = None,
    ) -> None:
        """`folder` is where checkpoints go; `newest` is what the run goes on from; `in_thread` writes."""
        self._in_thread = in_thread
        self._network, self._directory, self._config, self._folder = network, directory, config, folder
        self.newest = newest
        self.every_steps = config.archive.every_steps
        self._addresses = tuple(addresses)[:MAX_ADDRESSES]
        self._shelves: list[_Shelf] = []
        self._donors: list[Donor] = []
        self._tried = 0 if newest is None else newest.step
        self._rng = rng or random.SystemRandom()
        self._seen = (float("-inf"), 0)  # when, and the version of the stage that was furthest then

    async def start(self) -> None:
        """Give what is archived to whoever asks."""
        for stage in range(self._config.model.stages):
            shelf = _Shelf(stage)
            donor = Donor(
                at_stage(self._network, stage),
                shelf,
                upload_share=self._config.network.upload_share,
                uplink=UplinkMeter(),
            )
            self._shelves.append(shelf)
            self._donors.append(donor)
            await donor.start()
        if self.newest is not None:
            await self._put_up(self.newest)
        await self._announce()  # also without any: then nobody needs to wait for one

    async def run(self) -> None:
        """Archive, and be found, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._be_found())
            if self.every_steps:
                tasks.create_task(self._archive())

    async def leave(self) -> None:
        """Be found no more."""
        for donor in self._donors:
            donor.close()
        stages = range(self._config.model.stages)
        with contextlib.suppress(LinkError, TimeoutError):
            async with asyncio.timeout(WITHDRAW_S):
                await asyncio.gather(*(self._directory.withdraw(self._record(stage)) for stage in stages))

    async def save_last(self) -> None:
        """The end of a run, every stage where it stands; `run` must have ended. Raises AveragingError."""
        self.newest = await self._save(None)

    # writing

    async def _archive(self) -> None:
        with contextlib.suppress(LinkError):
            await self._furthest()  # the next look shows the pace
        while True:
            step = self._tried = await self._next_step()
            try:
                self.newest = await self._save(step)
                log.info("checkpoint of step %d: %s", step, self.newest.folder)
                await self._put_up(self.newest)
                await self._announce()
            except CheckpointError as error:
                log.error("no checkpoint of step %d: %s", step, error)
            except AveragingError as error:
                log.warning("no checkpoint of step %d: %s", step, error)

    async def _next_step(self) -> int:
        """Wait until the next one is near: that one. What was missed is made up for before long."""
        every, last = self.every_steps, self._config.training.steps
        while True:
            await asyncio.sleep(self._config.network.announce_s)
            with contextlib.suppress(LinkError):
                version, pace = await self._furthest()
                newest = 0 if self.newest is None else self.newest.step
                due = ((newest + every // 2) // every + 1) * every  # a multiple that is not too near
                soonest = max(version + pace, self._tried + every // TRIES) + 1
                step = min(max(due, soonest), last)
                if version and max(version, self._tried) < step <= version + 2 * pace + 1:
                    return step

    async def _furthest(self) -> tuple[int, int]:
        """The version of the stage that is furthest, and about how many steps it takes until peers are asked
        for one: what they announce is as old as that, and rosters are read twice. Raises LinkError."""
        time_s = asyncio.get_running_loop().time
        began_s = time_s()
        version = max(map(_claimed, await read_rosters(self._directory, self._config.model.stages)))
        (seen_s, seen), now_s = self._seen, time_s()
        self._seen = now_s, version
        per_s, late_s = max(0, version - seen) / (now_s - seen_s), 2 * (now_s - began_s)
        return version, math.ceil(per_s * (self._config.network.announce_s + late_s))

    async def _save(self, step: int | None) -> Checkpoint:
        """All stages at `step`, or where they stand. Raises AveragingError; nothing is left on disk then."""
        donors = [self._donors_of(stage) for stage in range(self._config.model.stages)]
        writer: CheckpointWriter | None = None
        try:
            offers = await self._offers(donors, step)
            versions = {offer.name[1] for offer in offers}
            if self._config.training.strict and len(versions) > 1:
                raise NoDonorError("the stages stand at different steps")
            writer = await self._whole(
                functools.partial(CheckpointWriter, self._folder, self._config, min(versions))
            )
            for stage, offer in enumerate(offers):
                data = await donors[stage].state(offer)
                await self._whole(functools.partial(writer.add, stage, data, offer.name[1]))
            checkpoint: Checkpoint = await self._whole(writer.finish)
            await self._whole(functools.partial(keep_newest, self._folder, self._config.archive.keep))
            return checkpoint
        finally:
            for each in donors:
                each.release()
            if writer is not None:
                await self._whole(writer.drop)

    async def _whole(self, work: Callable[[], Any]) -> Any:
        """Do `work` on files to its end, also when cancelled: two must not work on the same ones."""
        doing = asyncio.ensure_future(self._in_thread(work))
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            await asyncio.wait([doing])
            raise

    def _donors_of(self, stage: int) -> Donors:
        values = sum(shape.numel() for shape in stage_shapes(self._config.model, stage).values())
        return Donors(at_stage(self._network, stage), _Part(stage, values))

    async def _offers(self, donors: Sequence[Donors], step: int | None) -> list[Offer]:
        """Of every stage; if one cannot be had, nobody else is waited for. Raises AveragingError."""
        asking = [asyncio.create_task(self._offer(d, stage, step)) for stage, d in enumerate(donors)]
        try:
            return await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

    async def _offer(self, donors: Donors, stage: int, step: int | None) -> Offer:
        """Of the state of a stage at `step`, once it is there, or now. Raises AveragingError."""
        serving = [record.peer for record in await self._directory.roster(stage) if record.serves]
        asked = self._rng.sample(serving, min(ASKED, len(serving)))
        offers = await donors.offers(asked, at=step)
        if not offers:
            raise NoDonorError(f"nobody has the state of stage {stage}" + ("" if step is None else " then"))
        if step is not None and len(set(offers)) > 1:
            raise NoDonorError(f"peers of stage {stage} disagree about its state at that step")
        return donors.best(offers)

    # being found

    async def _be_found(self) -> None:
        while True:
            await asyncio.sleep(self._config.network.announce_s)
            await self._announce()

    async def _announce(self) -> None:
        for stage in range(self._config.model.stages):
            try:
                await self._directory.announce(self._record(stage))
            except LinkError as error:
                log.warning("the archive could not be announced: %s", error)

    def _record(self, stage: int) -> PeerRecord:
        return PeerRecord(
            peer=self._network.peer_id,
            stage=stage,
            addresses=self._addresses,
            name="archive",
            version=self.newest.versions[stage] if self.newest is not None else 0,
            archives=True,
            announced_s=time.time(),
        )

    async def _put_up(self, checkpoint: Checkpoint) -> None:
        for stage, shelf in enumerate(self._shelves):
            await shelf.put(checkpoint.versions[stage], checkpoint.files[stage])
            self._donors[stage].available = True


class _Shelf:
    """One stage of the newest checkpoint; satisfies `swarm.holdings.Holdings`."""

    def __init__(self, stage: int) -> None:
        self.stage, self.version = stage, 0
        self._given: Given | None = None

    async def put(self, version: int, path: Path) -> None:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._given = await given_of((False, version), data)
        self.version = version

    async def state(self, begun: int | None) -> Given | None:
        return self._given

    async def state_at(self, version: int) -> Given | None:
        return self._given if version == self.version else None

    async def mean(self, step: int) -> Given | None:
        return None  # it has only what it has

    def forget(self, wanted: object, since: int | None) -> None:
        """The rest is on disk."""


def _claimed(roster: Sequence[PeerRecord]) -> int:
    """The version that half of a stage's peers have reached, by what they say: one alone may say anything."""
    versions = sorted(record.version for record in roster if record.serves)
    return versions[(len(versions) - 1) // 2] if versions else 0
