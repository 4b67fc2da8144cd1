"""What a peer holds of every microbatch: the retained tensors of its hop, and where they go next.

Whoever produced a tensor keeps its bytes until the trainer releases the microbatch: any set of
neighbours may die and be sent the same bytes again. The mailbox counts those bytes, bounds the hops
that wait for computation, and remembers for a while which microbatches were withdrawn, so that a late
push is answered STALE instead of being computed again.

Pure bookkeeping: one event loop, no I/O.
"""

import concurrent.futures
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

import torch

from averaging.network import Buffer, PeerId
from swarm.messages import Push, Route
from swarm.stage import Graph

TOMBSTONES = 4096


class Phase(Enum):
    WAITING = "waiting for its input"
    QUEUED = "forward queued or running"
    FORWARDED = "forward done, waiting for the gradient"
    RETURNING = "backward queued or running"
    ACCUMULATED = "accumulated"


@dataclass(frozen=True, slots=True)
class Sent:
    """A tensor as it went over the wire."""

    data: Buffer
    shape: tuple[int, ...]


@dataclass(slots=True)
class Hop:
    """One microbatch at this stage."""

    push: Push  # the newest one: its route holds
    phase: Phase = Phase.WAITING
    x: torch.Tensor | None = None  # decoded input until the forward has used it
    input: Buffer | None = None  # encoded input, for computing again
    input_push: Push | None = None
    grad: torch.Tensor | None = None  # decoded gradient of the output
    output: Sent | None = None
    gradient: Sent | None = None
    graph: Graph | None = None
    job: "concurrent.futures.Future[object] | None" = None
    version: int = 0  # of the weights the forward used
    step: int = 0  # it was accumulated for
    counted: bool = False  # its gradient is in a sum here; else it only supplied its neighbours
    loss: float = 0.0
    released: bool = False  # its tensors are gone; only its gradient is still to go into a step
    dropped: bool = False  # withdrawn: it must not be accumulated any more
    sending: set[bool] = field(default_factory=set)  # directions being pushed right now

    @property
    def route(self) -> Route:
        return self.push.route

    @property
    def is_done(self) -> bool:
        """Is nothing of it left to be computed here? Accumulated, or only to supply the next stage."""
        supplied = self.phase is Phase.FORWARDED and self.push.stage < self.route.backward_until
        return supplied or self.phase is Phase.ACCUMULATED

    def retained_bytes(self) -> int:
        parts = (self.input, self.output and self.output.data, self.gradient and self.gradient.data)
        return sum(len(part) for part in parts if part)


class Mailbox:
    """All hops of one peer."""

    def __init__(self, *, capacity: int, retained: int) -> None:
        self.capacity = capacity  # hops that may wait for computation
        self._retained = retained  # microbatches that may be held at all
        self._hops: dict[bytes, Hop] = {}
        self._buried: OrderedDict[bytes, int] = OrderedDict()  # microbatch -> highest withdrawn attempt

    def __len__(self) -> int:
        return len(self._hops)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(list(self._hops.values()))

    @property
    def waiting(self) -> int:
        """Hops that are to be computed here yet."""
        return sum(not hop.is_done for hop in self._hops.values())

    @property
    def retained_bytes(self) -> int:
        return sum(hop.retained_bytes() for hop in self._hops.values())

    @property
    def is_full(self) -> bool:
        held = sum(not hop.released for hop in self._hops.values())
        return self.waiting >= self.capacity or held >= self._retained

    def get(self, microbatch: bytes) -> Hop | None:
        return self._hops.get(microbatch)

    def is_buried(self, route: Route) -> bool:
        """Was this attempt (or a later one) withdrawn from here?"""
        return self._buried.get(route.microbatch, -1) >= route.attempt

    def add(self, push: Push) -> Hop:
        hop = Hop(push)
        self._hops[push.route.microbatch] = hop
        return hop

    def adopt(self, hop: Hop, route: Route) -> None:
        """Take over a newer route; an older one changes nothing."""
        if route.attempt > hop.route.attempt:
            old = hop.push
            hop.push = Push(
                route=route,
                stage=old.stage,
                backward=old.backward,
                codec=old.codec,
                shape=old.shape,
                tokens=old.tokens,
                sequences=old.sequences,
            )

    def drop(self, microbatch: bytes, attempt: int | None = None) -> None:
        """Forget a microbatch and refuse this and earlier attempts of it from now on."""
        hop = self._hops.pop(microbatch, None)
        if hop is not None:
            hop.dropped = True
        known = -1 if hop is None else hop.route.attempt
        self._buried[microbatch] = max(
            self._buried.pop(microbatch, -1), known, -1 if attempt is None else attempt
        )
        while len(self._buried) > TOMBSTONES:
            self._buried.popitem(last=False)

    def release(self, hop: Hop) -> None:
        """Let go of what was kept for the neighbours."""
        hop.input = hop.output = hop.gradient = None
        hop.released = True

    def forget(self, microbatch: bytes) -> None:
        """Make room for the same microbatch to come again."""
        self._hops.pop(microbatch, None)

    def of_session(self, trainer: PeerId, session: bytes) -> list[Hop]:
        return [h for h in self._hops.values() if h.route.trainer == trainer and h.route.session == session]
