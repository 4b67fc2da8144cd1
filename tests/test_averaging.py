"""One round in one group, on the in-memory network in virtual time."""

import asyncio
from dataclasses import replace

import pytest
import torch

from averaging import virtual_time
from averaging.allreduce import SERVICE, ButterflyAllReduce
from averaging.averaging_pb2 import Piece, RoundFrame, RoundGreeting
from averaging.codecs import CODECS
from averaging.errors import LinkError
from averaging.memory_network import Link, MemoryHub
from averaging.moshpit import Contribution, Rounds
from averaging.pace import AHEAD
from averaging.plan import MAX_PIECE_VALUES, Pass, Report, StepRules, make_plan
from averaging.reduction import Means
from averaging.round import first_round

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "int8": 3e-2, "int4": 0.25, "topk": 1.0}
RULES = StepRules(target=1, max_weight=1e6, progress_s=3)


class Group:
    """So many members, and a plan of all of them."""

    def __init__(self, size: int, values: int, codec: str = "float32", *, fine: int = 0, **link) -> None:
        self.hub = MemoryHub(link=lambda a, b: Link(**{"latency_s": 0.01} | link))
        self.names = [f"p{i}" for i in range(size)]
        self.rules = replace(RULES, codec=codec)
        self.members = [ButterflyAllReduce(self.hub.network(n), rules=self.rules) for n in self.names]
        reports = {name: Report(1.0, bytes(8), (Pass(values, fine),)) for name in self.names}
        self.plan = make_plan(step=0, coordinator="p0", reports=reports, nonce=b"n", rules=RULES)

    async def average(self, vectors, weights):
        """What every member says when its round is over, and its means."""
        for member in self.members:
            await member.start()
        means = [Means(self.plan.passes[0].values) for _ in self.members]
        limits = [max(1e6, weight) for weight in weights]  # nobody thinks that it weighs too much itself
        rounds = [
            first_round(self.plan, name, 0, rules=replace(self.rules, max_weight=limit))
            for name, limit in zip(self.names, limits, strict=True)
        ]
        opened = [m.meet(r, mean) for m, r, mean in zip(self.members, rounds, means, strict=True)]
        self.opened = opened
        runs = (o.run(v, w) for o, v, w in zip(opened, vectors, weights, strict=True))
        return await asyncio.gather(*runs), means


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("values", [1, 1000, MAX_PIECE_VALUES + 77])
def test_all_members_hold_the_same_bits_of_the_weighted_mean(codec, size, values):
    generator = torch.Generator().manual_seed(size)
    vectors = [torch.randn(values, generator=generator) for _ in range(size)]
    weights = [float(i) for i in range(size)]  # one of them has nothing to say

    async def main():
        return await Group(size, values, codec).average(vectors, weights)

    said, means = virtual_time.run(main())
    assert not any(done.missing or done.lost for done in said)
    exact = sum(v * w for v, w in zip(vectors, weights, strict=True)) / sum(weights)
    assert all(torch.equal(mean.vector, means[0].vector) for mean in means)
    assert all(mean.weight == sum(weights) for mean in means)
    assert (means[0].vector - exact).norm() <= TOLERANCE[codec] * exact.norm() + 1e-7


@pytest.mark.parametrize("codec", ["int8", "int4", "topk"])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("fine", [1, 700, 40_000, 100_000])
def test_small_tensors_travel_in_float16(codec, size, fine):
    values, generator = 100_000, torch.Generator().manual_seed(size)
    vectors = list(torch.randn(size, values, generator=generator))
    group = Group(size, values, codec, fine=fine)

    async def main():
        return await group.average(vectors, [1.0] * size)

    said, means = virtual_time.run(main())
    assert not any(done.missing or done.lost for done in said)
    exact, found = torch.stack(vectors).mean(0), means[0].vector
    error = (found - exact)[-fine:].norm() / exact[-fine:].norm()
    assert error < TOLERANCE["float16"]
    assert fine == values or (found - exact)[:-fine].norm() > TOLERANCE["float16"] * exact[:-fine].norm()
    sent = sum(opened.sent_bytes for opened in group.opened)
    expected = CODECS[codec].size_bytes(values - fine) + CODECS["float16"].size_bytes(fine)
    assert sent == pytest.approx(2 * (size - 1) * expected, rel=0.04)


def test_bytes_on_the_wire_are_those_of_a_butterfly():
    size, values = 4, 4 * 512 * 100

    async def main():
        group = Group(size, values)
        await group.average([torch.ones(values)] * size, [1.0] * size)
        return [opened.sent_bytes for opened in group.opened]

    encoded = 4 * values
    for sent in virtual_time.run(main()):
        assert sent == pytest.approx(2 * (size - 1) / size * encoded, rel=0.01)


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_a_lost_member_leaves_the_mean_and_only_its_own_pieces_are_missing(fault):
    async def main():
        group = Group(4, 4_000_000, bytes_per_s=1e6)
        loop = asyncio.get_running_loop()
        loop.call_later(2.5, group.hub.kill if fault == "kill" else group.hub.hang, "p2")
        running = asyncio.create_task(group.average([torch.ones(4_000_000)] * 4, [1.0, 2.0, 3.0, 4.0]))
        await asyncio.wait([running], timeout=30)  # the lost one itself never ends
        running.cancel()
        return [opened._done() for opened in group.opened], [opened._means for opened in group.opened]

    said, means = virtual_time.run(main())
    for index in (0, 1, 3):
        assert said[index].missing.keys() == {"p2"} and said[index].lost == {"p2"}
        weights = {means[index].weight_of(p) for n in (0, 1, 3) for p in pieces_of(n)}
        assert weights == {10.0, 7.0}, "of the pieces before and after the loss"


