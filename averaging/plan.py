"""Who closes a step, when it closes, and who averages with whom: the decisions, without the network.

`coordinator_order` ranks the live peers of a stage for one step; the first that answers coordinates.
`decide` looks at the reports a coordinator has and says whether to close now, with the reason. A `Plan`
is that decision; who averages with whom in every round follows from it (`averaging.grid`).

Pure. Source: rotation and one decision per step are ours.
"""

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from averaging.bandwidth import are_slow, levelled
from averaging.codecs import CODECS
from averaging.grid import Grid, Group, seat
from averaging.network import BEATS, PeerId
from averaging.shares import Mode

PIECE_BYTES, MAX_PIECE_VALUES = 1 << 20, 5 << 16  # more is faster, but takes memory (log, 2026-11-21)
MAX_MEMBERS, MAX_PASSES, MAX_VALUES = 4096, 2, 1 << 36
SILENCE = 0.6  # of `progress_s`: the rest is for what has to be done again


@dataclass(frozen=True, slots=True)
class StepRules:
    """What all members of a run agree on beforehand."""

    target: float  # weight at which a step closes
    max_weight: float  # nobody's vector weighs more, whatever it claims
    group_size: int = 16
    progress_s: float = 5.0  # a member that falls silent holds the others up for no longer
    round_s: float = 300.0  # most that the averaging of one step may take
    grace_s: float = 1.0  # wait for live peers that have not reported when the target is reached
    expire_s: float = 16.0  # a peer that was found dead is not expected for so long: its record lives on
    strict: bool = False  # a round that loses a member is abandoned, not repaired
    codec: str = "float32"  # of the parts that members send
    mean_codec: str = ""  # of the means that they get; the same if empty

    @property
    def piece_values(self) -> int:
        """Of what travels and is reduced at once: one is under way while the next is encoded."""
        largest = max(CODECS[name].size_bytes(1024) for name in (self.codec, self.mean_codec or self.codec))
        return min(MAX_PIECE_VALUES, PIECE_BYTES // largest * 1024)

    @property
    def silence_s(self) -> float:
        """Of a member that carries out a plan: after that it counts as lost."""
        return SILENCE * self.progress_s

    @property
    def overdue_s(self) -> float:
        """Of a member that reports: no plan begins before it is heard again, or known to be silent."""
        return 1.5 * self.silence_s / BEATS


@dataclass(frozen=True, slots=True)
class Pass:
    """One vector that is averaged over the whole grid; what goes into the next may follow from its mean."""

    values: int
    fine: int = 0  # so many of the last values travel in float16 at least: small tensors, that cost little


@dataclass(frozen=True, slots=True)
class Report:
    """What a member has to average: `weight` (tokens), and the fingerprint of the state it starts from."""

    weight: float
    state_hash: bytes
    passes: tuple[Pass, ...] = ()  # none for an auxiliary
    bandwidth: float = 0.0  # bytes per second; 0 if unknown
    mode: Mode = Mode.MEMBER
    dated: bool = False  # no witness heard it for a while since its last step: others may have gone on


@dataclass(frozen=True, slots=True)
class Member:
    peer: PeerId
    weight: float
    bandwidth: float = 1.0  # only ratios matter
    mode: Mode = Mode.MEMBER


@dataclass(frozen=True)
class Plan:
    """One decision of a coordinator: these members average, in this order."""

    key: bytes  # 16 bytes, names this decision in every message that follows from it
    step: int
    coordinator: PeerId
    members: tuple[Member, ...]
    passes: tuple[Pass, ...]  # what every member that is no auxiliary brings
    group_size: int  # these two are the run's: no coordinator chooses them
    strict: bool = False
    slow_links: bool = False  # pieces are small then

    @cached_property
    def grid(self) -> Grid:
        """Who sits where, and so the groups of every round; the same for everybody who has the plan."""
        helpers = [member.peer for member in self.members if member.mode is Mode.AUXILIARY]
        return seat(self.bringers, group_size=self.group_size, key=self.key, helpers=helpers)

    @property
    def rounds(self) -> int:
        """Every pass goes through every dimension of the grid."""
        return len(self.passes) * self.grid.dimensions

    def line_of(self, number: int, group: Group) -> int:
        """The number of a group's line among those of all rounds."""
        return number // self.grid.dimensions * self.grid.dimensions * len(self.grid.cells) + group.line

    @cached_property
    def bringers(self) -> list[PeerId]:
        """The members that bring a vector and want the mean: all but auxiliaries."""
        return [member.peer for member in self.members if member.mode is not Mode.AUXILIARY]

    @property
    def weight(self) -> float:
        """Of all members, as they reported it."""
        return sum(member.weight for member in self.members)

    @cached_property
    def by_peer(self) -> dict[PeerId, Member]:
        return {member.peer: member for member in self.members}

    def __contains__(self, peer: object) -> bool:
        return peer in self.by_peer


def coordinator_order(peers: Iterable[PeerId], *, name: str, step: int) -> list[PeerId]:
    """The peers in the order in which they are asked to coordinate this step of the run `name`."""

    def rank(peer: PeerId) -> bytes:
        return hashlib.sha256(f"{name}/{step}/{peer}".encode()).digest()

    return sorted(peers, key=rank)


@dataclass(frozen=True, slots=True)
class Decision:
    close: bool
    reason: str


def decide(
    reports: Mapping[PeerId, Report],
    *,
    target: float,
    expected: Collection[PeerId],
    quorum: bool | None = None,
    silent: Collection[PeerId] = (),
    unheard: Collection[PeerId] = (),
    waited_s: float,
    grace_s: float,
) -> Decision:
    """Close the step now?

    Args:
        target: weight at which a step closes.
        expected: live peers that should be in the plan; they are waited for `grace_s`, and longer if they
            might be a majority that cannot be reached from here.
        quorum: may those who report close it without the rest? As `has_quorum` says if None.
        silent: those of them that have just been found not to answer; there is no grace for them.
        unheard: reporters that should have been heard again by now; a plan with one that has stopped holds
            all others up until that is certain, so it is not made before.
        waited_s: seconds since the target was reached (0 if it was not).
    """
    total = sum(report.weight for report in reports.values())
    if total < target:
        return Decision(False, f"{total:g} of {target:g}")
    missing = [peer for peer in expected if peer not in reports]
    if missing and not (has_quorum(reports, expected) if quorum is None else quorum):
        return Decision(False, f"{len(missing)} live peers cannot be reached and might close it, too")
    if unheard:
        return Decision(False, f"{len(unheard)} reporters are overdue, and may have stopped")
    awaited = [peer for peer in missing if peer not in silent]
    if awaited and waited_s < grace_s:
        return Decision(False, f"waiting for {len(awaited)} that have not reported")
    return Decision(True, f"{total:g} of {target:g} reached")


def has_quorum(present: Collection[PeerId], live: Collection[PeerId], *, heard: bool = True) -> bool:
    """Whether these may act without the rest: more than half of the live peers, or the half with the first.

    Of two sides of a broken link at most one has it, so a stage does not split in two. Those of whom it is
    not certain that somebody outside hears them may be called silent by now: they need a majority of several.
    """
    inside = sum(peer in present for peer in live)
    if not heard:
        return 2 * inside > len(live) and inside > 1
    return 2 * inside > len(live) or (2 * inside == len(live) and min(live) in present)


def make_plan(
    *, step: int, coordinator: PeerId, reports: Mapping[PeerId, Report], nonce: bytes, rules: StepRules
) -> Plan:
    """Take in everybody who reported; the nonce decides who sits where."""
    ordered = sorted(reports.items())
    reported = [report.bandwidth for _, report in ordered]
    members = tuple(
        Member(p, r.weight, b, r.mode) for (p, r), b in zip(ordered, levelled(reported), strict=True)
    )
    digest = hashlib.sha256(nonce + struct.pack("<Q", step) + coordinator.encode())
    for member in members:
        digest.update(f"{member.peer}:{member.weight!r};".encode())
    passes = max((report.passes for report in reports.values()), key=len)  # the same of all but auxiliaries
    return Plan(
        digest.digest()[:16],
        step,
        coordinator,
        members,
        passes,
        rules.group_size,
        rules.strict,
        slow_links=are_slow(reported),
    )


def check_plan(plan: Plan, *, me: PeerId, step: int, mine: Report, roster: Collection[PeerId]) -> str | None:
    """Why a member that has reported `mine` should refuse `plan`, or None if it is fine."""
    if plan.step != step:
        return f"the plan closes step {plan.step}, this is step {step}"
    if not plan.bringers:
        return "nobody in it brings anything"
    if not plan.passes or mine.passes not in ((), plan.passes):
        return f"it averages {plan.passes}, this peer has {mine.passes}"
    if len(plan.by_peer) < len(plan.members):
        return "it is malformed"
    if any(not 0 < member.bandwidth < math.inf for member in plan.members):
        return "it names a bandwidth that is not positive"
    claimed = next((member for member in plan.members if member.peer == me), None)
    if claimed is None or claimed.mode is not mine.mode:
        return "this peer does not stand in it as what it is"
    if claimed.weight > mine.weight:
        return f"it claims a weight of {claimed.weight:g} for this peer, which has {mine.weight:g}"
    if all(member.mode is Mode.CLIENT for member in plan.members):
        return "nobody in it can reduce"
    strangers = [member.peer for member in plan.members if member.peer not in roster]
    if strangers:
        return f"{len(strangers)} of its members are not on the roster"
    return None


def majority_hash(hashes: Mapping[PeerId, bytes], dated: Collection[PeerId] = ()) -> bytes | None:
    """The state that most peers hold. None if there are no hashes.

    Ties go to the one that fewer `dated` peers hold, then to the smallest peer id's: one of a pair that stops
    when it has closed a step, before the other hears of that, wakes up beside one that had to close it alone.
    A claim not to be dated decides nothing else: strangers make it.
    """
    votes, dated_votes = Counter(hashes.values()), Counter(hashes[peer] for peer in dated)
    ranked = sorted(hashes, key=lambda peer: (-votes[hashes[peer]], dated_votes[hashes[peer]], peer))
    return hashes[ranked[0]] if ranked else None
