"""What one coordinator has heard for one step.

One event loop's clock.
"""

import asyncio
from dataclasses import dataclass, field

from averaging.mates import CLAIM_S
from averaging.network import PeerId, Stream
from averaging.plan import Plan, Report
from averaging.repair import Holdings


@dataclass(slots=True, eq=False)
class Ballot:
    """Reports until it is closed; then the plan, and what becomes of it."""

    step: int
    reports: dict[PeerId, Report] = field(default_factory=dict)
    streams: dict[PeerId, Stream] = field(default_factory=dict)
    heard_s: dict[PeerId, float] = field(default_factory=dict)  # when each reporter last said anything
    reached_s: float | None = None  # when the target was reached
    plan: Plan | None = None
    closed_s: float | None = None  # when the plan was made
    holdings: Holdings | None = None  # once there is a plan: what its members hold
    ids: dict[PeerId, set[bytes]] = field(default_factory=dict)  # of what each one's vector is made of
    claims_s: dict[PeerId, float] = field(default_factory=dict)  # when each last said that a witness hears it
    duplicates: set[PeerId] = field(default_factory=set)  # who has something of another's in its vector
    versions: dict[PeerId, int] = field(default_factory=dict)  # of those who do not report, as they say
    ended: bool = False
    reason: str = ""
    looking: "asyncio.Task[None] | None" = None

    def heard_outside(self, now_s: float) -> set[PeerId]:
        """Reporters whom a witness hears, as they have just said."""
        return {peer for peer, at_s in self.claims_s.items() if now_s <= at_s + CLAIM_S}

    def last_heard_s(self, peer: PeerId) -> float:
        """When a reporter said something, or was told the plan."""
        return max(self.heard_s[peer], self.closed_s or 0.0)

    def behind(self, *, by: int = 1) -> set[PeerId]:
        """Peers so many steps short of this one: they have no say in it before they have caught up."""
        short = (peer for peer, version in self.versions.items() if version + by <= self.step)
        return set(short).difference(self.reports)
