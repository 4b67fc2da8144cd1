"""What a run can expect of its peers: who serves what, how fast it trains, what travels, and what limits it.

A peer's rate is bounded by its device and by its links. Every token that a stage computes sends an activation
on and a gradient back; every step sends the stage's gradient to its mates and a mean back:

    rate x cost                     <= speed x availability
    rate x 2 activations + steps/s x 2 vectors x (n - 1) / n   <= uplink, and the same for the downlink

The run is as fast as its weakest stage. Computing grows with the square of the width, what travels with the
width: the square-cube law (SWARM, arXiv:2301.11913, section 3.1), which `utilisation` makes visible.

Pure.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from averaging.codecs import CODECS
from swarm.config import RunConfig

OPERATIONS = 6  # per multiply-add of the forward pass: two, and twice that to go back
VECTORS = 7  # of a stage's parameters that a peer holds: itself, two moments, its sums, and what averages
DAY_S = 86_400
HALVINGS = 40
NEGLIGIBLE = 1e-6
MOST_TRIED, MOST_KINDS = 20_000, 4


@dataclass(frozen=True, slots=True)
class Volunteer:
    """One peer that may come."""

    name: str
    operations_s: float  # floating-point operations per second, as it really reaches
    memory_bytes: float
    up_bytes_s: float
    down_bytes_s: float
    availability: float = 1.0  # part of the time


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What a stage asks of its peers."""

    cost: float  # multiply-adds per token, going forward
    values: int  # parameters
    up_bytes: float  # per token
    down_bytes: float

    @property
    def memory_bytes(self) -> float:
        return 4.0 * VECTORS * self.values


