"""What a trainer hears of the peers that it watches: when, how far each is, and who says nothing any more.

A peer that was stopped, or cut off, is behind its stage until it has loaded what its mates have become. What
it computed meanwhile, it would compute with weights that the others have left behind: it is given nothing,
as if it were joining. A version is what a peer claims: it takes more than half of its mates to leave it
behind, and in a stage of two the other one.

Pure.
"""

from collections import Counter, defaultdict

from averaging.network import PeerId
from averaging.witnesses import REMEMBERED
from swarm import watch

MOST_BEHIND = 1  # steps: so far are all but the first, whenever a step closes
ROUNDING_S = 1e-6  # of timers that are added up


class Hearing:
    """The peers of all stages, as one trainer hears them."""

    def __init__(self, *, heartbeat_s: float, expire_s: float) -> None:
        """`expire_s`: so long a silent peer's record lives on; its mates are told for longer."""
        self._silent_after_s = watch.SILENT_BEATS * heartbeat_s - ROUNDING_S
        self._told_s = REMEMBERED * expire_s
        self._heard_s: dict[PeerId, float] = {}  # when each peer's newest heartbeat came
        self._stage_of: dict[PeerId, int] = {}
        self._version_of: dict[PeerId, int] = {}  # of those that are heard
        # How many are at each version, by stage.
        self._versions: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._silent: dict[PeerId, tuple[int, float]] = {}  # stage, and since when it is not heard any more

    def __contains__(self, peer: object) -> bool:
        return peer in self._heard_s

    def beat(self, stage: int, peer: PeerId, version: int, now_s: float) -> None:
        """A heartbeat of `peer` has come."""
        self._forget_version(peer)
        self._heard_s[peer], self._stage_of[peer], self._version_of[peer] = now_s, stage, version
        self._versions[stage][version] += 1
        self._silent.pop(peer, None)

    def missed(self, peer: PeerId, now_s: float) -> None:
        """`peer` has not been heard for a while, perhaps for so long that its mates are to know."""
        if now_s >= self._heard_s.get(peer, now_s) + self._silent_after_s:
            self._fall_silent(peer, now_s)

    def gone(self, peer: PeerId, now_s: float, *, left: bool) -> None:
        """`peer` is watched no more; its mates are told of that, unless it said goodbye."""
        self._fall_silent(peer, now_s)
        if left:
            self._silent.pop(peer, None)
        self._heard_s.pop(peer, None)
        self._stage_of.pop(peer, None)

    def _fall_silent(self, peer: PeerId, now_s: float) -> None:
        if peer in self._stage_of:  # else it was never heard
            self._forget_version(peer)
            self._silent.setdefault(peer, (self._stage_of[peer], now_s))

    def _forget_version(self, peer: PeerId) -> None:
        version = self._version_of.pop(peer, None)
        if version is not None:
            versions = self._versions[self._stage_of[peer]]
            versions[version] -= 1
            if not versions[version]:
                del versions[version]

    def last_s(self, peer: PeerId) -> float | None:
        """When the newest heartbeat of `peer` came."""
        return self._heard_s.get(peer)

    def newest(self, stage: int) -> int:
        """The version of the peer of `stage` that is furthest."""
        return max(self._versions[stage], default=0)

    def is_behind(self, peer: PeerId) -> bool:
        """Has its stage left behind a peer that is heard?"""
        versions, own = self._versions[self._stage_of[peer]], self._version_of[peer]
        ahead = sum(count for version, count in versions.items() if version > own + MOST_BEHIND)
        return 2 * ahead > versions.total() - 1

    def silent_mates(self, peer: PeerId, now_s: float) -> list[PeerId]:
        """Others of its stage who do not say anything here."""
        recent_s, own = now_s - self._told_s, self._stage_of[peer]
        self._silent = {p: (stage, at_s) for p, (stage, at_s) in self._silent.items() if at_s > recent_s}
        mates = [mate for mate, (stage, _) in self._silent.items() if stage == own and mate != peer]
        return mates[-watch.MAX_SILENT :]
