import random
from dataclasses import replace
from itertools import pairwise

import pytest

from averaging.plan import (
    Pass,
    Report,
    StepRules,
    check_plan,
    coordinator_order,
    decide,
    has_quorum,
    majority_hash,
    make_plan,
)
from averaging.shares import Mode, Slice, cut, pieces

RULES = StepRules(target=1, max_weight=100, group_size=2)
PEERS = ["a", "b", "c", "d"]


def reports(**weights: float) -> dict[str, Report]:
    return {peer: Report(weight, b"12345678", (Pass(10),)) for peer, weight in weights.items()}


def close(heard: dict[str, Report], **more):
    arguments = {"target": 100, "expected": PEERS[:2], "waited_s": 0.0, "grace_s": 1.0} | more
    return decide(heard, **arguments)


def test_every_peer_computes_the_same_order_of_coordinators():
    shuffled = random.Random(0).sample(PEERS, 4)
    assert coordinator_order(PEERS, name="r/1", step=7) == coordinator_order(shuffled, name="r/1", step=7)


def test_coordination_rotates():
    first = [coordinator_order(PEERS, name="r/0", step=step)[0] for step in range(400)]
    assert all(60 <= first.count(peer) <= 140 for peer in PEERS)


def test_a_step_closes_when_the_target_is_reached():
    assert not close(reports(a=50, b=49)).close
    decision = close(reports(a=50, b=50))
    assert decision.close and "reached" in decision.reason


def test_live_peers_that_have_not_reported_are_waited_for_but_not_longer_than_the_grace():
    heard = reports(a=60, b=60)
    assert not close(heard, expected=["a", "b", "c"]).close
    assert close(heard, expected=["a", "b", "c"], waited_s=1.0).close


def test_a_live_peer_that_does_not_answer_has_no_grace_but_counts_for_the_quorum():
    heard = reports(a=60, b=60)
    assert close(heard, expected=["a", "b", "c"], silent=["c"]).close
    assert not close(heard, expected=["a", "b", "c", "d", "e"], silent=["c", "d", "e"]).close


def test_a_minority_does_not_close_a_step_however_long_it_waits():
    decision = close(reports(b=200), expected=["a", "b"], waited_s=1e6)
    assert not decision.close and "cannot be reached" in decision.reason


def test_a_newcomer_makes_no_second_majority_beside_those_who_do_not_know_it():
    known, all_three = ["a", "b"], ["a", "b", "new"]
    alone = close(reports(a=200), expected=known, waited_s=1.0)
    with_newcomer = reports(b=60, new=60)
    assert alone.close
    two_of_three = has_quorum(with_newcomer, known)
    assert not close(with_newcomer, expected=all_three, quorum=two_of_three, waited_s=1e6).close
    assert close(with_newcomer, expected=all_three, waited_s=1.0).close, "it would, if all three decided"


@pytest.mark.parametrize("live", [1, 2, 3, 4, 5])
def test_of_two_sides_of_a_broken_link_exactly_one_has_the_quorum(live):
    peers = [f"p{i}" for i in range(live)]
    for mask in range(1 << live):
        side = {p for i, p in enumerate(peers) if mask >> i & 1}
        assert has_quorum(side, peers) != has_quorum(set(peers) - side, peers)


def test_a_plan_seats_all_reporters_and_names_itself_uniquely():
    heard = reports(b=1, a=2)
    plan = make_plan(step=3, coordinator="a", reports=heard, nonce=b"n", rules=RULES)
    assert [m.peer for m in plan.members] == ["a", "b"]
    assert [sorted(group.members) for group in plan.grid.groups(0)] == [["a", "b"]]
    assert len(plan.key) == 16
    assert plan.key != make_plan(step=3, coordinator="a", reports=heard, nonce=b"m", rules=RULES).key


