"""Which peer of a stage serves the next microbatch: interleaved weighted round-robin (IWRR).

A trainer keeps one `StageWiring` per stage. Each peer has a clock: the seconds of work this trainer has
given it so far. The peer whose clock is furthest behind goes next, so peers serve in proportion to
their speed, interleaved rather than in bursts. Other trainers' load needs no messages: it shows up here
as slower replies.

A peer that failed is banned until it announces itself anew, for twice as long each time. A link that
failed bans the pair, for as long as one back-off: the peer itself may be fine.

Pure: no network, no wall clock, randomness enters through `rng`. Not thread-safe: one event loop.
Source: "stochastic wiring", SWARM parallelism, arXiv:2301.11913, algorithm 1; IWRR, arXiv:2003.08372.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

from averaging.network import PeerId
from swarm.errors import NoPeersError

BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 300.0


@dataclass(kw_only=True, slots=True)
class StageWiring:
    stage: int
    rng: random.Random
    prior_cost_s: float  # seconds per token assumed until the first reply
    smoothing: float = 0.2  # weight of the newest timing in the moving average, in (0, 1]
    _clock_s: dict[PeerId, float] = field(default_factory=dict, init=False)  # work given
    _cost_s: dict[PeerId, float] = field(default_factory=dict, init=False)  # per token
    _banned_until_s: dict[PeerId, float] = field(default_factory=dict, init=False)
    _failures: dict[PeerId, int] = field(default_factory=dict, init=False)
    _bad_links: dict[tuple[PeerId, PeerId], float] = field(default_factory=dict, init=False)
    suspended: set[PeerId] = field(default_factory=set, init=False)  # silent, or behind: to get no new work

    def __contains__(self, peer: object) -> bool:
        return peer in self._clock_s

    def __len__(self) -> int:
        return len(self._clock_s)

    def add(self, peer: PeerId) -> None:
        """Admit `peer`, which has announced itself (anew); no-op if known."""
        # Not zero: a newcomer would then get every microbatch until it caught up with the pool.
        self._clock_s.setdefault(peer, min(self._clock_s.values(), default=0.0))
        # Not the announced speed: peers are strangers, and a boast would attract the whole load.
        self._cost_s.setdefault(peer, median(self._cost_s.values()) if self._cost_s else self.prior_cost_s)

    def remove(self, peer: PeerId) -> None:
        """Forget `peer`, which left; no-op if unknown."""
        self._clock_s.pop(peer, None)
        self._cost_s.pop(peer, None)
        self.suspended.discard(peer)

    def ban(self, peer: PeerId, now_s: float) -> None:
        """Forget `peer`, which failed, and refuse it for a while that doubles with every failure."""
        self.remove(peer)
        failures = self._failures[peer] = self._failures.get(peer, 0) + 1
        backoff_s = min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (failures - 1))
        self._banned_until_s[peer] = now_s + backoff_s

    def banned_for_s(self, peer: PeerId, now_s: float) -> float:
        """0 if it is not."""
        return max(0.0, self._banned_until_s.get(peer, now_s) - now_s)

    def is_banned(self, peer: PeerId, now_s: float) -> bool:
        return self.banned_for_s(peer, now_s) > 0

    def ban_link(self, source: PeerId, target: PeerId, now_s: float) -> None:
        """Do not send from `source` to `target` for a while."""
        self._bad_links = {link: until_s for link, until_s in self._bad_links.items() if until_s > now_s}
        self._bad_links[source, target] = now_s + 10 * BACKOFF_S

    def suspend(self, peer: PeerId, suspended: bool) -> None:
        """Give a peer that is silent or behind no new work, without forgetting it."""
        (self.suspended.add if suspended else self.suspended.discard)(peer)

    def choose(
        self, tokens: int, *, now_s: float = 0.0, source: PeerId = "", avoid: Collection[PeerId] = ()
    ) -> PeerId:
        """Pick the peer for the next microbatch and charge it the expected seconds.

        Peers that `source` cannot reach, suspended ones and those in `avoid` are taken only when nobody
        else is left.

        Raises:
            NoPeersError: the pool is empty; wait for the next announcements, then retry.
        """
        if not self._clock_s:
            raise NoPeersError(f"stage {self.stage} has no live peer")

        clock_s = self._clock_s
        if self.suspended or self._bad_links or avoid:
            trouble = {
                peer: 4 * (peer in self.suspended)
                + 2 * (self._bad_links.get((source, peer), now_s) > now_s)
                + (peer in avoid)
                for peer in clock_s
            }
            least_trouble = min(trouble.values())
            clock_s = {peer: clock_s[peer] for peer, value in trouble.items() if value == least_trouble}
        least_s = min(clock_s.values())
        # Random ties: trainers that start together must not all open with the same peer.
        peer = self.rng.choice([peer for peer, at_s in clock_s.items() if at_s == least_s])
        self._clock_s[peer] += tokens * self._cost_s[peer]
        return peer

    def observe(self, peer: PeerId, tokens: int, elapsed_s: float) -> None:
        """Refine the cost of `peer` with one hop of `tokens`, `elapsed_s` with queue and transfer."""
        if peer in self._cost_s:  # else removed while its reply was on the way
            self._cost_s[peer] += self.smoothing * (elapsed_s / tokens - self._cost_s[peer])
            self._failures.pop(peer, None)
