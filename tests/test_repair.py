"""Members that die, hang, or lose a link in the rounds of a plan: whole averagers in virtual time."""

import asyncio
import random

import pytest
import torch

from averaging import virtual_time, wire
from averaging.averager import Averager
from averaging.errors import BehindError, ProtocolError
from averaging.memory_network import Link, MemoryHub
from averaging.plan import Pass, Report, StepRules, make_plan
from averaging.repair import Holdings
from averaging.round import Done, first_round
from averaging.shares import Mode

VALUES, STEPS, RATE = 300_000, 4, 2e6  # a round takes about 1.3 s


class Schedule:
    """Some steps of a few averagers, and faults between them by the seed."""

    def __init__(self, seed: int, *, size: int, group_size: int, faults: int, kinds: list[str]) -> None:
        self.rng, self.log = random.Random(seed), []
        self.hub = MemoryHub(
            rng=random.Random(seed), link=lambda a, b: Link(latency_s=0.02, bytes_per_s=RATE)
        )
        self.names = [f"p{i:02d}" for i in range(size)]
        self.faults, self.kinds = faults, kinds
        self.means: dict[int, dict[str, torch.Tensor]] = {}  # step -> what came out of it, and where
        self.weights: dict[int, float] = {}
        self.ended_s: dict[int, float] = {}
        self.lost: set[str] = set()
        self.has_paused = False
        generator = torch.Generator().manual_seed(seed)
        self.vectors = {name: torch.randn(VALUES, generator=generator) for name in self.names}
        self.averagers = {
            name: Averager(
                self.hub.network(name),
                peers=lambda: [p for p in self.names if p not in self.hub.dead],
                target=max(1.0, size - faults),
                group_size=group_size,
                codec="float32",
                rng=random.Random(f"{seed} {name}"),
            )
            for name in self.names
        }

    def note(self, what: str) -> None:
        self.log.append(f"{asyncio.get_running_loop().time():8.3f}  {what}")

    async def run(self) -> None:
        for averager in self.averagers.values():
            await averager.start()
        members = [asyncio.create_task(self.member(name)) for name in self.names]
        breaking = asyncio.create_task(self.break_things())
        await asyncio.wait([breaking])
        breaking.result()
        living = [task for name, task in zip(self.names, members, strict=True) if name not in self.lost]
        done, waiting = await asyncio.wait(living, timeout=120)
        assert not waiting, f"{len(waiting)} wait for ever"
        for task in done:
            task.result()

    async def member(self, name: str) -> None:
        averager = self.averagers[name]
        while averager.step < STEPS:
            step = averager.step
            try:
                mean = await averager.average(self.vectors[name])
            except BehindError:
                self.note(f"{name} is behind at step {step}")
                continue
            self.note(f"{name} has the mean of step {step} with {len(mean.members)}")
            if name not in self.lost:
                self.means.setdefault(step, {})[name] = mean.vector
                self.ended_s[step] = asyncio.get_running_loop().time()

    async def break_things(self) -> None:
        for _ in range(self.faults):
            await asyncio.sleep(self.rng.uniform(0.05, 2.5))
            what = self.rng.choice(self.kinds)
            victim = self.rng.choice([name for name in self.names if name not in self.lost])
            self.note(f"{what} {victim}")
            if what == "kill":
                self.lost.add(victim)
                self.hub.kill(victim)
            elif what == "hang":
                self.lost.add(victim)
                self.hub.hang(victim)
            elif what == "pause":
                self.has_paused = True
                self.hub.hang(victim)
                await asyncio.sleep(self.rng.uniform(1, 6))
                self.hub.resume(victim)
            else:
                other = self.rng.choice([name for name in self.names if name != victim])
                self.hub.sever(victim, other)
                await asyncio.sleep(self.rng.uniform(1, 6))
                self.hub.heal(victim, other)

    def check(self) -> None:
        """All who have the mean of a step have the same bits, near the mean of a large part of them."""
        for step, found in self.means.items():
            kinds = {vector.numpy().tobytes() for vector in found.values()}
            assert len(kinds) == 1, f"step {step}: {len(kinds)} different means"
        last = self.means[STEPS - 1]
        quorum = (len(self.names) - len(self.lost)) // 2 + 1
        assert len(last) >= quorum - self.has_paused  # one of them may sleep until its mean is of no use
        alive = [name for name in self.names if name not in self.lost]
        exact = torch.stack([self.vectors[name] for name in alive]).mean(0)
        error = min((vector - exact).norm() / exact.norm() for vector in last.values())
        assert error < 1e-5 or self.faults, error


def holds(seed: int, **what) -> Schedule:
    schedule = Schedule(seed, **what)
    try:
        virtual_time.run(schedule.run())
        schedule.check()
    except BaseException as error:
        lines = "\n".join(schedule.log[-60:])
        raise AssertionError(f"seed {seed} of {what} failed: {error!r}\n{lines}") from error
    return schedule


@pytest.mark.parametrize("values", [1, 20_000, 600_000, 4_000_000])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_repair_arrives_as_it_was_decided_and_only_with_pieces_of_the_plan(size, values):
    names, rules = [f"p{i}" for i in range(size)], StepRules(target=1, max_weight=10, codec="int8")
    reports = {name: Report(1.0, bytes(8), (Pass(values),)) for name in names}
    plan = make_plan(step=0, coordinator="p0", reports=reports, nonce=b"n", rules=rules)
    holdings, first = Holdings(plan, rules), first_round(plan, "p0", 0, rules=rules)
    lost = next(iter(first.work))
    repairs = holdings.lose(lost)
    for name in names:
        repairs += holdings.take(name, Done(0, 0, missing={lost: 0}))
    (repair,) = repairs
    message = wire.repair_message(repair)
    assert wire.repair_of(message, plan, rules) == repair
    for wrong in ([0, values + 512], [0, 1, 2], list(message.work[0].reduced) * 2):
        changed = type(message).FromString(message.SerializeToString())
        changed.work[0].reduced[:] = wrong
        with pytest.raises(ProtocolError):
            wire.repair_of(changed, plan, rules)


