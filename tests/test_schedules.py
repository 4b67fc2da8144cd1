"""Seeded schedules of deaths, hangs, broken links, duplicated, lost and late messages, in virtual time.

A failing seed replays with `python -m tests.schedules SEED` (or `tests.strict_schedules`), which prints its
event log; `-t NUMBER` adds everything the ledger hears and says about one microbatch.
"""

import re
from collections import Counter

import pytest

from tests import schedules, strict_schedules
from tests.background import Sweep


def counts(printed: str) -> Counter[str]:
    """How often each fault was dealt."""
    total = Counter[str]()
    for name, number in re.findall(r"'([\w ]+)': (\d+)", printed):
        total[name] += int(number)
    return total


@pytest.mark.schedules
@pytest.mark.timeout(5000)
def test_every_microbatch_completes_and_counts_exactly_once(sweeps: dict[str, Sweep]):
    sweep = sweeps["tests.schedules"]
    dealt = counts(sweep.result())
    print(dict(dealt))
    for fault in [*schedules.FAULTS, "move"]:
        assert dealt[fault] >= sweep.seeds // 10, f"hardly any {fault!r}: {dealt}"
    for fault in ("break_before", "break_after", "twice"):
        assert dealt[fault] >= sweep.seeds, f"hardly any {fault!r}: {dealt}"


@pytest.mark.schedules
@pytest.mark.timeout(5000)
def test_strict_mode_equals_plain_training_whenever_peers_die(sweeps: dict[str, Sweep]):
    sweep = sweeps["tests.strict_schedules"]
    dealt = counts(sweep.result())
    print(dict(dealt))
    for how in ("kill", "terminate"):
        for moment in strict_schedules.MOMENTS:
            assert dealt[f"{how} {moment}"] >= sweep.seeds // 4, f"hardly any {how} {moment}: {dealt}"
    assert dealt["handed over"] >= sweep.seeds // 2, f"hardly a gradient was handed over: {dealt}"


@pytest.mark.schedules
def test_a_schedule_replays_event_by_event():
    first, again = (schedules.run(3, schedules.Schedule) for _ in range(2))
    assert first.log == again.log
