"""PowerSGD on the in-memory network in virtual time."""

import asyncio
import math
import random

import pytest
import torch

from averaging import virtual_time
from averaging.averager import Averager
from averaging.lowrank import LowRank
from averaging.memory_network import Link, MemoryHub

SHAPES = [(96, 128), (64,), (200, 80), (4, 4), (8, 16, 80)]
SIZES = [math.prod(shape) for shape in SHAPES]
VALUES, RANK, STEPS = sum(SIZES), 4, 100


def a_gradient(seed, noise=0.3):
    """Matrices of rank 2, and noise."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for shape in SHAPES:
        rows, columns = shape[0], math.prod(shape[1:])
        signal = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        parts.append((signal + noise * torch.randn(rows, columns, generator=generator)).view(-1))
    return torch.cat(parts)


def averagers_of(hub, names, codec="float32", **options):
    for name in names:
        yield Averager(
            hub.network(name),
            peers=lambda: [p for p in names if p not in hub.dead],
            codec=codec,
            rank=RANK,
            shapes=SHAPES,
            rng=random.Random(name),
            **options,
        )


@pytest.mark.parametrize("size,group_size,codec", [(2, 16, "float32"), (4, 16, "float16"), (9, 3, "float32")])
def test_in_the_long_run_nothing_is_lost_and_all_hold_the_same_bits(size, group_size, codec):
    names, rng = [f"p{i}" for i in range(size)], random.Random(size)
    gradients = torch.stack([a_gradient(seed) for seed in range(size)])

    async def main():
        hub, errors, missing = MemoryHub(rng=rng), [], []
        averagers = list(averagers_of(hub, names, target=1.0, group_size=group_size, codec=codec))
        for averager in averagers:
            await averager.start()
        delivered, true = torch.zeros(VALUES), torch.zeros(VALUES)
        for _ in range(STEPS):
            weights = [rng.uniform(0.5, 1) for _ in names]
            parts = zip(averagers, gradients, weights, strict=True)
            means = await asyncio.gather(*(each.average(v, weight=w) for each, v, w in parts))
            assert all(torch.equal(mean.vector, means[0].vector) for mean in means)
            delivered += sum(weights) * means[0].vector
            true += torch.tensor(weights) @ gradients
            errors.append(float((delivered - true).norm() / true.norm()))
            missing.append(float((delivered - true).norm()))
        return errors, missing, means[0].sent_bytes

    errors, missing, sent_bytes = virtual_time.run(main())
    assert errors[0] > 0.3, "rank 4 cannot say it at once"
    assert errors[-1] < 0.1, errors
    assert missing[-1] < 1.2 * missing[STEPS // 2], "it does not grow with the steps"
    assert sent_bytes < 0.35 * 2 * VALUES * 4 * (1 if size <= group_size else 2)


def test_what_is_small_or_has_the_rank_arrives_at_once():
    exact = a_gradient(0, noise=0.0)

    async def main():
        hub = MemoryHub()
        (averager,) = averagers_of(hub, ["a"], target=1.0)
        await averager.start()
        return (await averager.average(exact)).vector

    assert (virtual_time.run(main()) - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("seed", range(12))
def test_members_that_die_or_hang_between_the_passes_cost_their_part_only(seed):
    """Survivors go on with the same bits; who is counted as in the mean is in it."""
    names, rng = [f"p{i}" for i in range(5)], random.Random(seed)
    gradients = {name: a_gradient(i) for i, name in enumerate(names)}
    found: dict[int, list] = {}

    async def member(name, averager):
        for step in range(6):
            mean = await averager.average(gradients[name])
            found.setdefault(step, []).append(mean)

    async def main():
        hub = MemoryHub(rng=rng, link=lambda a, b: Link(latency_s=0.02, bytes_per_s=4e4))
        averagers = dict(zip(names, averagers_of(hub, names, target=3.0), strict=True))
        for averager in averagers.values():
            await averager.start()
        tasks = {name: asyncio.create_task(member(name, averagers[name])) for name in names}
        victim = rng.choice(names)
        await asyncio.sleep(rng.uniform(0, 3))
        rng.choice([hub.kill, hub.hang])(victim)
        await asyncio.wait([task for name, task in tasks.items() if name != victim], timeout=120)
        for name, task in tasks.items():
            if name != victim:
                task.result()
        return victim

    victim = virtual_time.run(main())
    for step, means in found.items():
        assert len({mean.vector.numpy().tobytes() for mean in means}) == 1, f"seed {seed}, step {step}"
        assert len({mean.members for mean in means}) == 1, f"seed {seed}, step {step}"
    assert len(found[5]) == 4 and victim not in found[5][0].members


def test_directions_learned_from_whole_means_serve_from_the_first_step():
    signal = a_gradient(0, noise=0.1)
    untaught, taught = LowRank(SHAPES, RANK), LowRank(SHAPES, RANK)
    for _ in range(3):
        taught.follow(signal)
    errors = []
    for each in (untaught, taught):
        found = each.result(each.second(each.first(signal, 1.0)), counted=True)
        errors.append(float((found - signal).norm() / signal.norm()))
    assert errors[1] < 0.8 * errors[0]


def test_a_matrix_without_a_gradient_comes_back_to_life():
    low_rank, matrix = LowRank([(64, 64)], 2), torch.zeros(64 * 64)
    for vector, expected in ((matrix, 0.0), (torch.ones(64 * 64), 1.0)):
        mean = low_rank.second(low_rank.first(vector, 1.0))
        assert torch.allclose(low_rank.result(mean, counted=True), torch.tensor(expected), atol=1e-3)


def test_an_abandoned_step_leaves_no_trace():
    plain, abandoned = LowRank(SHAPES, RANK), LowRank(SHAPES, RANK)
    for seed in range(3):
        abandoned.second(abandoned.first(a_gradient(seed + 10), 2.0))
        results = [
            each.result(each.second(each.first(a_gradient(seed), 1.0)), counted=True)
            for each in (plain, abandoned)
        ]
        assert torch.equal(*results)


def test_a_users_mistakes_are_named():
    network = MemoryHub().network("a")
    for options, said in (
        ({"rank": 4}, "needs shapes"),
        ({"rank": 4, "shapes": SHAPES, "codec": "int8"}, "float32, not int8"),
        ({"rank": -1}, "rank -1"),
    ):
        with pytest.raises(ValueError, match=said):
            Averager(network, peers=list, target=1.0, **({"codec": "float32"} | options))
