"""Seeded schedules of deaths, hangs, broken links, duplicated, lost and late messages, in virtual time.

A failing seed replays with `python -m tests.schedules SEED`, which prints its event log.
"""

import pytest

from tests import schedules

PER_TEST, TESTS = 25, 20


@pytest.mark.schedules
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, PER_TEST * TESTS, PER_TEST))
def test_every_microbatch_completes_and_counts_exactly_once(first):
    for seed in range(first, first + PER_TEST):
        schedules.run(seed)


@pytest.mark.schedules
def test_a_schedule_replays_event_by_event():
    assert schedules.run(3).log == schedules.run(3).log