def test_members_refuse_a_plan_that_is_not_what_they_reported():
    plan = make_plan(step=3, coordinator="a", reports=reports(a=5, b=7), nonce=b"n", rules=RULES)
    mine = Report(7.0, b"12345678", (Pass(10),))
    good = {"me": "b", "step": 3, "mine": mine, "roster": {"a", "b"}}
    assert check_plan(plan, **good) is None
    assert "closes step" in check_plan(plan, **good | {"step": 4})
    assert "weight" in check_plan(plan, **good | {"mine": replace(mine, weight=6.0)})
    assert "does not stand in it" in check_plan(plan, **good | {"me": "c"})
    assert "as what it is" in check_plan(plan, **good | {"mine": replace(mine, mode=Mode.CLIENT)})
    assert "11" in check_plan(plan, **good | {"mine": replace(mine, passes=(Pass(11),))})
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        changed = replace(plan, members=(plan.members[0], replace(plan.members[1], bandwidth=wrong)))
        assert "bandwidth" in check_plan(changed, **good)
    clients = replace(plan, members=tuple(replace(m, mode=Mode.CLIENT) for m in plan.members))
    assert "can reduce" in check_plan(clients, **good | {"mine": replace(mine, mode=Mode.CLIENT)})
    assert "not on the roster" in check_plan(plan, **good | {"roster": {"b"}})


def test_majority_state_wins_and_ties_go_to_the_smallest_peer():
    assert majority_hash({"a": b"x", "b": b"y", "c": b"y"}) == b"y"
    assert majority_hash({"b": b"y", "a": b"x"}) == b"x"
    assert majority_hash({}) is None


def test_of_states_that_as_many_hold_the_less_dated_one_wins_but_not_over_a_majority():
    assert majority_hash({"a": b"x", "b": b"y"}, dated=["a"]) == b"y"
    assert majority_hash({"a": b"x", "b": b"y"}, dated=["a", "b"]) == b"x"
    pairs = {"a": b"x", "b": b"x", "c": b"y", "d": b"y"}
    assert majority_hash(pairs, dated=["b"]) == b"y"
    assert majority_hash({"a": b"x", "b": b"x", "c": b"y"}, dated=["a", "b"]) == b"x"


@pytest.mark.parametrize(
    "values,members,align", [(1, 2, 512), (512, 3, 512), (100_000, 7, 512), (5000, 2, 1)]
)
def test_slices_cover_the_vector_once_at_aligned_cuts(values, members, align):
    slices = cut(values, [1.0] * members, align)
    assert len(slices) == members
    assert slices[0].start == 0 and slices[-1].stop == values
    assert all(a.stop == b.start for a, b in pairwise(slices))
    assert all(s.stop % align == 0 or s.stop == values for s in slices)
    assert max(map(len, slices)) - min(map(len, slices)) <= 2 * align


def test_pieces_cover_a_slice_once():
    found = pieces(Slice(512, 512 * 1001 + 77), 512 * 300, 512)
    assert found[0].start == 512 and found[-1].stop == 512 * 1001 + 77
    assert all(a.stop == b.start for a, b in pairwise(found))
    assert all(p.start % 512 == 0 for p in found)


def test_the_last_pieces_of_a_slice_are_small_and_none_is_above_the_bound():
    for blocks in (1, 31, 32, 33, 100, 640, 1001, 5000):
        sizes = [len(p) for p in pieces(Slice(0, 512 * blocks), 512 * 300, 512)]
        assert sum(sizes) == 512 * blocks and max(sizes) <= 512 * 300
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 512 * 32


def test_a_plan_of_auxiliaries_alone_is_refused():
    reports = {"a": Report(0.0, b"12345678", mode=Mode.AUXILIARY)}
    plan = make_plan(step=3, coordinator="a", reports=reports, nonce=b"n", rules=RULES)
    assert "nobody" in check_plan(plan, me="a", step=3, mine=reports["a"], roster=["a"])


def test_who_may_be_called_silent_needs_a_majority_of_several():
    assert has_quorum(["a"], ["a", "b"]) and not has_quorum(["a"], ["a", "b"], heard=False)
    assert has_quorum(["a"], ["a"]) and not has_quorum(["a"], ["a"], heard=False)
    assert has_quorum(["a", "b"], ["a", "b", "c"], heard=False)
