"""How long bytes take from one machine to another: one queue per uplink and per downlink, and a latency."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from averaging.network import PeerId
from trainers.simulation.events import Events


@dataclass(frozen=True, slots=True)
class Link:
    """A machine's own, to everywhere."""

    up_bytes_s: float
    down_bytes_s: float


@dataclass
class Links:
    """All machines' links; trainers send little and have no limit."""

    events: Events
    latency_s: float
    link_of: Callable[[PeerId], Link | None]
    sent: Counter[PeerId] = field(default_factory=Counter)  # bytes
    _up_free_s: dict[PeerId, float] = field(default_factory=dict)
    _down_free_s: dict[PeerId, float] = field(default_factory=dict)

    def carry(self, source: PeerId, target: PeerId, size: float, arrive: Callable[[], None]) -> None:
        """Call `arrive` when so many bytes have come through."""
        begin_s = self._through(self._up_free_s, source, size, up=True)
        end_s = self._through(self._down_free_s, target, size, up=False)
        self.sent[source] += int(size)
        self.events.at(max(begin_s, end_s) + self.latency_s, arrive)

    def _through(self, free_s: dict[PeerId, float], machine: PeerId, size: float, *, up: bool) -> float:
        link, now_s = self.link_of(machine), self.events.now_s
        if link is None:
            return now_s
        begin_s = max(now_s, free_s.get(machine, 0.0))
        free_s[machine] = begin_s + size / (link.up_bytes_s if up else link.down_bytes_s)
        return free_s[machine]

    def forget(self, machine: PeerId) -> None:
        self._up_free_s.pop(machine, None)
        self._down_free_s.pop(machine, None)
