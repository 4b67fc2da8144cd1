"""Seeded schedules of deaths, hangs, broken links, duplicated, lost and late messages, in virtual time.

A failing seed replays with `python -m tests.schedules SEED` (or `tests.strict_schedules`), which prints its
event log; `-t NUMBER` adds everything the ledger hears and says about one microbatch.
"""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests import schedules, strict_schedules

SEEDS, STRICT_SEEDS = 600, 150


def run_all(module: str, seeds: int) -> str:
    """Seeds 0 to `seeds` - 1, shared among one process per core; returns what they print."""
    cores = os.cpu_count() or 1
    starts = [seeds * i // cores for i in range(cores + 1)]
    command = [sys.executable, "-m", module]
    processes = [
        subprocess.Popen(
            [*command, str(first), str(last - first)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for first, last in itertools.pairwise(starts)
    ]
    printed = "\n".join(process.communicate()[0] for process in processes)
    held = sum(int(n) for n in re.findall(r"^(\d+) of \d+ schedules hold", printed, re.MULTILINE))
    assert all(process.returncode == 0 for process in processes), printed[-20_000:]
    assert held == seeds, printed[-20_000:]
    return printed


def counts(printed: str) -> Counter[str]:
    """How often each fault was dealt."""
    total = Counter[str]()
    for name, number in re.findall(r"'([\w ]+)': (\d+)", printed):
        total[name] += int(number)
    return total


@pytest.mark.schedules
@pytest.mark.timeout(1500)
def test_every_microbatch_completes_and_counts_exactly_once():
    dealt = counts(run_all("tests.schedules", SEEDS))
    print(dict(dealt))
    for fault in set(schedules.FAULTS):
        assert dealt[fault] >= SEEDS // 20, f"hardly any {fault!r}: {dealt}"
    for fault in ("break_before", "break_after", "twice"):
        assert dealt[fault] >= SEEDS, f"hardly any {fault!r}: {dealt}"


@pytest.mark.schedules
@pytest.mark.timeout(1500)
def test_strict_mode_equals_plain_training_whenever_peers_die():
    dealt = counts(run_all("tests.strict_schedules", STRICT_SEEDS))
    print(dict(dealt))
    for how in ("kill", "terminate"):
        for moment in strict_schedules.MOMENTS:
            assert dealt[f"{how} {moment}"] >= STRICT_SEEDS // 4, f"hardly any {how} {moment}: {dealt}"
    assert dealt["handed over"] >= STRICT_SEEDS // 2, f"hardly a gradient was handed over: {dealt}"


@pytest.mark.schedules
def test_a_schedule_replays_event_by_event():
    first, again = (schedules.run(3, schedules.Schedule) for _ in range(2))
    assert first.log == again.log
