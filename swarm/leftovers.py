"""What an organizer that died has left running: whoever resumes its run ends it together with its own.

    RUN/processes     a line for every process that `local:` has started: its number, and when it began

Numbers of processes are used again, so both must agree.

I/O: a file, and the system's table of processes.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import psutil

PROCESSES = "processes"
SAME_S = 0.01  # the system's clock ticks so often


def note_process(folder: Path, number: int) -> None:
    """Remember a process of this run; no-op if it has ended already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        began_s = psutil.Process(number).create_time()
        with (folder / PROCESSES).open("a") as file:
            file.write(f"{number} {began_s!r}\n")


def left_running(folder: Path) -> list[psutil.Process]:
    """Those of the remembered processes that have not ended."""
    path, found = folder / PROCESSES, list[psutil.Process]()
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):  # a line of a full disk may be half
            number, began_s = line.split()
            process = psutil.Process(int(number))
            is_same = abs(process.create_time() - float(began_s)) <= SAME_S
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_processes(processes: Sequence[psutil.Process], *, within_s: float) -> None:
    """SIGTERM, and SIGKILL for those that have not ended `within_s`. Blocks."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, deaf = psutil.wait_procs(processes, timeout=within_s)
    for process in deaf:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
