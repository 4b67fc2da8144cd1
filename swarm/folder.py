"""The folder of a run: one organizer at a time; an older run of that name is moved aside, never overwritten.

I/O: the file system. The lock ends with the process that holds it, however that dies.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from swarm.errors import UserError

LOCK = "lock"
log = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, *, keep: Sequence[str] = ()) -> Iterator[None]:
    """Make the folder, and keep others from it; of an older run there, what is named in `keep` stays.

    Raises UserError if it cannot be made, or another organizer is at work there.
    """
    with ExitStack() as held:
        if folder.exists():
            with held.enter_context(_opened(folder)) as older:
                _take(folder, older)
                aside = _move_aside(folder)
                _make(folder)
                _bring_back(aside, folder, keep)
                log.info(
                    "what was in %s is in %s%s", folder, aside, f", but for {', '.join(keep)}" if keep else ""
                )
                (aside / LOCK).unlink(missing_ok=True)
        else:
            _make(folder)
        lock = held.enter_context(_opened(folder))
        _take(folder, lock)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _opened(folder: Path) -> IO[str]:
    try:
        return (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def _take(folder: Path, lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_there(folder, lock):  # another one has moved the folder aside since this was opened
            raise BlockingIOError
    except BlockingIOError:
        lock.seek(0)
        process = lock.read(20).strip()
        raise UserError(
            f"{folder}: another organizer is at work here, process {process or 'unknown'}: end it first, or "
            "give this run another name or --folder"
        ) from None
    except OSError as error:
        log.warning("%s: cannot be locked (%s): see that no other organizer uses it", folder, error.strerror)


def _is_there(folder: Path, lock: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


def _move_aside(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
    aside, number = folder.with_name(f"{folder.name}-{stamp}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}-{stamp}-{number}")
    shutil.move(str(folder), str(aside))
    return aside


def _bring_back(aside: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (aside / name).exists():
            try:
                (aside / name).rename(folder / name)
            except OSError as error:
                raise UserError(f"{aside / name}: cannot be moved to {folder}: {error.strerror}") from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created: {error.strerror}") from None
