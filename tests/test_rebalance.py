"""Rebalancing: who moves, and that nobody else needs to."""

import random
from dataclasses import replace
from itertools import product

import pytest

from swarm.rebalance import Doing, Move, Seat, best_moves, capacities, papers_moves, weakest_stage


def pools(*counts: int, speed: float = 1.0) -> list[Seat]:
    return [
        Seat(f"s{stage}p{number:03d}", stage, speed)
        for stage, count in enumerate(counts)
        for number in range(count)
    ]


def after(seats, moves) -> list[Seat]:
    target = {move.peer: move.target for move in moves}
    return [replace(seat, stage=target.get(seat.peer, seat.stage)) for seat in seats]


def strength(seats, costs) -> float:
    return min(capacities(seats, costs))


@pytest.mark.parametrize(
    ("counts", "moves"),
    [((4, 4), 0), ((5, 4), 0), ((5, 3), 1), ((6, 3, 3), 2), ((9, 1, 2), 5), ((4, 3, 3, 3), 0), ((8, 0), 4)],
)
def test_equal_peers_end_spread_evenly_with_the_fewest_moves(counts, moves):
    seats, costs = pools(*counts), [1.0] * len(counts)
    found = best_moves(seats, costs)
    assert len(found.moves) == moves, found.reason
    assert strength(after(seats, found.moves), costs) == sum(counts) // len(counts)


def test_several_movers_go_at_once_when_one_alone_would_gain_nothing():
    found = best_moves(pools(6, 3, 3), [1.0] * 3)
    assert {(move.source, move.target) for move in found.moves} == {(0, 1), (0, 2)}
    assert "33.3%" in found.reason


def test_stages_attract_peers_in_proportion_to_their_cost():
    costs = [1.0, 3.0, 2.0]
    seats = pools(20, 20, 20)
    found = best_moves(seats, costs)
    ended = after(seats, found.moves)
    counts = [sum(seat.stage == stage for seat in ended) for stage in range(3)]
    assert counts == [10, 30, 20]


@pytest.mark.parametrize("seed", range(60))
def test_the_weakest_stage_ends_near_the_best_of_all_assignments(seed):
    rng = random.Random(seed)
    stages, speeds = rng.choice([2, 3]), [rng.choice([1.0, 2.0, 4.0]) for _ in range(rng.randint(6, 8))]
    costs = [rng.choice([1.0, 1.5, 2.0]) for _ in range(stages)]
    seats = [Seat(f"p{i}", rng.randrange(stages), speed) for i, speed in enumerate(speeds)]
    found = best_moves(seats, costs, worth=0.0)
    ended = strength(after(seats, found.moves), costs)
    best = max(
        strength([replace(s, stage=at) for s, at in zip(seats, where, strict=True)], costs)
        for where in product(range(stages), repeat=len(seats))
    )
    assert ended >= strength(seats, costs)
    assert ended >= best - max(speeds) / min(costs), (ended, best)


@pytest.mark.parametrize("seed", range(30))
def test_after_the_moves_there_are_none_left_and_everybody_finds_the_same(seed):
    rng = random.Random(seed)
    stages = rng.randint(2, 8)
    costs = [rng.uniform(1, 3) for _ in range(stages)]
    seats = [
        Seat(f"p{i}", rng.randrange(stages), rng.choice([1.0, 2.0, 4.0]), rng.choice(list(Doing)))
        for i in range(rng.randint(stages, 60))
    ]
    found = best_moves(seats, costs)
    shuffled = seats[:]
    rng.shuffle(shuffled)
    assert best_moves(shuffled, costs).moves == found.moves
    moving = {move.peer for move in found.moves}
    assert len(moving) == len(found.moves), "nobody moves twice"
    ended = [
        replace(seat, doing=Doing.MOVES) if seat.peer in moving else seat
        for seat in after(seats, found.moves)
    ]
    assert not best_moves(ended, costs).moves, "moves under way count where they go"
    assert strength(ended, costs) >= strength(seats, costs)


@pytest.mark.parametrize("seed", range(30))
def test_no_stage_loses_the_last_peer_that_serves_it_and_movers_go_on(seed):
    rng = random.Random(seed)
    seats = [
        Seat(f"p{i}", rng.randrange(4), rng.choice([1.0, 8.0]), rng.choice(list(Doing))) for i in range(12)
    ]
    before = {seat.peer: seat for seat in seats}
    found = best_moves(seats, [1.0, 1.0, 1.0, 5.0], worth=0.0)
    assert all(before[move.peer].doing in (Doing.SERVES, Doing.LOADS) for move in found.moves)
    for stage in range(4):
        serving = {s.peer for s in seats if s.stage == stage and s.doing in (Doing.SERVES, Doing.STAYS)}
        assert not serving or serving - {move.peer for move in found.moves}


def test_who_may_not_move_counts_but_does_not_move():
    stays = [Seat(f"x{number}", 0, doing=Doing.STAYS) for number in range(4)]
    assert not best_moves([*stays, *pools(0, 1)], [1.0, 1.0]).moves
    assert not papers_moves([*stays, *pools(0, 1)], [1.0, 1.0]).moves
    found = best_moves([*stays, *pools(1, 1)], [1.0, 1.0])
    assert found.moves == (Move("s0p000", 0, 1),), "also the only one that moves, as others stay"


def test_newcomers_that_still_load_go_first():
    seats = [*pools(5, 3), Seat("new", 0, doing=Doing.LOADS)]
    assert best_moves(seats, [1.0, 1.0]).moves == (Move("new", 0, 1),)


def test_a_small_gain_is_not_worth_a_move_and_an_empty_stage_always_is():
    unequal = [Seat(f"p{number}", number % 3, speed) for number, speed in enumerate((1.04, 1.0, 1.02) * 3)]
    unequal.append(Seat("one more", 0))
    assert "only" in best_moves(unequal, [1.0] * 3).reason, "noise of what is measured"
    assert best_moves(unequal, [1.0] * 3, worth=0.0).moves
    assert len(best_moves(pools(102, 100, 101), [1.0] * 3).moves) == 1
    assert len(best_moves(pools(2, 0), [1.0, 1.0], worth=5.0).moves) == 1
    assert not best_moves(pools(1, 0), [1.0, 1.0]).moves


def test_newcomers_go_where_least_is_for_what_it_costs():
    assert weakest_stage(pools(3, 2, 2), [1.0, 1.0, 1.0]) == 1
    assert weakest_stage(pools(3, 4, 4), [1.0, 1.0, 3.0]) == 2
    assert weakest_stage([], [1.0, 1.0]) == 0


def test_the_papers_rule_moves_the_least_loaded_peer_of_the_strongest_stage():
    seats = [Seat("a", 0, load=2.0), Seat("b", 0, load=1.0), Seat("c", 0, load=3.0), Seat("d", 1)]
    assert papers_moves(seats, [1.0, 1.0]).moves == (Move("b", 0, 1),)
    assert not papers_moves(seats[1:], [1.0, 1.0]).moves
    assert not papers_moves(seats[2:], [1.0, 1.0]).moves


def test_thousands_of_peers_are_decided_on_in_one_pass():
    rng = random.Random(0)
    seats = [Seat(f"p{i:04d}", rng.randrange(16), rng.choice([1.0, 2.0, 4.0])) for i in range(4000)]
    found = best_moves(seats, [1.0] * 16)
    ended = after(seats, found.moves)
    ideal = sum(seat.speed for seat in seats) / 16
    assert strength(ended, [1.0] * 16) > 0.995 * ideal
