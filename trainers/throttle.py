"""How many microbatches a trainer keeps under way: enough for the slowest stage to be busy, no more.

Additive increase, multiplicative decrease: one more for every round of completions while every peer's queue
is short, a quarter less when one has grown long, at most once per round.

Pure.
"""

from dataclasses import dataclass, field

from averaging.network import PeerId

LONG_QUEUE = 3  # waiting for a peer's device: one is enough to keep it busy, the others cover jitter


@dataclass(slots=True)
class Throttle:
    most: int  # configured bound
    stages: int
    limit: float = field(init=False)
    _queues: dict[PeerId, int] = field(default_factory=dict, init=False)
    _since_cut: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.limit = float(min(self.most, 2 * self.stages))

    def heard(self, peer: PeerId, queue: int) -> None:
        """Note the queue depth in a heartbeat."""
        self._queues[peer] = queue

    def gone(self, peer: PeerId) -> None:
        self._queues.pop(peer, None)

    def completed(self) -> None:
        """One microbatch is done: grow a little, or shrink if a queue is long."""
        self._since_cut += 1
        if max(self._queues.values(), default=0) > LONG_QUEUE:
            if self._since_cut >= self.limit:
                self.limit = max(float(min(self.most, self.stages + 1)), self.limit * 0.75)
                self._since_cut = 0
        else:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)

    def admits(self, in_flight: int) -> bool:
        return in_flight < int(self.limit)
