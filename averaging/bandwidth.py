"""How fast this peer's uplink is, as far as it is known, and what a coordinator makes of such reports.

What the user said is never believed beyond what was measured while sending: bytes, over the time in which at
least one message was on its way. Without a word of the user the link counts as usual: buffers along the way
make short rounds look fast, so a measurement alone is not to be trusted with a larger share.

Pure: `now_s` is an argument. Only uploads are measured: they are what volunteers lack.
"""

from collections.abc import Iterable, Sequence
from statistics import median

BYTES_PER_MEGABIT = 1e6 / 8
LEAST_BYTES = 4 << 20  # less lies in buffers along the way, and seems to take no time
SMOOTHING = 0.5
EQUAL = 1.5  # links that differ by less count as equal: on those, equal shares are as good, and steadier
SLOW = 320 * BYTES_PER_MEGABIT  # on slower links small pieces are worth what they cost
MOST = 10.0  # nobody counts as more than so many times the usual link, whatever it says


class UplinkMeter:
    """Bytes per second of one peer's sending."""

    def __init__(self, said_bytes_per_s: float = 0.0) -> None:
        self._said = said_bytes_per_s
        self.measured = 0.0  # 0 while nothing is known
        self._sending, self._since_s = 0, 0.0
        self._bytes, self._busy_s = 0, 0.0

    @property
    def reported(self) -> float:
        """What others are told; 0 if unknown."""
        return min(self._said, self.measured) if self.measured else self._said

    def begin(self, now_s: float) -> None:
        """A message is on its way from now on."""
        if not self._sending:
            self._since_s = now_s
        self._sending += 1

    def end(self, sent_bytes: int, now_s: float) -> None:
        """It has left."""
        self._sending -= 1
        self._bytes += sent_bytes
        if not self._sending:
            self._busy_s += now_s - self._since_s

    def conclude(self) -> None:
        """A round is over: take what was measured in it into account."""
        if self._sending or self._bytes < LEAST_BYTES or self._busy_s <= 0:
            return
        rate = self._bytes / self._busy_s
        self._bytes, self._busy_s = 0, 0.0
        self.measured = rate if not self.measured else self.measured + SMOOTHING * (rate - self.measured)


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
