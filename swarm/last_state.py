"""A peer's own state on disk: what it goes on from when it is started again.

    FOLDER/RUN/0/state.json                what the file beside it is: stage, version, size and hash
    FOLDER/RUN/0/stage-2-57.safetensors    as donors give it: parameters, optimizer, history

A process of the run takes the first place (0, 1, ...) that no living one has: one that is started again finds
what the one before has left. It uses that if its stage has gone no further, or if nobody else has the stage's
state. What cannot be used is said in one line, and left alone.

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
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarm.checkpoint import CheckpointError, StateFile, check_state_file, write_durably
from swarm.compute import Compute, between_hops
from swarm.config import RunConfig
from swarm.holdings import serialized
from swarm.stage import Stage

DESCRIPTION, LOCK, PLACES = "state.json", "lock", 64
FRESH_S = 86_400.0  # the records of a run live as long
EVERY_S = 30.0  # between two copies
MOST_OF_TIME = 0.02  # that may be spent on copies
log = logging.getLogger(__name__)


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True)
    stage: int = Field(ge=0)
    saved_at: float  # seconds since 1970
    file: StateFile


@contextlib.contextmanager
def place_in(folder: Path, run: str) -> Iterator[Path | None]:
    """A place of this process's own; None if files cannot be written there. Older runs are tidied away."""
    with contextlib.ExitStack() as held:
        found: Path | None = None
        try:
            (folder / run).mkdir(parents=True, exist_ok=True)
            _tidy(folder, run)
            for number in range(PLACES):
                place = folder / run / str(number)
                place.mkdir(exist_ok=True)
                lock = held.enter_context((place / LOCK).open("a"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    found = place
                    break
        except OSError as error:
            log.warning("%s: no state will be kept there for a restart: %s", folder, error.strerror)
        yield found


def _tidy(folder: Path, run: str) -> None:
    """Delete what runs have left that nobody takes part in any more."""
    for description in folder.glob(f"*/*/{DESCRIPTION}"):
        other = description.parent.parent
        if other.name != run and time.time() - description.stat().st_mtime > FRESH_S:
            shutil.rmtree(description.parent, ignore_errors=True)
            with contextlib.suppress(OSError):  # others have places there
                other.rmdir()


class LastState:
    """Of one process, of the stage that it serves at the moment."""

    def __init__(
        self,
        place: Path,
        config: RunConfig,
        *,
        every_s: float = EVERY_S,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        self._place, self._config, self._every_s, self._in_thread = place, config, every_s, in_thread
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
            self._saving = asyncio.create_task(self._save_quietly(stage, compute))

    async def close(self) -> None:
        """No copy is under way any more."""
        if self._saving is not None:
            await asyncio.wait([self._saving])

    async def save(self, stage: Stage, compute: Compute) -> None:
        """Raises CheckpointError."""
        began_s = asyncio.get_running_loop().time()
        version, data = await between_hops(compute, lambda: (stage.version, serialized(stage)))
        await self._in_thread(functools.partial(self._write, stage.stage, version, data))
        took_s = asyncio.get_running_loop().time() - began_s
        self._next_s = max(self._next_s, began_s + took_s / MOST_OF_TIME)

    async def _save_quietly(self, stage: Stage, compute: Compute) -> None:
        try:
            await self.save(stage, compute)
        except CheckpointError as error:
            log.warning("no state is kept for a restart: %s", error)
            self._next_s = float("inf")  # a full disk is nothing to try every half minute

    # files

    def _read(self, stage: int) -> tuple[bytes, int] | None:
        path = self._place / DESCRIPTION
        if not path.exists():
            return None
        try:
            found = _Description.model_validate_json(path.read_text())
        except (ValidationError, UnicodeDecodeError):
            raise CheckpointError(f"{path}: is damaged") from None
        if found.stage != stage or time.time() - found.saved_at > FRESH_S:
            return None
        kept = self._place / found.file.name
        check_state_file(kept, found.file, self._config, stage)
        return kept.read_bytes(), found.file.version

    def _write(self, stage: int, version: int, data: bytes) -> None:
        name = f"stage-{stage}-{version}.safetensors"
        write_durably(self._place / name, data)
        digest = hashlib.sha256(data).hexdigest()
        file = StateFile(name=name, size_bytes=len(data), sha256=digest, version=version)
        described = _Description(stage=stage, saved_at=time.time(), file=file)
        fresh = self._place / (DESCRIPTION + ".new")
        write_durably(fresh, described.model_dump_json(indent=1).encode())
        try:
            os.replace(fresh, self._place / DESCRIPTION)  # noqa: PTH105 - the one step that counts
        except OSError as error:
            raise CheckpointError(f"{self._place}: cannot be written: {error.strerror}") from None
        for older in self._place.glob("stage-*.safetensors"):
            if older.name != name:
                older.unlink(missing_ok=True)
