"""What the live peers of one stage say their steps contain: the evidence by which a hop is done.

A gradient that a peer has accumulated may still be lost with it. Once it is in the state of every live
peer of the stage it cannot be: whoever joins loads that state.

Pure.
"""

from collections import defaultdict
from collections.abc import Collection

from averaging.network import PeerId


class Evidence:
    """Versions of one stage's live peers, and which of our microbatches their states hold."""

    def __init__(self) -> None:
        self._versions: dict[PeerId, int] = {}
        self._holders: defaultdict[bytes, set[PeerId]] = defaultdict(set)
        self._step: dict[bytes, int] = {}  # in which a microbatch is
        self._forgotten: dict[PeerId, int] = {}  # steps before this one are in its state, but not named

    def ready(self, peer: PeerId, version: int) -> None:
        """`peer` counts from now on; what its state holds has been said before."""
        self._versions[peer] = max(version, self._versions.get(peer, 0))

    def gone(self, peer: PeerId) -> None:
        """What only `peer` had in its state is gone with it."""
        self._versions.pop(peer, None)
        self._forgotten.pop(peer, None)
        self._forget_claims(peer)

    def reached(self, peer: PeerId, version: int) -> None:
        """A peer is at `version`, at least."""
        if peer in self._versions:
            self._versions[peer] = max(version, self._versions[peer])

    def replaced(self, peer: PeerId, version: int) -> None:
        """A peer has loaded another state; what that holds is said next, from its oldest step on."""
        self._forget_claims(peer)
        self._forgotten[peer] = version - 1
        if peer in self._versions:
            self._versions[peer] = version

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
        """The version that every live peer has reached (0 without peers)."""
        return min(self._versions.values(), default=0)

    @property
    def newest(self) -> int:
        """The step that the stage is about to close."""
        return max(self._versions.values(), default=0)

    def is_held(self, microbatch: bytes) -> bool:
        """Is it in the state of a live peer?"""
        return any(peer in self._versions for peer in self._holders.get(microbatch, ()))

    def step_of(self, microbatch: bytes) -> int:
        """The step that a held one is in."""
        return self._step[microbatch]

    def is_safe(self, microbatch: bytes) -> bool:
        """Is it in the state of every live peer?"""
        holders = self._holders.get(microbatch)
        if not holders or not self._forgotten:
            return holders is not None and bool(self._versions) and self._versions.keys() <= holders
        step = self._step[microbatch]
        known = all(peer in holders or step < self._forgotten.get(peer, 0) for peer in self._versions)
        return known and self.is_held(microbatch)

    def safe_ones(self, microbatches: Collection[bytes]) -> list[bytes]:
        """Those of some held microbatches that are in the state of every live peer."""
        if self._forgotten:
            return [microbatch for microbatch in microbatches if self.is_safe(microbatch)]
        live, holders = self._versions.keys(), self._holders
        return [m for m in microbatches if len(holders[m]) >= len(live) and live <= holders[m]]

    def __bool__(self) -> bool:
        return bool(self._versions)
