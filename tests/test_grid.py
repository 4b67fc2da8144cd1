"""The grid: exact after as many rounds as it has dimensions, whoever sits where."""

import math
import random

import pytest

from averaging.grid import grid_sides, seat


def names(count):
    return [f"peer{i:04d}" for i in range(count)]


def average_on(grid, values, weights):
    """Run all rounds on scalars: (value, weight) of every member afterwards."""
    held = {peer: (values[peer], weights[peer]) for peer in grid.seats}
    for dimension in range(grid.dimensions):
        after = {}
        for group in grid.groups(dimension):
            total = sum(held[p][1] for p in group.speakers)
            mean = sum(held[p][0] * held[p][1] for p in group.speakers) / total
            after |= dict.fromkeys(group.members, (mean, total))
        held = after
    return held


@pytest.mark.parametrize(
    ("count", "group_size", "sides"),
    [
        (4, 4, (4,)),
        (16, 16, (16,)),
        (64, 8, (8, 8)),
        (512, 8, (8, 8, 8)),
        (256, 16, (16, 16)),
        (1024, 32, (32, 32)),
        (64, 4, (4, 4, 4)),
        (1024, 2, (2,) * 10),
        (2, 2, (2,)),
        (17, 16, (17,)),
        (10, 4, (3, 3)),
        (24, 4, (3, 3, 2)),
    ],
)
def test_sides_are_equal_and_as_few_as_the_group_size_allows(count, group_size, sides):
    assert grid_sides(count, group_size) == sides


@pytest.mark.parametrize("group_size", [2, 3, 4, 8, 16, 64])
def test_the_weighted_mean_is_exact_for_any_number_of_members(group_size):
    rng = random.Random(group_size)
    for count in [*range(2, 150), *(rng.randint(150, 4096) for _ in range(3))]:
        peers = names(count)
        values = {peer: rng.gauss(0, 1) for peer in peers}
        weights = {peer: rng.choice([0.5, 1.0, 7.0]) for peer in peers}
        grid = seat(peers, group_size=group_size, key=b"key%d" % count)
        total = sum(weights.values())
        mean = sum(values[p] * weights[p] for p in peers) / total
        for value, weight in average_on(grid, values, weights).values():
            assert math.isclose(value, mean, abs_tol=1e-9), (count, grid.sides)
            assert math.isclose(weight, total, rel_tol=1e-9), (count, grid.sides)


@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 32])
def test_groups_stay_near_the_size_asked_for(group_size):
    for count in range(2, 1200, 7):
        grid = seat(names(count), group_size=group_size, key=b"k")
        for dimension in range(grid.dimensions):
            sizes = [len(group.members) for group in grid.groups(dimension)]
            assert sum(sizes) == count
            assert max(sizes) <= max(grid.sides[dimension] + 2, 3), (count, grid.sides, max(sizes))
            assert max(sizes) <= group_size + 2, (count, grid.sides, max(sizes))


def test_seats_depend_on_the_key_and_not_on_the_order_of_the_peers():
    peers = names(100)
    one = seat(peers, group_size=10, key=b"one")
    assert one == seat(peers[::-1], group_size=10, key=b"one")
    assert one.groups(0) != seat(peers, group_size=10, key=b"two").groups(0)
