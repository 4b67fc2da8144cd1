"""Moshpit all-reduce on the in-memory network: what the paper promises, and what the grid adds."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from averaging import virtual_time
from averaging.allreduce import ButterflyAllReduce
from averaging.codecs import CODECS, INT8_BLOCK
from averaging.grid import grid_sides, seat
from averaging.memory_network import MemoryHub
from averaging.moshpit import Contribution, Rounds
from averaging.plan import Pass, Report, StepRules, make_plan
from averaging.round import Done

RULES = StepRules(target=1, max_weight=100, progress_s=3)


async def average_all(vectors, weights, group_size, codec="float32", mean_codec=""):
    """Every peer's result of one plan over all of them."""
    names = [f"peer{i:04d}" for i in range(len(vectors))]
    hub, rules = MemoryHub(), replace(RULES, group_size=group_size, codec=codec, mean_codec=mean_codec)
    reducers = [ButterflyAllReduce(hub.network(name), rules=rules) for name in names]
    size = len(vectors[0])
    reports = {
        name: Report(weight, bytes(8), (Pass(size),)) for name, weight in zip(names, weights, strict=True)
    }
    plan = make_plan(step=0, coordinator=names[0], reports=reports, nonce=b"n", rules=rules)
    for reducer in reducers:
        await reducer.start()
    each = zip(names, vectors, weights, reducers, strict=True)
    said: list[Done] = []
    parts = [(Rounds(plan, n, all_reduce=r, say=noting(said)), v, w) for n, v, w, r in each]
    results = await asyncio.gather(*(rounds.average(Contribution(v, w)) for rounds, v, w in parts))
    for rounds, _, _ in parts:
        rounds.close()
    assert not any(done.missing or done.lost for done in said)
    return plan, results


def noting(said):
    async def say(done):
        said.append(done)

    return say


@pytest.mark.parametrize(
    ("group_size", "dimensions"),
    [(4, 1), (16, 1), (64, 1), (8, 2), (8, 3), (16, 2), (32, 2), (4, 3), (2, 10)],
)
def test_on_a_full_grid_the_mean_is_exact_after_as_many_rounds_as_dimensions(group_size, dimensions):
    count, values = group_size**dimensions, INT8_BLOCK * min(group_size, 4)
    generator = torch.Generator().manual_seed(count)
    vectors = list(torch.randn(count, values, generator=generator))
    weights = torch.randint(1, 5, (count,), generator=generator).double().tolist()
    plan, results = virtual_time.run(average_all(vectors, weights, group_size))
    mean = torch.stack([v.double() * w for v, w in zip(vectors, weights, strict=True)]).sum(0) / sum(weights)
    assert plan.grid.sides == (group_size,) * dimensions
    for result in results:
        assert (result.vector - mean).norm() <= 2e-6 * mean.norm()
        assert torch.equal(result.vector, results[0].vector)
        assert result.weight == pytest.approx(sum(weights))


@pytest.mark.parametrize("count", [2, 3, 5, 7, 10, 23, 57])
@pytest.mark.parametrize("codec", CODECS)
def test_for_any_number_of_members_too(count, codec):
    vectors = list(torch.randn(count, 3000, generator=torch.Generator().manual_seed(count)))
    weights = [float(i % 3 + (i == 0)) for i in range(count)]  # some have nothing to say
    _, results = virtual_time.run(average_all(vectors, weights, 4, codec))
    mean = sum(v * w for v, w in zip(vectors, weights, strict=True)) / sum(weights)
    tolerance = {"float32": 1e-5, "float16": 5e-3, "int4": 0.6, "topk": 1.1}.get(codec, 0.05)
    assert all((result.vector - mean).norm() <= tolerance * mean.norm() for result in results)
    assert all(torch.equal(result.vector, results[0].vector) for result in results)
    assert len({result.weight for result in results}) == 1


@pytest.mark.parametrize("codec,mean_codec", [("int8", "float16"), ("float16", "float32"), ("topk", "int4")])
def test_all_hold_the_same_bits_with_another_codec_for_the_means(codec, mean_codec):
    vectors = list(torch.randn(10, 9000, generator=torch.Generator().manual_seed(0)))
    _, results = virtual_time.run(average_all(vectors, [1.0] * 10, 3, codec, mean_codec))
    assert all(torch.equal(result.vector, results[0].vector) for result in results)


def test_a_round_of_random_groups_leaves_the_papers_share_of_the_variance():
    """(r-1)/(N-1) with r groups of equal size (Moshpit SGD, section 3.2)."""
    rng, count, groups = np.random.default_rng(0), 240, 12
    left = []
    for _ in range(4000):
        values = rng.normal(size=count)
        spread = values.var()
        means = rng.permutation(values).reshape(groups, -1).mean(axis=1)
        left.append(((means - values.mean()) ** 2).mean() / spread)
    assert np.mean(left) == pytest.approx((groups - 1) / (count - 1), rel=0.03)


def rounds_to_the_mean(count, group_size, *, failing, seed, accuracy=1e-4):
    """Rounds until the peers' mean squared distance from the mean of what all began with, in units of its
    variance, is below `accuracy`. A peer that fails in a round neither gives nor takes in it. Seats are
    drawn anew after every d rounds, as for every step."""
    rng = np.random.default_rng(seed)
    peers = [f"peer{i:04d}" for i in range(count)]
    values, weights = rng.normal(size=count), np.ones(count)
    goal, spread = values.mean(), values.var()
    number = {peer: i for i, peer in enumerate(peers)}
    for rounds in range(1, 100):
        if (rounds - 1) % len(grid_sides(count, group_size)) == 0:
            grid = seat(peers, group_size=group_size, key=b"%d/%d" % (seed, rounds))
            weights[:] = 1
        for group in grid.groups((rounds - 1) % grid.dimensions):
            alive = [number[p] for p in group.members if rng.random() >= failing]
            if alive:
                values[alive] = np.average(values[alive], weights=weights[alive])
                weights[alive] = weights[alive].sum()
        if ((values - goal) ** 2).mean() / spread < accuracy:
            return rounds
    raise AssertionError("no convergence")


def test_1024_peers_reach_the_mean_in_2_rounds_and_with_failures_in_6():
    assert {rounds_to_the_mean(1024, 32, failing=0.0, seed=s, accuracy=1e-20) for s in range(5)} == {2}
    with_failures = [rounds_to_the_mean(1024, 32, failing=0.01, seed=s) for s in range(40)]
    assert np.mean(with_failures) <= 6, with_failures
