"""How many microbatches a trainer keeps under way: enough for the slowest stage to be busy, no more.

Twice as many in every round of completions, a quarter less when no peer has room or after a round in which
some peer's queue never became short; then one more in a round, two more in the next, four: so it soon follows
a swarm that grows, and at once if it knows by how much: twice as many when a stage of one peer has two. Only
such a standing queue is work in excess: one that is long for a moment is the pipeline's own jitter, and
cutting for it leaves the other peers idle.
Source: standing queues, "Controlling queue delay" (CoDel), Nichols and Jacobson, 2012.

Pure.
"""

from dataclasses import dataclass, field

from averaging.network import PeerId

STANDING_QUEUE = 2  # waiting for a peer's device all the time: one keeps it busy, another covers jitter
STUCK = 2  # two peers that stop at once take twice as many with them as are under way
HEARTBEATS = 4  # of a peer, to call its queue a standing one


@dataclass(slots=True)
class _Queue:
    shortest: int
    heartbeats: int = 0


@dataclass(slots=True)
class Throttle:
    most: int  # configured bound
    stages: int
    limit: float = field(init=False)
    _queues: dict[PeerId, _Queue] = field(default_factory=dict, init=False)  # in this round
    _completed: int = field(default=0, init=False)  # in this round
    _in_excess: bool = field(default=False, init=False)  # in the round before
    _growth: float = field(init=False)  # in this round

    def __post_init__(self) -> None:
        self._growth = self.limit = float(min(self.most, 2 * self.stages))

    def heard(self, peer: PeerId, queue: int) -> None:
        """Note the queue depth in a heartbeat."""
        known = self._queues.get(peer)
        if known is None:
            known = self._queues[peer] = _Queue(queue)
        known.heartbeats += 1
        if queue < known.shortest:
            known.shortest = queue

    def gone(self, peer: PeerId) -> None:
        self._queues.pop(peer, None)

    def completed(self) -> None:
        """One microbatch is done: grow a little; at the end of a round cut if a queue stood all the while."""
        self._completed += 1
        if not self._in_excess:
            self.limit = min(float(self.most), self.limit + self._growth / self.limit)
        if self._completed < self.limit:
            return
        heard = [queue for queue in self._queues.values() if queue.heartbeats >= HEARTBEATS]
        if not heard:
            return
        if max(queue.shortest for queue in heard) > STANDING_QUEUE:
            return self._cut()
        self._in_excess, self._growth = False, min(2 * self._growth, self.limit)
        self._completed = 0
        self._queues.clear()

    def came(self, pool: int) -> None:
        """A stage has one peer more, `pool` by now: that much faster it may be."""
        self._in_excess, self._growth = False, max(self._growth, self.limit / max(1, pool - 1))

    def refused(self) -> None:
        """No peer of a stage has room for a hop: cut at once, once a round."""
        if not self._in_excess:
            self._cut()

    def _cut(self) -> None:
        self._in_excess, self._growth = True, 1.0
        self.limit = max(float(min(self.most, self.stages + 1)), self.limit * 0.75)
        self._completed = 0
        self._queues.clear()

    def admits(self, in_flight: int, stuck: int = 0) -> bool:
        """May another one follow? Those `stuck` with silent peers do not count, up to a bound: others get
        them only after seconds, and have nothing to do meanwhile."""
        limit = int(self.limit)
        return in_flight - min(stuck, STUCK * limit) < limit