@dataclass(slots=True)
class Seats:
    """Who serves one stage, and how fast."""

    load: StageLoad
    peers: list[Volunteer] = field(default_factory=list)

    def rate(self, steps_s: float, vector_bytes: float) -> float:
        """Tokens per second, beside so many steps per second."""
        return sum(self.rate_of(peer, steps_s, vector_bytes)[0] for peer in self.peers)

    def rate_of(self, peer: Volunteer, steps_s: float, vector_bytes: float) -> tuple[float, str]:
        """Tokens per second of one peer, and what limits it."""
        mates = len(self.peers)
        averaging = steps_s * 2 * vector_bytes * (mates - 1) / mates
        load = self.load
        bounds = [(peer.operations_s / OPERATIONS / load.cost, "its device")]
        if load.up_bytes:
            bounds.append(((peer.up_bytes_s - averaging) / load.up_bytes, "its uplink"))
        if load.down_bytes:
            bounds.append(((peer.down_bytes_s - averaging) / load.down_bytes, "its downlink"))
        if averaging > min(peer.up_bytes_s, peer.down_bytes_s):
            return 0.0, "averaging alone needs more than its link"
        rate, why = min(bounds)
        return max(0.0, rate) * peer.availability, why


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one run with some peers."""

    seats: tuple[Seats, ...]
    rates: tuple[float, ...]  # tokens per second that each could do
    tokens_s: float
    steps_s: float
    weakest: int
    limits: str  # what bounds most of the weakest stage's peers
    gigabytes_day: tuple[float, ...]  # that a peer of each stage sends per day while it is there
    left_out: tuple[Volunteer, ...]  # no stage fits into their memory

    @property
    def works(self) -> bool:
        return self.tokens_s > 0


def stage_loads(config: RunConfig, costs: Sequence[float], values: Sequence[int]) -> list[StageLoad]:
    """What the stages of `config` ask for, by their `costs` and numbers of parameters."""
    activation = CODECS[config.pipeline.codec].size_bytes(config.model.width)
    last = len(costs) - 1
    return [
        StageLoad(
            cost,
            count,
            up_bytes=activation * ((stage < last) + (stage > 0)),
            down_bytes=activation * ((stage > 0) + (stage < last)),
        )
        for stage, (cost, count) in enumerate(zip(costs, values, strict=True))
    ]


def predict(config: RunConfig, loads: Sequence[StageLoad], volunteers: Sequence[Volunteer]) -> Prediction:
    """Seat the fastest first, each where the run needs it most of what fits into its memory."""
    seats, left_out = [Seats(load) for load in loads], []
    rates = [0.0] * len(loads)
    for peer in sorted(volunteers, key=lambda v: (-v.operations_s * v.availability, v.name)):
        fitting = [s for s, load in enumerate(loads) if load.memory_bytes <= peer.memory_bytes]
        if not fitting:
            left_out.append(peer)
            continue
        stage = min(fitting, key=lambda s: (rates[s], s))
        seats[stage].peers.append(peer)
        rates[stage] += seats[stage].rate_of(peer, 0.0, 0.0)[0]
    run = _Run(
        seats,
        vectors=[float(CODECS[config.averaging.codec].size_bytes(load.values)) for load in loads],
        batch=config.training.target_batch_tokens,
    )
    tokens_s = run.improved(tries=MOST_TRIED // max(1, len(volunteers)))
    steps_s, found = tokens_s / run.batch, run.rates(tokens_s)
    weakest = min(range(len(seats)), key=lambda s: (found[s], s))
    return Prediction(
        seats=tuple(seats),
        rates=tuple(found),
        tokens_s=tokens_s,
        steps_s=steps_s,
        weakest=weakest,
        limits=_what_limits(seats[weakest], steps_s, run.vectors[weakest]),
        gigabytes_day=tuple(
            _gigabytes(seat, tokens_s, steps_s, vector)
            for seat, vector in zip(seats, run.vectors, strict=True)
        ),
        left_out=tuple(left_out),
    )


@dataclass
class _Run:
    """Peers on their seats, and what they come to."""

    seats: list[Seats]
    vectors: list[float]  # bytes of each stage's gradient
    batch: float

    def rates(self, tokens_s: float) -> list[float]:
        """Of every stage, beside the averaging that so many tokens per second make."""
        pairs = zip(self.seats, self.vectors, strict=True)
        return [seat.rate(tokens_s / self.batch, vector) for seat, vector in pairs]

    def tokens_s(self) -> float:
        """The most that is reached although it is asked for: rates fall with what is asked for."""
        low, high = 0.0, min(self.rates(0.0))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if min(self.rates(middle)) >= middle else (low, middle)
        return low

    def improved(self, tries: int) -> float:
        """Move peers to the weakest stage one by one, as long as that helps."""
        best = self.tokens_s()
        for _ in range(tries):
            rates = self.rates(best)
            weakest = self.seats[min(range(len(rates)), key=rates.__getitem__)]
            strongest = self.seats[max(range(len(rates)), key=rates.__getitem__)]
            moved = next((p for p in _kinds(strongest) if self._helps(p, strongest, weakest, best)), None)
            if moved is None:
                return best
            best = self.tokens_s()
        return best

    def _helps(self, peer: Volunteer, source: Seats, target: Seats, best: float) -> bool:
        """Does the run gain if it moves? Then it has moved."""
        if source is target or target.load.memory_bytes > peer.memory_bytes:
            return False
        source.peers.remove(peer)
        target.peers.append(peer)
        if self.tokens_s() > best * (1 + NEGLIGIBLE):
            return True
        target.peers.remove(peer)
        source.peers.append(peer)
        return False


def _kinds(seats: Seats) -> list[Volunteer]:
    """One peer of every kind, the slowest first."""
    kinds = {(p.operations_s, p.up_bytes_s, p.down_bytes_s, p.availability): p for p in seats.peers}
    return [kinds[kind] for kind in sorted(kinds)][:MOST_KINDS]


def _what_limits(seats: Seats, steps_s: float, vector_bytes: float) -> str:
    if not seats.peers:
        return "nobody serves it"
    reasons = Counter(seats.rate_of(peer, steps_s, vector_bytes)[1] for peer in seats.peers)
    why, count = reasons.most_common(1)[0]
    return f"{why}, for {count} of its {len(seats.peers)} peers"


def _gigabytes(seats: Seats, tokens_s: float, steps_s: float, vector_bytes: float) -> float:
    peers = len(seats.peers)
    if not peers:
        return 0.0
    averaging = steps_s * 2 * vector_bytes * (peers - 1) / peers
    return (tokens_s / peers * seats.load.up_bytes + averaging) * DAY_S / 1e9


def utilisation(
    *, width: int, operations_s: float, bytes_s: float, layers: float, codec: str, feed_forward: float
) -> float:
    """The part of its time that the device of a peer in the middle of a pipeline computes.

    Args:
        layers: of its stage. feed_forward: inner width over width.
        bytes_s: of its uplink, without what averaging takes.
    """
    cost = layers * (4 + 3 * feed_forward) * width**2
    computes_s = cost * OPERATIONS / operations_s
    sends_s = 2 * CODECS[codec].size_bytes(width) / bytes_s
    return min(1.0, computes_s / sends_s)
