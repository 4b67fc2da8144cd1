"""What a ledger hears and what it says: events in, commands out.

Plain records; times are seconds of the trainer's clock.
"""

from dataclasses import dataclass

from averaging.network import PeerId
from swarm.messages import Route

# ---- events


@dataclass(frozen=True, slots=True)
class PeerReady:
    """A peer answers our watch stream and may be given hops."""

    stage: int
    peer: PeerId
    version: int


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Dead, or silent for longer than its lease: it will accumulate nothing more of ours."""

    peer: PeerId
    left: bool = False  # said goodbye: not a failure
    silent: bool = False  # not known to be dead: steps of its stage may still contain its gradients


@dataclass(frozen=True, slots=True)
class WatchBroke:
    """The peer lives, but events may have been lost: ask it what became of its hops."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class HopEvent:
    """What a peer says about one of its hops."""

    peer: PeerId
    kind: int
    microbatch: bytes
    attempt: int = 0
    step: int = 0
    loss: float = 0.0
    backward: bool = False
    target: PeerId = ""
    status: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """A peer's answer to a resend, or the first peer's to a push of token ids."""

    peer: PeerId
    microbatch: bytes
    attempt: int
    status: int
    push: bool


@dataclass(frozen=True, slots=True)
class CancelAnswered:
    """The peer has withdrawn these microbatches, but holds the gradients of some already."""

    peer: PeerId
    microbatches: tuple[tuple[bytes, int], ...]  # (id, attempt), as in `Cancel`
    accumulated: tuple[tuple[bytes, int, float], ...]  # (microbatch, step, loss)


@dataclass(frozen=True, slots=True)
class SteppedEvent:
    """A peer's stage state is at `version`; `microbatches` are in its newest step."""

    stage: int
    peer: PeerId
    version: int
    microbatches: frozenset[bytes] = frozenset()
    whole: bool = False  # what the peer said before does not hold any more: it has another state


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


LedgerEvent = PeerReady | PeerGone | WatchBroke | HopEvent | Answered | CancelAnswered | SteppedEvent | Tick


# ---- commands


@dataclass(frozen=True, slots=True)
class PushTokens:
    route: Route
    tokens: bytes
    sequences: int


@dataclass(frozen=True, slots=True)
class Resend:
    peer: PeerId
    route: Route
    backward: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    peer: PeerId
    microbatches: tuple[tuple[bytes, int], ...]  # (id, attempt)


@dataclass(frozen=True, slots=True)
class Release:
    peer: PeerId
    microbatches: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """Every stage has accumulated it (or, evaluating, the last stage has its loss)."""

    microbatch: bytes
    tokens: int
    loss: float
    evaluate: bool


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Given up: its data does harm wherever it goes."""

    microbatch: bytes
    evaluate: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """All hops that `peer` left behind have arrived elsewhere."""

    peer: PeerId
    noticed_s: float
    recovered_s: float
    hops: int


Command = PushTokens | Resend | Cancel | Release | Completed | Abandoned | Recovered
