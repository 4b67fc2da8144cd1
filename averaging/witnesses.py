"""Others who are in touch with all peers of a stage: they see what its peers cannot tell from one another.

A peer that hears nothing of a mate does not know whether that has stopped or goes on behind a broken link;
and one that has been away itself does not know how far the others are.
"""

from collections.abc import Collection
from typing import Final, Protocol

from averaging.network import PeerId

# Times the life of a record: so long those who died or fell silent are remembered, here and by the witnesses.
# A record may be read for longer than it lives, while others in the directory do not answer.
REMEMBERED = 2


class Witnesses(Protocol):
    def silent(self) -> Collection[PeerId]:
        """Mates whom none of them hears, as all of them say."""
        ...

    def hear_this(self, for_s: float = 0.0) -> bool:
        """Do some of them hear this peer, so that they do not call it silent, for so long to come at least?

        True without any.
        """
        ...

    def heard_for_s(self) -> float:
        """For how long some of them have heard this peer without a break: before, its mates may not have
        waited for it. 0 if none of them does now, inf if there was none so far."""
        ...

    def version(self) -> int:
        """Of the mate that is furthest, as far as all of them say."""
        ...


class NoWitnesses:
    """Satisfies `Witnesses`."""

    def silent(self) -> Collection[PeerId]:
        return ()

    def hear_this(self, for_s: float = 0.0) -> bool:
        return True

    def heard_for_s(self) -> float:
        return float("inf")

    def version(self) -> int:
        return 0


NO_WITNESSES: Final[Witnesses] = NoWitnesses()
