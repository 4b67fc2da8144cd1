"""Sweeps of seeds that run behind the other tests, on what they leave of the processors.

Most tests with real processes wait most of their time; virtual time can always go on. The sweeps belong to
the scheduling class for idle work: they get a processor only when nobody else wants it.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import IO

# So many at least; CI takes more (`.ci/run`).
SEEDS = {"tests.strict_schedules": 150, "tests.schedules": int(os.environ.get("SCHEDULES", "500"))}


def _behind_all_others() -> None:
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@dataclass
class Sweep:
    """Seeds 0 to `seeds` - 1 of one kind of schedule, shared among one process per core."""

    module: str
    seeds: int
    _running: list[tuple[subprocess.Popen, IO[str]]] = field(default_factory=list)

    def start(self) -> None:
        cores = os.cpu_count() or 1
        starts = [self.seeds * i // cores for i in range(cores + 1)]
        for first, last in itertools.pairwise(starts):
            printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads yet would fill up
            process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(first), str(last - first)],
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=_behind_all_others,
            )
            self._running.append((process, printed))

    def result(self) -> str:
        """What they print in the end. Raises AssertionError if a schedule failed."""
        texts = []
        for process, printed in self._running:
            process.wait()
            printed.seek(0)
            texts.append(printed.read())
        text = "\n".join(texts)
        held = sum(int(n) for n in re.findall(r"^(\d+) of \d+ schedules hold", text, re.MULTILINE))
        assert all(process.returncode == 0 for process, _ in self._running), text[-20_000:]
        assert held == self.seeds, text[-20_000:]
        return text

    def stop(self) -> None:
        for process, printed in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
            printed.close()
