"""Processes that a benchmark drives through their pipes, one compute thread each."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable

Worker = subprocess.Popen[str]


def start_worker(command: list[str]) -> Worker:
    """Start it in a session of its own, so that its daemons end with it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
    )


def end_workers(workers: Iterable[Worker]) -> None:
    """SIGKILL each with all that it started; no-op for one that has ended."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
