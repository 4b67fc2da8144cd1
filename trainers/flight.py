"""One microbatch under way: its hops, one per stage, and the route they make.

Plain state that the ledger changes. B sequences of T + 1 token ids.
"""

from dataclasses import dataclass, field
from enum import IntEnum

from averaging.network import PeerId
from swarm.messages import Route


class Phase(IntEnum):
    ASSIGNED = 0
    FORWARDED = 1
    ACCUMULATED = 2
    SETTLED = 3


@dataclass(slots=True)
class Hop:
    peer: PeerId | None = None
    phase: Phase = Phase.ASSIGNED
    placed: int = 0  # the attempt with which `peer` was chosen
    chosen_s: float = 0.0  # when that was
    supplies: bool = False  # `peer` was chosen after the hop was done
    has_input: bool = False
    due_s: float | None = None  # since when it is this hop's turn
    took_s: float = 0.0  # the jobs of it that are done
    cancelling: bool = False
    step: int = 0
    accumulated_by: PeerId | None = None  # `peer` may later be another one that only supplies neighbours
    awaits_verdict: bool = False  # whoever may have accumulated it is gone; is it in a step?
    verdict_s: float = 0.0  # when to stop waiting for one

    @property
    def only_supplies(self) -> bool:
        """Is it done, and `peer` here for its neighbours' sake?"""
        return self.phase >= Phase.ACCUMULATED and (self.supplies or self.accumulated_by != self.peer)


@dataclass(slots=True)
class Flight:
    id: bytes
    tokens: bytes
    sequences: int
    token_count: int
    evaluate: bool
    step: int
    hops: list[Hop]
    attempt: int = 0
    loss: float = 0.0
    unplaced: set[int] = field(default_factory=set)
    routed: bool = False  # it has had a peer at every stage
    completed: bool = False  # every hop is accumulated
    counted: bool = False  # completed at least once
    rejections: int = 0
    avoid: set[PeerId] = field(default_factory=set)
    not_before_s: float = 0.0  # no new route sooner
    retries: list[tuple[float, int, bool]] = field(default_factory=list)  # (when, to which stage, backward)
    touched: set[PeerId] = field(default_factory=set)  # peers that may hold something of it

    def peer(self, stage: int) -> PeerId:
        """The peer of a stage; the flight must have been placed."""
        peer = self.hops[stage].peer
        assert peer is not None, "a placed flight has a peer at every stage"
        return peer

    def is_awaited(self, stage: int) -> bool:
        """Does a neighbour still lack what the peer of `stage` sends?"""
        forward = stage + 1 < len(self.hops) and not self.hops[stage + 1].has_input
        return forward or (stage > 0 and self.hops[stage - 1].phase < Phase.ACCUMULATED)

    def route(self, trainer: PeerId, session: bytes) -> Route:
        """Where it goes now, and what is still to be done on the way."""
        hops = self.hops
        return Route(
            microbatch=self.id,
            session=session,
            trainer=trainer,
            attempt=self.attempt,
            peers=tuple(self.peer(stage) for stage in range(len(hops))),
            forward_until=max((s for s, h in enumerate(hops) if not h.has_input), default=0),
            backward_until=min(
                (s for s, h in enumerate(hops) if h.phase < Phase.ACCUMULATED), default=len(hops)
            ),
            accumulated=tuple(
                s for s, h in enumerate(hops) if h.phase >= Phase.ACCUMULATED or h.awaits_verdict
            ),
            evaluate=self.evaluate,
            step=self.step,
        )
