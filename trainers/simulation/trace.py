"""How many machines a run has over time: read from a file, or drawn with the habits of real spot markets.

A file has rows `time,instances` and no header; times do not fall. Between two rows the count is the earlier
one. A drop is a preemption of so many machines, a rise so many newcomers.

The synthetic habits are fitted to two published traces of spot instances, 24 h of 12 T4 and 89 h of 16 K80,
which agree about as well with each other as with this (Bamboo, NSDI 2023).

Pure.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from swarm.errors import UserError

UNITS_S = {"seconds": 1.0, "hours": 3600.0}
MOST_INSTANCES = 100_000

# Minutes from one change to the next, and its size.
INCOMPLETE_GAP_MIN = 7.6  # mean, while machines are missing
COMPLETE_GAP_MEDIAN_MIN, COMPLETE_GAP_SIGMA = 12.0, 1.7  # log-normal, while none is
RISES = 0.6  # of the changes while machines are missing
RISES_TO_ALL = 0.87  # of those
SINGLE_DROPS, MORE_MEAN = 0.62, 3.3  # one machine at a time; else so many


@dataclass(frozen=True, slots=True)
class Trace:
    """From `times_s[i]` on there are `counts[i]` machines; ends at `end_s`."""

    times_s: tuple[float, ...]
    counts: tuple[int, ...]
    end_s: float

    def changes(self) -> Iterator[tuple[float, int]]:
        """(time, how many more or fewer machines there are from then on)."""
        before = 0
        for time_s, count in zip(self.times_s, self.counts, strict=True):
            if count != before:
                yield time_s, count - before
            before = count


def parse_trace(text: str, *, source: str, unit: str = "seconds") -> Trace:
    """Raises UserError with file and line."""
    times_s: list[float] = []
    counts: list[int] = []
    last_s = 0.0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        time_s, count = _row(line, where, UNITS_S[unit])
        if times_s and time_s < last_s:
            raise UserError(f"{where}: time goes back from {last_s:g} s to {time_s:g} s: sort the rows")
        last_s = time_s
        if not counts or count != counts[-1]:
            times_s.append(time_s)
            counts.append(count)
    if not counts:
        raise UserError(f"{source}: no rows: a trace has lines `time,instances`")
    if last_s <= times_s[0]:
        raise UserError(f"{source}: all rows are of the same time, {last_s:g} s: nothing to simulate")
    start_s = times_s[0]
    return Trace(tuple(t - start_s for t in times_s), tuple(counts), last_s - start_s)


def _row(line: str, where: str, unit_s: float) -> tuple[float, int]:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 2:
        raise UserError(f"{where}: {line.strip()[:40]!r} is not `time,instances`")
    try:
        time_s = float(fields[0]) * unit_s
    except ValueError:
        raise UserError(f"{where}: time {fields[0][:20]!r} is not a number") from None
    try:
        count = int(fields[1])
    except ValueError:
        raise UserError(f"{where}: instances {fields[1][:20]!r} is not a whole number") from None
    if not math.isfinite(time_s) or time_s < 0:
        raise UserError(f"{where}: time {fields[0]} is not a time from 0 on")
    if not 0 <= count <= MOST_INSTANCES:
        raise UserError(f"{where}: instances {count} is not between 0 and {MOST_INSTANCES}")
    return time_s, count


def synthetic_trace(*, hours: float, wanted: int, rng: random.Random) -> Trace:
    """A trace of a market in which `wanted` machines are asked for all the time."""
    now_s, count = 0.0, wanted
    times_s, counts = [0.0], [wanted]
    while True:
        if count == wanted:
            gap_min = rng.lognormvariate(math.log(COMPLETE_GAP_MEDIAN_MIN), COMPLETE_GAP_SIGMA)
        else:
            gap_min = rng.expovariate(1 / INCOMPLETE_GAP_MIN)
        now_s += 60 * gap_min
        if now_s >= hours * 3600:
            return Trace(tuple(times_s), tuple(counts), hours * 3600)
        missing = wanted - count
        if missing and (not count or rng.random() < RISES):
            count += missing if missing == 1 or rng.random() < RISES_TO_ALL else rng.randint(1, missing - 1)
        else:
            count -= min(count, _drop(rng))
        times_s.append(now_s)
        counts.append(count)


def _drop(rng: random.Random) -> int:
    if rng.random() < SINGLE_DROPS:
        return 1
    size = 2
    while rng.random() > 1 / (MORE_MEAN - 1):
        size += 1
    return size
