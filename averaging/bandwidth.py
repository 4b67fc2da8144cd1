"""How fast this peer's uplink is, as far as it is known, and what a coordinator makes of such reports.

What the user said is never believed beyond what was measured while sending: bytes, over the time in which at
least one message was on its way; the median of the last few such measurements, as the process may have been
stopped during one. What did not arrive measures nothing: its receiver was gone, or stopped.
Without a word of the user the link counts as usual: buffers along the way make short rounds look fast, so a
measurement alone is not to be trusted with a larger share.

Pure: `now_s` is an argument. Only uploads are measured: they are what volunteers lack.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

BYTES_PER_MEGABIT = 1e6 / 8
LEAST_BYTES = 4 << 20  # less lies in buffers along the way, and seems to take no time
REMEMBERED = 5  # measurements
EQUAL = 1.5  # links that differ by less count as equal: on those, equal shares are as good, and steadier
SLOW = 320 * BYTES_PER_MEGABIT  # on slower links small pieces are worth what they cost
MOST = 10.0  # nobody counts as more than so many times the usual link, whatever it says


class UplinkMeter:
    """Bytes per second of one peer's sending."""

    def __init__(self, said_bytes_per_s: float = 0.0) -> None:
        self._said = said_bytes_per_s
        self._rates: deque[float] = deque(maxlen=REMEMBERED)
        self._sending, self._since_s = 0, 0.0
        self._under_way, self._has_failed = 0, False  # since then: bytes, and did any of them not arrive?
        self._bytes, self._busy_s = 0, 0.0

    @property
    def measured(self) -> float:
        """0 while nothing is known."""
        return median(self._rates) if self._rates else 0.0

    @property
    def reported(self) -> float:
        """What others are told; 0 if unknown."""
        return min(self._said, self.measured) if self._rates else self._said

    def begin(self, now_s: float) -> None:
        """A message is on its way from now on."""
        if not self._sending:
            self._since_s, self._under_way, self._has_failed = now_s, 0, False
        self._sending += 1

    def end(self, sent_bytes: int, now_s: float) -> None:
        """It has left; `sent_bytes` is 0 if it could not."""
        self._sending -= 1
        self._under_way += sent_bytes
        self._has_failed |= not sent_bytes
        if not self._sending and not self._has_failed:
            self._bytes += self._under_way
            self._busy_s += now_s - self._since_s

    def conclude(self) -> None:
        """A round is over: take what was measured in it into account."""
        if self._sending or self._bytes < LEAST_BYTES or self._busy_s <= 0:
            return
        self._rates.append(self._bytes / self._busy_s)
        self._bytes, self._busy_s = 0, 0.0


def are_slow(reported: Iterable[float]) -> bool:
    """Is one of these links known to be slow?"""
    return any(0 < rate < SLOW for rate in reported)


def levelled(reported: Sequence[float]) -> list[float]:
    """What shares are computed from: unknown links (0) count as usual, near ones as equal, none as huge."""
    known = [rate for rate in reported if rate > 0]
    if not known:
        return [1.0] * len(reported)
    usual = median(known)
    rates = [min(rate or usual, MOST * usual) for rate in reported]
    if max(rates) <= EQUAL * min(rates):
        return [1.0] * len(reported)
    return rates
