"""What a trainer hears of the peers that it watches: when, how far each is, and who says nothing any more.

Who is silent, or two steps or more behind its stage (it was stopped, or cut off, and has yet to load what
its mates have become) gets no new work: it would compute with weights that the others have left behind.

Pure.
"""

from averaging.network import PeerId
from swarm import watch

MOST_BEHIND = 1  # steps: so far are all but the first, whenever a step closes


class Hearing:
    """The peers of all stages, as one trainer hears them."""

    def __init__(self, *, heartbeat_s: float, expire_s: float) -> None:
        """`expire_s`: so long a silent peer's record lives on, and its mates are told."""
        self._silent_after_s, self._expire_s = watch.SILENT_BEATS * heartbeat_s, expire_s
        self._heard_s: dict[PeerId, float] = {}  # when each peer's newest heartbeat came
        self._stage_of: dict[PeerId, int] = {}
        self._version_of: dict[PeerId, int] = {}  # of those that are heard
        self._silent: dict[PeerId, tuple[int, float]] = {}  # stage, and since when it is not heard any more

    def __contains__(self, peer: object) -> bool:
        return peer in self._heard_s

    def beat(self, stage: int, peer: PeerId, version: int, now_s: float) -> None:
        """A heartbeat of `peer` has come."""
        self._heard_s[peer], self._stage_of[peer], self._version_of[peer] = now_s, stage, version
        self._silent.pop(peer, None)

    def stepped(self, peer: PeerId, version: int) -> None:
        """`peer` says that it is at `version` now."""
        if peer in self._version_of:
            self._version_of[peer] = version

    def missed(self, peer: PeerId, now_s: float) -> None:
        """`peer` has not been heard for a while, perhaps for so long that its mates are to know."""
        if now_s >= self._heard_s.get(peer, now_s) + self._silent_after_s:
            self._fall_silent(peer, now_s)
            self._version_of.pop(peer, None)

    def gone(self, peer: PeerId, now_s: float, *, left: bool) -> None:
        """`peer` is watched no more; its mates are told of that, unless it said goodbye."""
        if left:
            self._silent.pop(peer, None)
        else:
            self._fall_silent(peer, now_s)
        for known in (self._heard_s, self._stage_of, self._version_of):
            known.pop(peer, None)

    def _fall_silent(self, peer: PeerId, now_s: float) -> None:
        if peer in self._stage_of:  # else it was never heard
            self._silent.setdefault(peer, (self._stage_of[peer], now_s))

    def last_s(self, peer: PeerId) -> float | None:
        """When the newest heartbeat of `peer` came."""
        return self._heard_s.get(peer)

    def newest(self, stage: int) -> int:
        """The version of the peer of `stage` that is furthest."""
        return max((v for p, v in self._version_of.items() if self._stage_of[p] == stage), default=0)

    def is_behind(self, peer: PeerId) -> bool:
        """Has the stage of `peer` left it behind?"""
        version = self._version_of.get(peer)
        return version is not None and self.newest(self._stage_of[peer]) - version > MOST_BEHIND

    def silent_mates(self, peer: PeerId, now_s: float) -> list[PeerId]:
        """Others of its stage who do not say anything here."""
        recent_s, own = now_s - self._expire_s, self._stage_of[peer]
        self._silent = {p: (stage, at_s) for p, (stage, at_s) in self._silent.items() if at_s > recent_s}
        mates = [mate for mate, (stage, _) in self._silent.items() if stage == own and mate != peer]
        return mates[-watch.MAX_SILENT :]
