"""One round in one group, described: who takes part, who reduces which pieces, how they travel, and what came
of it.

A reducer's pieces travel in order, so what a member holds of them is a prefix: one number per reducer.

Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from averaging.codecs import CODECS, FLOAT16, INT8, INT8_BLOCK, Codec
from averaging.network import PeerId
from averaging.plan import Plan, StepRules
from averaging.shares import Mode, Slice, cut, pieces, shares

SMALL_PIECE_VALUES = 1 << 16  # over slow links: groupmates keep pace with each other by the piece
RoundName = tuple[bytes, int, int]  # the plan's key, the line of the grid, the attempt


@dataclass(frozen=True, slots=True)
class Work:
    """What one member does for the others in a round."""

    reduced: tuple[Slice, ...] = ()
    passed: tuple[Slice, ...] = ()  # it holds their means already, and passes them on before the others

    @property
    def pieces(self) -> tuple[Slice, ...]:
        return self.passed + self.reduced


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt at one round in one group."""

    name: RoundName
    members: tuple[PeerId, ...]  # summed in this order
    speakers: frozenset[PeerId]  # whose values go into the mean
    work: Mapping[PeerId, Work]  # of those who reduce or pass on anything
    most_weight: float  # of one member
    receivers: frozenset[PeerId]  # who wants the mean
    values: int  # of every vector
    codec: Codec  # of parts
    mean_codec: Codec
    fine_from: int  # values from here on travel in float16 at least
    all_needed: bool = False  # no mean without a part of every speaker
    feed_back: bool = False  # add what a lossy codec left out of the last messages

    @property
    def line(self) -> int:
        return self.name[1]

    @property
    def attempt(self) -> int:
        return self.name[2]

    def codec_of(self, part: Slice) -> Codec:
        """How members send a part."""
        return self._fine_enough(self.codec, part)

    def mean_codec_of(self, part: Slice) -> Codec:
        """How reducers send a mean."""
        return self._fine_enough(self.mean_codec, part)

    def _fine_enough(self, codec: Codec, part: Slice) -> Codec:
        return FLOAT16 if codec.lossy and part.start >= self.fine_from else codec


@dataclass(frozen=True, slots=True)
class Done:
    """What one member has to say after one attempt at one round."""

    line: int
    attempt: int
    missing: Mapping[PeerId, int] = field(default_factory=dict)  # reducer -> how many of its pieces are here
    lost: frozenset[PeerId] = frozenset()  # groupmates from whom not everything came
    unused: frozenset[PeerId] = frozenset()  # groupmates of whom nothing is in what it reduced


def first_round(plan: Plan, peer: PeerId, number: int, *, rules: StepRules) -> Round:
    """One of the rounds of `peer`: in every pass one along every dimension of the plan's grid."""
    at, dimension = divmod(number, plan.grid.dimensions)
    group, values = plan.grid.group_of(peer, dimension), plan.passes[at].values
    fine_from = values - plan.passes[at].fine
    given = plan.by_peer
    bringers = frozenset(p for p in group.members if given[p].mode is not Mode.AUXILIARY)
    # By name: the same peers reduce the same slices from step to step, whatever their seats.
    ordered = sorted(group.members)
    modes = [given[peer].mode for peer in ordered]
    slices = cut(values, shares([given[peer].bandwidth for peer in ordered], modes), INT8_BLOCK)
    piece_values = min(rules.piece_values, SMALL_PIECE_VALUES) if plan.slow_links else rules.piece_values
    work = {
        reducer: Work(tuple(_pieces(part, fine_from, piece_values)))
        for reducer, part in zip(ordered, slices, strict=True)
        if len(part)
    }
    codecs = [CODECS[name] for name in (rules.codec, rules.mean_codec or rules.codec)]
    if dimension:  # all lines must come to the same mean, so none has a memory: nothing coarser will do
        codecs = [INT8 if codec.lossy else codec for codec in codecs]
    return Round(
        name=(plan.key, plan.line_of(number, group), 0),
        members=group.members,
        speakers=bringers & frozenset(group.speakers),
        work=work,
        # Beyond the first dimension members stand for whole groups.
        most_weight=rules.max_weight * (len(plan.members) if dimension else 1),
        all_needed=plan.strict or dimension > 0,
        receivers=bringers,
        values=values,
        codec=codecs[0],
        mean_codec=codecs[1],
        fine_from=fine_from,
        feed_back=dimension == 0,
    )


def _pieces(part: Slice, fine_from: int, piece_values: int) -> list[Slice]:
    edge = min(max(part.start, fine_from), part.stop)
    parts = (Slice(part.start, edge), Slice(edge, part.stop))
    return [piece for each in parts for piece in pieces(each, piece_values, INT8_BLOCK)]
