"""Slice sizes: the closed form against a linear program, and the cases that have names."""

import os
import random
import subprocess
import sys

import pytest
from scipy.optimize import linprog

from averaging.shares import Mode, cut, pieces, shares


def cost(share, mode, senders):
    """How often the vector is moved by one that reduces `share` of it."""
    return senders * share if mode is Mode.AUXILIARY else 1 + (senders - 2) * share


def slowest(found, bandwidths, modes=None):
    modes = modes or [Mode.MEMBER] * len(bandwidths)
    senders = sum(mode is not Mode.AUXILIARY for mode in modes)
    return max(cost(w, mode, senders) / b for w, b, mode in zip(found, bandwidths, modes, strict=True))


def best(bandwidths, modes):
    """The smallest time of the slowest, by a linear program over (shares, time)."""
    count, senders = len(bandwidths), sum(mode is not Mode.AUXILIARY for mode in modes)
    rows, bounds = [], []
    for i, (b, mode) in enumerate(zip(bandwidths, modes, strict=True)):
        row = [0.0] * (count + 1)
        row[i], row[-1] = (senders if mode is Mode.AUXILIARY else senders - 2), -b
        rows.append(row)
        bounds.append((0.0, 0.0 if mode is Mode.CLIENT else 1.0))
    limits = [0.0 if mode is Mode.AUXILIARY else -1.0 for mode in modes]
    solved = linprog(
        [0.0] * count + [1.0],
        A_ub=rows,
        b_ub=limits,
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[1.0],
        bounds=[*bounds, (0, None)],
    )
    assert solved.success
    return solved.fun


@pytest.mark.parametrize("seed", range(300))
def test_no_other_cut_is_faster(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 20)
    bandwidths = [rng.choice([1.0, 5.0, 10.0, rng.lognormvariate(0, 2)]) for _ in range(count)]
    kinds = rng.choice([[Mode.MEMBER], [Mode.MEMBER, Mode.CLIENT], list(Mode)])
    modes = [Mode.MEMBER, *(rng.choice(kinds) for _ in range(count - 1))]
    found = shares(bandwidths, modes)
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    assert all(w == 0 for w, mode in zip(found, modes, strict=True) if mode is Mode.CLIENT)
    assert slowest(found, bandwidths, modes) == pytest.approx(best(bandwidths, modes), rel=1e-6)


def test_equal_peers_get_equal_shares():
    assert shares([3.0] * 6) == pytest.approx([1 / 6] * 6)


def test_nearly_all_goes_to_a_peer_with_ten_times_the_link():
    assert shares([10.0, 1, 1, 1, 1, 1])[0] > 0.95


def test_it_beats_equal_shares_and_a_single_server():
    bandwidths = [5.0] + [1.0] * 7
    ours = slowest(shares(bandwidths), bandwidths)
    equal, server = slowest([1 / 8] * 8, bandwidths), slowest([1.0] + [0.0] * 7, bandwidths)
    assert min(equal, server) / ours >= 1.15


@pytest.mark.parametrize("bandwidths", [[1.0, 1.0], [1.0, 100.0]])
def test_two_peers_share_equally_whatever_their_links(bandwidths):
    assert shares(bandwidths) == pytest.approx([0.5, 0.5])


def test_a_dominating_slow_peer_reduces_nothing_and_the_others_share():
    found = shares([0.001, 1.0, 1.0, 2.0])
    assert found[0] == 0 and sum(found) == pytest.approx(1)
    assert found[1] == found[2] > 0


def test_clients_reduce_nothing_and_auxiliaries_help():
    slow = [1.0] * 4
    alone = slowest(shares(slow), slow)
    modes = [Mode.MEMBER] * 4 + [Mode.AUXILIARY]
    assert slowest(shares([*slow, 50.0], modes), [*slow, 50.0], modes) < 0.7 * alone
    assert shares([1.0, 1.0, 1.0], [Mode.CLIENT, Mode.MEMBER, Mode.CLIENT]) == [0, 1, 0]


@pytest.mark.parametrize(
    ("bandwidths", "modes", "message"),
    [
        ([1.0, 0.0], None, "not positive"),
        ([1.0, float("nan")], None, "not positive"),
        ([1.0, float("inf")], None, "not positive"),
        ([1.0, 1.0], [Mode.CLIENT] * 2, "nobody"),
    ],
)
def test_what_cannot_be_shared_is_refused(bandwidths, modes, message):
    with pytest.raises(ValueError, match=message):
        shares(bandwidths, modes)


def test_every_process_computes_the_same_cut():
    program = (
        "from averaging.shares import cut, shares; import random; r = random.Random(1);"
        "links = [[r.lognormvariate(0, 2) for _ in range(n)] for n in range(2, 40)];"
        "print([cut(10**7 + 3, shares(each), 512) for each in links])"
    )
    command = [sys.executable, "-c", program]
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    runs = {subprocess.check_output(command, env=environment) for environment in environments}
    assert len(runs) == 1


@pytest.mark.parametrize("seed", range(50))
def test_slices_cover_the_vector_in_order_and_respect_blocks(seed):
    rng = random.Random(seed)
    values, count = rng.randint(0, 100_000), rng.randint(1, 30)
    reducing = [rng.choice([0.0, rng.random()]) for _ in range(count - 1)] + [0.5]
    slices = cut(values, reducing, 512)
    assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]
    assert slices[0].start == 0 and slices[-1].stop == values
    assert all(s.start % 512 == 0 or s.start == values for s in slices)
    for part, share in zip(slices, reducing, strict=True):
        assert abs(len(part) - values * share / sum(reducing)) <= 1024
    assert all(len(p) <= 1024 for s in slices for p in pieces(s, 1024, 512))


def test_equal_slices_differ_by_a_block_at_most():
    sizes = [len(s) for s in cut(512 * 103, [1.0] * 10, 512)]
    assert sum(sizes) == 512 * 103 and max(sizes) - min(sizes) <= 512
