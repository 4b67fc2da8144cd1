"""Messages of a step <-> what they mean. What comes from others is validated here, once.

Pure.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from averaging import averaging_pb2 as pb
from averaging.errors import ProtocolError
from averaging.network import PeerId
from averaging.plan import MAX_MEMBERS, MAX_PASSES, MAX_VALUES, Member, Pass, Plan, Report, StepRules
from averaging.round import Done, Round, Work, first_round
from averaging.shares import Mode, Slice

MODES = (Mode.MEMBER, Mode.CLIENT, Mode.AUXILIARY)  # by their number on the wire
HASH_BYTES, KEY_BYTES = 8, 16


def report_message(step: int, report: Report) -> pb.StepReport:
    return pb.StepReport(
        step=step,
        weight=report.weight,
        state_hash=report.state_hash,
        passes=_pass_messages(report.passes),
        bandwidth=report.bandwidth,
        mode=MODES.index(report.mode),
        dated=report.dated,
    )


def report_of(message: pb.StepReport, sender: PeerId) -> Report:
    """Raises ProtocolError."""
    fine = (
        0 <= message.weight < math.inf
        and len(message.state_hash) == HASH_BYTES
        and 0 <= message.bandwidth < math.inf
        and message.mode < len(MODES)
        and bool(message.passes) != (MODES[message.mode] is Mode.AUXILIARY)
        and (message.weight == 0 or MODES[message.mode] is not Mode.AUXILIARY)
    )
    if not fine:
        raise ProtocolError(sender, f"report of weight {message.weight:g} for step {message.step}")
    passes, mode = _passes(message.passes, sender), MODES[message.mode]
    return Report(message.weight, message.state_hash, passes, message.bandwidth, mode, message.dated)


def _pass_messages(passes: Iterable[Pass]) -> list[pb.Pass]:
    return [pb.Pass(values=each.values, fine=each.fine) for each in passes]


def _passes(messages: Sequence[pb.Pass], sender: PeerId) -> tuple[Pass, ...]:
    fine = all(each.fine <= each.values and 0 < each.values <= MAX_VALUES for each in messages)
    if not fine or len(messages) > MAX_PASSES:
        raise ProtocolError(sender, "malformed sizes of what is averaged")
    return tuple(Pass(each.values, each.fine) for each in messages)


def plan_message(plan: Plan) -> pb.StepPlan:
    members = [
        pb.PlanMember(peer=m.peer, weight=m.weight, bandwidth=m.bandwidth, mode=MODES.index(m.mode))
        for m in plan.members
    ]
    return pb.StepPlan(
        key=plan.key,
        step=plan.step,
        members=members,
        passes=_pass_messages(plan.passes),
        slow_links=plan.slow_links,
    )


def plan_of(message: pb.StepPlan, coordinator: PeerId, rules: StepRules) -> Plan:
    """Raises ProtocolError; whether a member should accept it is for `averaging.plan.check_plan`."""
    members = message.members
    bad_mode = any(member.mode >= len(MODES) for member in members)
    if len(message.key) != KEY_BYTES or len(members) > MAX_MEMBERS or bad_mode:
        raise ProtocolError(coordinator, "malformed plan")
    return Plan(
        key=message.key,
        step=message.step,
        coordinator=coordinator,
        members=tuple(Member(m.peer, m.weight, m.bandwidth, MODES[m.mode]) for m in members),
        passes=_passes(message.passes, coordinator),
        group_size=rules.group_size,
        strict=rules.strict,
        slow_links=message.slow_links,
    )


def done_message(done: Done) -> pb.RoundDone:
    missing = [pb.Missing(reducer=peer, held=held) for peer, held in sorted(done.missing.items())]
    return pb.RoundDone(
        line=done.line,
        attempt=done.attempt,
        missing=missing,
        lost=sorted(done.lost),
        unused=sorted(done.unused),
    )


def done_of(message: pb.RoundDone, members: Collection[PeerId]) -> Done:
    """What a member of the plan says; strangers in it are passed over."""
    return Done(
        message.line,
        message.attempt,
        {each.reducer: each.held for each in message.missing if each.reducer in members},
        frozenset(peer for peer in message.lost if peer in members),
        frozenset(peer for peer in message.unused if peer in members),
    )


def repair_message(round_: Round) -> pb.Repair:
    work = [
        pb.RoundWork(peer=peer, reduced=_ends(each.reduced), passed=_ends(each.passed))
        for peer, each in round_.work.items()
    ]
    return pb.Repair(
        line=round_.line,
        attempt=round_.attempt,
        members=round_.members,
        speakers=sorted(round_.speakers),
        work=work,
    )


def repair_of(message: pb.Repair, plan: Plan, rules: StepRules) -> Round:
    """Raises ProtocolError."""
    members, sender = tuple(message.members), plan.coordinator
    sound = (
        message.attempt > 0
        and message.line < plan.rounds * len(plan.grid.cells)
        and len(set(members)) == len(members)
        and all(peer in plan for peer in members)
        and set(message.speakers) | {each.peer for each in message.work} <= set(members)
    )
    if not sound:
        raise ProtocolError(sender, "malformed repair of a round")
    number, cell = divmod(message.line, len(plan.grid.cells))
    before = first_round(plan, plan.grid.cells[cell][0], number, rules=rules)
    if before.line != message.line:
        raise ProtocolError(sender, "malformed repair of a round")
    dealt = [piece for each in message.work for piece in (*_slices(each.reduced), *_slices(each.passed))]
    known = {piece for work in before.work.values() for piece in work.pieces}  # they are never cut anew
    odd = any(len(ends) % 2 for each in message.work for ends in (each.reduced, each.passed))
    if odd or not known.issuperset(dealt) or len(set(dealt)) < len(dealt):
        raise ProtocolError(sender, "malformed pieces in the repair of a round")
    return replace(
        before,
        name=(plan.key, message.line, message.attempt),
        members=members,
        speakers=frozenset(message.speakers),
        work={each.peer: Work(_slices(each.reduced), _slices(each.passed)) for each in message.work},
        feed_back=False,
    )


def _ends(pieces: Iterable[Slice]) -> list[int]:
    return [end for piece in pieces for end in (piece.start, piece.stop)]


def _slices(ends: Sequence[int]) -> tuple[Slice, ...]:
    return tuple(Slice(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=False))
