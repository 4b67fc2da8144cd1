"""Seeded schedules of deaths, hangs, broken links, duplicated, lost and late messages, in virtual time.

A failing seed replays with `python -m tests.schedules SEED`, which prints its event log; `-t NUMBER` adds
everything the ledger hears and says about one microbatch.

Open: the target is 500 schedules without a single exception. Today about 3 in 100 end with a gradient
that counts twice or is missing, each after several faults in a row. Until that is mended the test guards
what has been reached and prints the seeds that fail.
"""

import pytest

from tests import schedules

SEEDS, OPEN = 200, 10


@pytest.mark.schedules
@pytest.mark.timeout(600)
def test_every_microbatch_completes_and_counts_exactly_once():
    failed = []
    for seed in range(SEEDS):
        try:
            schedules.run(seed)
        except AssertionError as error:
            failed.append(seed)
            print(error)
    print(f"{SEEDS - len(failed)} of {SEEDS} schedules hold; open: {failed}")
    assert len(failed) <= OPEN, failed


@pytest.mark.schedules
def test_a_schedule_replays_event_by_event():
    assert schedules.run(3).log == schedules.run(3).log
