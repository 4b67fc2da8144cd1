"""Who may act without the rest of a stage, as one peer sees it."""

import asyncio
from dataclasses import dataclass, field

import pytest

from averaging import virtual_time
from averaging.errors import LinkError
from averaging.mates import Mates
from averaging.plan import StepRules

RULES = StepRules(target=1.0, max_weight=4.0, expire_s=10.0)


@dataclass
class Trainers:
    """What all trainers say; satisfies `averaging.witnesses.Witnesses`."""

    unheard: set[str] = field(default_factory=set)
    hear_me: bool = True

    def silent(self) -> frozenset[str]:
        return frozenset(self.unheard)

    def hear_this(self, for_s: float = 0.0) -> bool:
        return self.hear_me

    def heard_for_s(self) -> float:
        return float("inf")

    def version(self) -> int:
        return 0


def make_mates(me: str, others: list[str], trainers: Trainers, newcomers: list[str]) -> Mates:
    async def refresh() -> None:
        pass

    return Mates(
        me=me,
        rules=RULES,
        roster=lambda: others,
        refresh=refresh,
        newcomers=lambda: newcomers,
        witnesses=trainers,
    )


@pytest.mark.parametrize("is_newcomer", [False, True])
@pytest.mark.parametrize(
    ("how", "unheard", "hear_me", "may_act"),
    [
        ("cannot connect", True, True, True),  # killed, and never dialled from here: no proof that it is dead
        ("no answer", True, True, True),  # stopped
        (None, True, True, False),  # it answers here: trainers that restart hear nobody for a while
        ("cannot connect", False, True, False),  # only the link between the two is cut
        ("cannot connect", True, False, False),  # who is cut off from all sees just the same
    ],
)
def test_the_last_who_goes_on_needs_no_proof_but_that_nobody_hears_the_others(
    how, unheard, hear_me, may_act, is_newcomer
):
    async def test():
        trainers = Trainers({"a"} if unheard else set(), hear_me)
        mates = make_mates("b", ["a"], trainers, ["b"] if is_newcomer else [])
        if how is not None:
            mates.suspect(LinkError("a", how, silent=how == "no answer"))
        await asyncio.sleep(0)
        assert mates.has_quorum(["b"], mates.voters()) is may_act

    virtual_time.run(test())


def test_with_one_of_two_newcomers_alone_nobody_goes_on():
    async def test():
        mates = make_mates("c", ["a", "b"], Trainers({"a"}), ["b", "c"])
        mates.suspect(LinkError("a", "cannot connect"))
        assert not mates.has_quorum(["c"], mates.voters()), "b may be about to close the step, too"
        assert mates.has_quorum(["b", "c"], mates.voters())

    virtual_time.run(test())


def test_it_is_enough_that_one_who_acts_is_heard_unless_the_others_may_not_know_it():
    async def test():
        unheard = Trainers(hear_me=False)
        back = make_mates("b", ["a"], unheard, ["b"])  # it was away, and no trainer has found it again
        assert not back.has_quorum(["a", "b"], back.voters()), "another one may take a for silent, too"
        assert back.has_quorum(["a", "b"], back.voters(), heard=["a"])
        assert not back.has_quorum(["b"], back.voters(), heard=["a"]), "a does not act with it"
        newcomer = make_mates("c", ["a", "b"], Trainers(), ["c"])
        assert not newcomer.has_quorum(["a", "c"], newcomer.voters()), "b may take a for silent"
        assert newcomer.has_quorum(["a", "c"], newcomer.voters(), heard=["a"])

    virtual_time.run(test())


def test_the_dead_stay_dead_for_as_long_as_they_may_be_read_of_or_until_they_answer():
    async def test():
        mates = make_mates("b", ["a", "c"], Trainers(), [])
        refused = LinkError("a", "nobody is there", refused=True)
        mates.suspect(refused)
        await asyncio.sleep(1.9 * RULES.expire_s)
        assert mates.live() == ["c", "b"]
        mates.answers("a")
        assert mates.live() == ["a", "c", "b"]
        mates.suspect(refused)
        await asyncio.sleep(2.1 * RULES.expire_s)
        assert mates.live() == ["a", "c", "b"], "two that took each other for dead must not do so for ever"

    virtual_time.run(test())