@pytest.mark.parametrize("size,group_size", [(2, 16), (4, 16), (7, 16), (9, 3), (13, 4), (8, 2)])
def test_nothing_breaks_without_faults(size, group_size):
    schedule = holds(0, size=size, group_size=group_size, faults=0, kinds=[])
    assert all(len(found) == size for found in schedule.means.values())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size,group_size", [(4, 16), (7, 16), (9, 3), (13, 4)])
def test_survivors_of_kills_hold_the_same_mean(seed, size, group_size):
    holds(seed, size=size, group_size=group_size, faults=2, kinds=["kill"])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size,group_size", [(4, 16), (7, 16), (9, 3), (13, 4)])
def test_survivors_of_all_kinds_of_faults_hold_the_same_mean(seed, size, group_size):
    holds(seed, size=size, group_size=group_size, faults=2, kinds=["kill", "hang", "cut"])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size,group_size", [(4, 16), (7, 16), (9, 3)])
def test_members_that_only_seemed_lost_hold_the_same_mean_or_none(seed, size, group_size):
    holds(seed, size=size, group_size=group_size, faults=6, kinds=["pause", "cut"])


def test_who_was_lost_before_a_repair_is_outdated_and_nobody_else():
    _, holdings = with_auxiliaries(4, 0)
    for name in ("m0", "m1"):
        holdings.take(name, Done(0, 0, lost=frozenset({"m3"})))
    holdings.take("m2", Done(0, 0, missing={"m3": 2}, lost=frozenset({"m3"})))
    assert not holdings.outdated
    (repair,) = holdings.lose("m3")
    assert holdings.outdated == {"m3"} and "m3" not in repair.members


def test_what_only_its_own_reducer_holds_is_passed_on_by_it_whoever_complains():
    plan, holdings = with_auxiliaries(4, 1)
    pieces = first_round(plan, "m0", 0, rules=StepRules(target=1, max_weight=10)).work["m3"].pieces
    assert len(pieces) == 3
    for name in ("m3", "x0"):
        holdings.take(name, Done(0, 0))
    repairs = [
        round_
        for name, held in (("m0", 1), ("m1", 2), ("m2", 0))
        for round_ in holdings.take(name, Done(0, 0, missing={"m3": held}, lost=frozenset({"m3"})))
    ]
    (repair,) = repairs
    assert not any(work.reduced for work in repair.work.values()), "its values are in use: nobody may differ"
    passed = [piece for work in repair.work.values() for piece in work.passed]
    assert sorted(passed, key=lambda piece: piece.start) == list(pieces)
    assert not holdings.outdated


@pytest.mark.parametrize("helpers", [(), ("x0",)])  # auxiliaries miss nothing, and hold nothing
@pytest.mark.parametrize("held,inside", [(0, False), (1, True), (None, True)])
def test_who_was_lost_is_inside_if_anybody_holds_a_piece_of_which_nobody_living_knows(held, inside, helpers):
    """`held` pieces of what m3 itself had reduced; None: all of them, so that nobody complains."""
    _, holdings = with_auxiliaries(4, len(helpers))
    gone, others = frozenset({"m3"}), ("m0", "m1", "m2")
    missing = {} if held is None else {"m3": held}
    for name in others:
        holdings.take(name, Done(0, 0, missing=missing, unused=gone))
    for name in helpers:
        holdings.take(name, Done(0, 0, unused=gone))
    for repair in holdings.lose("m3"):
        assert "m3" not in repair.members
        for name in (*others, *helpers):
            holdings.take(name, Done(0, repair.attempt))
    assert holdings.complete
    assert holdings.left_out() == (set() if inside else {"m3"})


def with_auxiliaries(members, helpers):
    names = [f"m{i}" for i in range(members)]
    reports = {name: Report(1.0, bytes(8), (Pass(VALUES),)) for name in names}
    reports |= {f"x{i}": Report(0.0, bytes(8), mode=Mode.AUXILIARY) for i in range(helpers)}
    rules = StepRules(target=1, max_weight=10)
    plan = make_plan(step=0, coordinator="x0", reports=reports, nonce=b"n", rules=rules)
    return plan, Holdings(plan, rules)


def test_auxiliaries_alone_do_not_carry_a_plan_to_its_end():
    plan, holdings = with_auxiliaries(2, 3)
    for name in ("x0", "x1", "x2"):
        holdings.take(name, Done(0, 0))
    for name in plan.bringers:
        assert not holdings.complete
        holdings.lose(name)
    assert not holdings.complete and "nobody is left" in holdings.failed


def test_pieces_missing_from_somebody_who_reduces_nothing_hurt_only_who_says_so():
    _, holdings = with_auxiliaries(3, 1)
    for name in ("m0", "m1", "x0"):
        assert not holdings.take(name, Done(0, 0))
    for repair in holdings.take("m2", Done(0, 0, missing={"nobody": 0})):
        assert not any(work.pieces for work in repair.work.values())
