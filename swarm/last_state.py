"""A peer's own state on disk: what it goes on from when it is started again.

    FOLDER/RUN/stage-2/0/state.json             what the file beside it is: version, size, hash
    FOLDER/RUN/stage-2/0/57.safetensors         as donors give it: parameters, optimizer, history

Of the places (0, 1, ...) of its stage that no living process has, a process takes the one with the newest
state: who is started again finds what was left there. It uses that if its stage has gone no further, or if
nobody else has the stage's state. What cannot be used is said in one line, and left alone.

I/O: files, in a thread.
"""

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError

from averaging.network import Buffer
from swarm.checkpoint import CheckpointError, StateFile, check_state_file, write_durably
from swarm.compute import Compute, between_hops
from swarm.config import RunConfig
from swarm.holdings import serialized
from swarm.stage import Stage

DESCRIPTION, LOCK, PLACES = "state.json", "lock", 64
FRESH_S = 86_400.0  # the records of a run live as long
EVERY_S = 30.0  # between two copies
AGAIN_S = 600.0  # after one that failed: a full disk is nothing to try every half minute
CLOSE_S = 10.0
MOST_OF_TIME = 0.02  # that may be spent on copies
log = logging.getLogger(__name__)


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True)
    saved_at: float  # seconds since 1970
    file: StateFile


class _Place:
    """A folder of this process's own, until it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises BlockingIOError if another process has it, and OSError."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise

    def described(self) -> _Description | None:
        """Raises CheckpointError."""
        path = self.folder / DESCRIPTION
        if not path.exists():
            return None
        try:
            return _Description.model_validate_json(path.read_text())
        except (ValidationError, UnicodeDecodeError):
            raise CheckpointError(f"{path}: is damaged") from None

    def release(self) -> None:
        self._lock.close()


class LastState:
    """Of one process, of whichever stage it serves."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        run: str,
        *,
        every_s: float = EVERY_S,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        self._folder, self._config, self._run = folder, config, run
        self._every_s, self._in_thread = every_s, in_thread
        self._places: dict[int, _Place] = {}  # by stage
        self._next_s = float("-inf")
        self._saving: asyncio.Task[None] | None = None

    async def restore(self, stage: Stage, compute: Compute) -> bool:
        """Load what there is of this stage; False, and nothing has changed, if there is nothing of use."""
        try:
            found = await self._in_thread(functools.partial(self._read, stage.stage))
            if found is None:
                return False
            data, version = found
            await between_hops(compute, lambda: stage.load(safetensors.torch.load(data), version))
        except (CheckpointError, ValueError, OSError, safetensors.SafetensorError) as error:
            log.warning("the state of the last start cannot be used: %s", error)
            return False
        log.info("found the own state of the last start: version %d of stage %d", version, stage.stage)
        return True

    def stepped(self, stage: Stage, compute: Compute) -> None:
        """A step was taken: save the state, now and then."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_s and (self._saving is None or self._saving.done()):
            self._next_s = now_s + self._every_s
            self._saving = asyncio.create_task(self.save(stage, compute))

    async def save(self, stage: Stage, compute: Compute) -> None:
        """Now; what goes wrong is told, and tried again much later."""
        began_s = asyncio.get_running_loop().time()
        try:
            version, data = await between_hops(compute, lambda: (stage.version, serialized(stage)))
            await self._in_thread(functools.partial(self._write, stage.stage, version, data))
        except CheckpointError as error:
            log.warning("no state is kept for a restart: %s", error)
            self._next_s = began_s + AGAIN_S
            return
        took_s = asyncio.get_running_loop().time() - began_s
        self._next_s = max(self._next_s, began_s + took_s / MOST_OF_TIME)

    async def close(self) -> None:
        """No copy is under way any more, and others may have the places. Bounded by `CLOSE_S`."""
        if self._saving is not None:
            await asyncio.wait([self._saving], timeout=CLOSE_S)
        for place in self._places.values():
            place.release()
        self._places.clear()

    # files

    def _place_of(self, stage: int) -> _Place:
        """The one with the newest state of those that nobody has. Raises CheckpointError."""
        if stage in self._places:
            return self._places[stage]
        parent, free = self._folder / self._run / f"stage-{stage}", list[_Place]()
        try:
            if not self._places:
                _tidy(self._folder, self._run)
            for place in (parent / str(number) for number in range(PLACES)):
                if free and not place.exists():
                    break
                with contextlib.suppress(BlockingIOError):
                    free.append(_Place(place))
        except OSError as error:
            for taken in free:
                taken.release()
            raise CheckpointError(f"{parent}: cannot be written: {error.strerror}") from None
        if not free:
            raise CheckpointError(f"{parent}: {PLACES} processes keep their states there already")
        best = max(free, key=_age_of)
        for other in free:
            if other is not best:
                other.release()
        self._places[stage] = best
        return best

    def _read(self, stage: int) -> tuple[bytes, int] | None:
        place = self._place_of(stage)
        found = place.described()
        if found is None or time.time() - found.saved_at > FRESH_S:
            return None
        kept = place.folder / found.file.name
        check_state_file(kept, found.file, self._config, stage)
        return kept.read_bytes(), found.file.version

    def _write(self, stage: int, version: int, data: Buffer) -> None:
        folder, name = self._place_of(stage).folder, f"{version}.safetensors"
        write_durably(folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        file = StateFile(name=name, size_bytes=len(data), sha256=digest, version=version)
        fresh = folder / (DESCRIPTION + ".new")
        write_durably(fresh, _Description(saved_at=time.time(), file=file).model_dump_json(indent=1).encode())
        try:
            os.replace(fresh, folder / DESCRIPTION)  # noqa: PTH105 - the one step that counts
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
        for older in folder.glob("*.safetensors"):
            if older.name != name:
                older.unlink(missing_ok=True)


def _age_of(place: _Place) -> float:
    """When the state there was saved; long ago if there is none."""
    try:
        found = place.described()
    except CheckpointError:
        found = None
    return 0.0 if found is None else found.saved_at


def _tidy(folder: Path, run: str) -> None:
    """Delete what other runs' processes, which have ended, left there a day ago."""
    for lock in folder.glob(f"*/stage-*/*/{LOCK}"):
        place = lock.parent
        newest = max((path.stat().st_mtime for path in place.iterdir()), default=0.0)
        if place.parent.parent.name == run or time.time() - newest <= FRESH_S:
            continue
        with contextlib.suppress(OSError):  # BlockingIOError: somebody is at work there
            ended = _Place(place)
            shutil.rmtree(place, ignore_errors=True)
            ended.release()
            place.parent.rmdir()  # others have places there, else
            place.parent.parent.rmdir()
