"""One round in one group, on the in-memory network in virtual time."""

import asyncio

import pytest
import torch

from averaging import moshpit, virtual_time
from averaging.allreduce import PIECE_VALUES, SERVICE, ButterflyAllReduce
from averaging.averaging_pb2 import RoundGreeting
from averaging.codecs import CODECS
from averaging.errors import LinkError, RoundAbandonedError
from averaging.memory_network import Link, MemoryHub
from averaging.plan import Report, make_plan

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "int8": 3e-2, "int4": 0.25}


class Group:
    def __init__(self, size: int, codec: str = "float32", **link) -> None:
        self.hub = MemoryHub(link=lambda a, b: Link(**{"latency_s": 0.01} | link))
        self.names = [f"p{i}" for i in range(size)]
        self.members = [
            ButterflyAllReduce(self.hub.network(n), codec=CODECS[codec], progress_s=3, max_weight=1e6)
            for n in self.names
        ]

    async def average(self, vectors, weights, key=b"k" * 16):
        for member in self.members:
            await member.start()
        rounds = (
            m.run((key, 0), self.names, vector=v, weight=w, most_weight=1e6, feed_back=True)
            for m, v, w in zip(self.members, vectors, weights, strict=True)
        )
        return await asyncio.gather(*rounds, return_exceptions=True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("values", [1, 1000, PIECE_VALUES + 77])
def test_all_members_hold_the_same_bits_of_the_weighted_mean(codec, size, values):
    generator = torch.Generator().manual_seed(size)
    vectors = [torch.randn(values, generator=generator) for _ in range(size)]
    weights = [float(i) for i in range(size)]  # one of them has nothing to say

    results = virtual_time.run(_average(Group(size, codec), vectors, weights))
    exact = sum(v * w for v, w in zip(vectors, weights, strict=True)) / sum(weights)
    assert all(torch.equal(r.mean, results[0].mean) for r in results)
    assert (results[0].mean - exact).norm() <= TOLERANCE[codec] * exact.norm() + 1e-7


async def _average(group, vectors, weights):
    return await group.average(vectors, weights)


def test_bytes_on_the_wire_are_those_of_a_butterfly():
    size, values = 4, 4 * 512 * 100
    results = virtual_time.run(_average(Group(size), [torch.ones(values)] * size, [1.0] * size))
    encoded = 4 * values
    assert all(r.sent_bytes == pytest.approx(2 * (size - 1) / size * encoded, rel=0.01) for r in results)


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_a_member_lost_in_the_round_abandons_it_for_all_within_the_deadline(fault):
    async def main():
        group = Group(4, bytes_per_s=1e6)
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, group.hub.kill if fault == "kill" else group.hub.hang, "p2")
        survivors = asyncio.create_task(group.average([torch.randn(500_000)] * 4, [1.0] * 4))
        done, _ = await asyncio.wait([survivors], timeout=30)
        if not done:  # the lost one itself never ends
            survivors.cancel()
            pytest.fail("survivors wait for ever")
        return survivors.result(), loop.time()

    results, ended_s = virtual_time.run(main())
    for index, result in enumerate(results):
        if index != 2:
            assert isinstance(result, RoundAbandonedError)
    assert ended_s <= 0.2 + 2 * 3 + 1


def test_strangers_and_false_weights_are_turned_away():
    async def main():
        group = Group(2)
        for member in group.members:
            await member.start()
        stranger = group.hub.network("stranger")
        for weight in (1.0, 1e9, -1.0, float("nan")):
            stream = await stranger.open("p0", SERVICE, max_payload_bytes=1 << 20)
            await stream.send(RoundGreeting(plan=b"k" * 16, round=0, weight=weight).SerializeToString())
            running = asyncio.create_task(group.average([torch.ones(10)] * 2, [1.0] * 2, key=bytes(16)))
            with pytest.raises(LinkError):
                await stream.receive()
            results = await running
            assert all(torch.equal(r.mean, torch.ones(10)) for r in results)
            group.members[0]._rounds.clear()
            group.members[1]._rounds.clear()

    virtual_time.run(main())


def test_garbage_from_a_member_abandons_the_round():
    async def main():
        hub = MemoryHub()
        honest = ButterflyAllReduce(hub.network("a"), codec=CODECS["float32"], progress_s=3, max_weight=10)
        await honest.start()
        liar = hub.network("b")

        async def never(stream):
            await asyncio.sleep(1)

        await liar.serve(SERVICE, never, max_payload_bytes=1 << 24)
        running = asyncio.create_task(
            honest.run(
                (b"k" * 16, 0),
                ["a", "b"],
                vector=torch.ones(2048),
                weight=1.0,
                most_weight=10,
                feed_back=True,
            )
        )
        stream = await liar.open("a", SERVICE, max_payload_bytes=1 << 24)
        await stream.send(RoundGreeting(plan=b"k" * 16, round=0, weight=1.0).SerializeToString())
        bad = torch.full((1024,), float("nan"))
        await stream.send(b"", CODECS["float32"].encode(bad))
        with pytest.raises(RoundAbandonedError):
            await running

    virtual_time.run(main())


def test_a_group_of_one_needs_no_network():
    async def main():
        hub = MemoryHub()
        alone = ButterflyAllReduce(hub.network("a"), codec=CODECS["int8"], progress_s=3, max_weight=10)
        reports = {"a": Report(3, bytes(8))}
        plan = make_plan(step=0, coordinator="a", reports=reports, nonce=b"n", group_size=2)
        vector = torch.randn(100)
        result = await moshpit.average(plan, "a", vector=vector, weight=3.0, all_reduce=alone)
        assert torch.equal(result.mean, vector) and result.sent_bytes == 0

    virtual_time.run(main())
