"""What the live peers of one stage say their steps contain: the evidence by which a hop is done.

A gradient that a peer has accumulated may still be lost with it. Once it is in the state of every live
peer of the stage it cannot be: whoever joins loads that state. A peer that its stage has left far behind is
like one that joins: it will load such a state, too, and nobody waits until it has.

Pure.
"""

from collections import defaultdict
from collections.abc import Collection

from averaging.network import PeerId


class Evidence:
    """Versions of one stage's live peers, and which of our microbatches their states hold."""

    def __init__(self, *, most_behind: int | None) -> None:
        """Who is more than `most_behind` steps behind is left behind; nobody with None."""
        self._most_behind = most_behind
        self.newest = 0  # the step that the stage is about to close
        self._versions: dict[PeerId, int] = {}
        self._abreast: set[PeerId] = set()  # those of them whom the stage has not left behind
        self._holders: defaultdict[bytes, set[PeerId]] = defaultdict(set)
        self._step: dict[bytes, int] = {}  # in which a microbatch is
        self._forgotten: dict[PeerId, int] = {}  # steps before this one are in its state, but not named

    def ready(self, peer: PeerId, version: int) -> None:
        """`peer` counts from now on; what its state holds has been said before."""
        self._is_at(peer, max(version, self._versions.get(peer, 0)))

    def gone(self, peer: PeerId) -> None:
        """What only `peer` had in its state is gone with it."""
        self._versions.pop(peer, None)
        self._forgotten.pop(peer, None)
        self._forget_claims(peer)
        self._look_around()

    def reached(self, peer: PeerId, version: int) -> bool:
        """A peer is at `version`, at least. Has the stage left somebody behind with that?"""
        if version <= self._versions.get(peer, version):
            return False
        abreast = len(self._abreast - {peer})
        self._is_at(peer, version)
        return len(self._abreast - {peer}) < abreast

    def replaced(self, peer: PeerId, version: int) -> None:
        """A peer has loaded another state; what that holds is said next, from its oldest step on."""
        self._forget_claims(peer)
        self._forgotten[peer] = version - 1
        if peer in self._versions:
            self._is_at(peer, version)

    def _is_at(self, peer: PeerId, version: int) -> None:
        before, self._versions[peer] = self._versions.get(peer), version
        if version > self.newest or before == self.newest:
            self._look_around()
        elif self._is_abreast(version):
            self._abreast.add(peer)
        else:
            self._abreast.discard(peer)

    def _look_around(self) -> None:
        self.newest = max(self._versions.values(), default=0)
        self._abreast = {peer for peer, version in self._versions.items() if self._is_abreast(version)}

    def _is_abreast(self, version: int) -> bool:
        return self._most_behind is None or version >= self.newest - self._most_behind

    def holds(self, peer: PeerId, step: int, microbatches: Collection[bytes]) -> None:
        """The state of `peer` holds these microbatches since `step`."""
        for microbatch in microbatches:
            self._holders[microbatch].add(peer)
            self._step[microbatch] = step

    def forget(self, microbatch: bytes) -> None:
        self._holders.pop(microbatch, None)
        self._step.pop(microbatch, None)

    def _forget_claims(self, peer: PeerId) -> None:
        for holders in self._holders.values():
            holders.discard(peer)

    @property
    def floor(self) -> int:
        """The version that every live peer has reached but those left behind (0 without peers)."""
        return min((self._versions[peer] for peer in self._abreast), default=0)

    def is_held(self, microbatch: bytes) -> bool:
        """Is it in the state of a live peer?"""
        return any(peer in self._versions for peer in self._holders.get(microbatch, ()))

    def step_of(self, microbatch: bytes) -> int:
        """The step that a held one is in."""
        return self._step[microbatch]

    def is_safe(self, microbatch: bytes) -> bool:
        """Is it in the state of every live peer that the stage has not left behind?"""
        holders = self._holders.get(microbatch)
        if not holders or not self._forgotten:
            return holders is not None and bool(self._abreast) and self._abreast <= holders
        step = self._step[microbatch]
        known = all(peer in holders or step < self._forgotten.get(peer, 0) for peer in self._abreast)
        return known and self.is_held(microbatch)

    def safe_ones(self, microbatches: Collection[bytes]) -> list[bytes]:
        """Those of some held microbatches that are safe."""
        if self._forgotten:
            return [microbatch for microbatch in microbatches if self.is_safe(microbatch)]
        live, holders = self._abreast, self._holders
        return [m for m in microbatches if len(holders[m]) >= len(live) and live <= holders[m]]

    def __bool__(self) -> bool:
        return bool(self._versions)