def pieces_of(number):
    plan = Group(4, 4_000_000).plan
    return first_round(plan, "p0", 0, rules=RULES).work[f"p{number}"].pieces


def test_nobody_runs_ahead_of_a_groupmate_that_has_not_begun():
    values = 40 * RULES.piece_values

    async def main():
        group = Group(2, values)
        for member in group.members:
            await member.start()
        rounds = [first_round(group.plan, name, 0, rules=RULES) for name in group.names]
        means = [Means(values), Means(values)]
        opened = [m.meet(r, mean) for m, r, mean in zip(group.members, rounds, means, strict=True)]
        first = asyncio.create_task(opened[0].run(torch.ones(values), 1.0))
        await asyncio.sleep(10 * RULES.progress_s)
        sent_bytes = opened[0].sent_bytes
        said = [await opened[1].run(torch.zeros(values), 3.0), await first]
        return sent_bytes, said, means

    sent_bytes, said, means = virtual_time.run(main())
    assert 0 < sent_bytes <= 1.01 * (AHEAD + 1) * 4 * RULES.piece_values
    assert not any(done.missing or done.lost for done in said)
    assert all(torch.equal(mean.vector, torch.full((values,), 0.25)) for mean in means)


def test_strangers_and_false_weights_are_turned_away():
    async def main():
        group = Group(3, 3 * 512)
        plan = group.plan
        for member in group.members:
            await member.start()
        stranger = group.hub.network("stranger")
        stream = await stranger.open("p0", SERVICE, max_payload_bytes=1 << 20)
        await stream.send(RoundGreeting(plan=plan.key).SerializeToString())
        running = asyncio.create_task(group.average([torch.ones(3 * 512)] * 3, [1.0, 1e9, 1.0]))
        with pytest.raises(LinkError):
            await stream.receive()
        said, means = await running
        assert said[0].lost == said[2].lost == {"p1"}, "its weight is above what any may have"
        assert said[0].unused == said[2].unused == {"p1"}
        assert means[0].weight == means[2].weight == 2.0

    virtual_time.run(main())


@pytest.mark.parametrize(
    "bad",
    [
        (RoundFrame(begin=-1.0), b""),
        (RoundFrame(begin=float("nan")), b""),
        (RoundFrame(piece=Piece(index=0)), bytes(40)),
        (RoundFrame(begin=1.0), b"", RoundFrame(piece=Piece(index=7)), bytes(40)),
        (RoundFrame(begin=1.0), b"", RoundFrame(piece=Piece(index=0)), bytes(39)),
        (RoundFrame(begin=1.0), b"", RoundFrame(piece=Piece(index=0)), b"\xff" * 40),  # not finite
    ],
    ids=str,
)
def test_a_member_that_sends_garbage_is_dropped_and_named(bad):
    async def main():
        group = Group(2, 10)
        honest, liar = group.members[0], group.hub._networks["p1"]
        await honest.start()

        async def silent(stream):
            await asyncio.sleep(60)

        await liar.serve(SERVICE, silent, max_payload_bytes=1 << 24)
        rounds = Rounds(group.plan, "p0", all_reduce=honest, say=(said := Said()))
        running = asyncio.create_task(rounds.average(Contribution(torch.ones(10), 1.0)))
        stream = await liar.open("p0", SERVICE, max_payload_bytes=1 << 24)
        await stream.send(RoundGreeting(plan=group.plan.key).SerializeToString())
        for header, payload in zip(bad[::2], bad[1::2], strict=True):
            await stream.send(header.SerializeToString(), payload)
        await asyncio.sleep(10)
        running.cancel()
        rounds.close()
        return said.done

    (done,) = virtual_time.run(main())
    assert done.lost == {"p1"}


class Said:
    def __init__(self):
        self.done = []

    async def __call__(self, done):
        self.done.append(done)


@pytest.mark.parametrize(("elsewhere", "limit_s"), [(False, 3.5), (True, 2.0)])
def test_nobody_waits_for_a_member_that_stops_before_it_comes(elsewhere, limit_s):
    """Least of all if others do not hear it, either."""

    async def main():
        group = Group(2, 2 * 512)
        first, _ = group.members
        if elsewhere:
            first.has_stopped = lambda peer, unheard_s: unheard_s >= group.rules.silence_s / 2
        await first.start()
        group.hub.hang("p1")
        rounds = Rounds(group.plan, "p0", all_reduce=first, say=(said := Said()))
        running = asyncio.create_task(rounds.average(Contribution(torch.ones(2 * 512), 1.0)))
        await asyncio.sleep(limit_s)
        running.cancel()
        rounds.close()
        return said.done

    (done,) = virtual_time.run(main())
    assert done.lost == {"p1"} and done.missing == {"p1": 0}


def test_a_group_of_one_needs_no_network():
    async def main():
        group = Group(1, 100, "int8")
        vector = torch.randn(100)
        rounds = Rounds(group.plan, "p0", all_reduce=group.members[0], say=Said())
        result = await rounds.average(Contribution(vector, 3.0))
        assert torch.equal(result.vector, vector) and result.sent_bytes == 0

    virtual_time.run(main())
