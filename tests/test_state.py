"""How newcomers get their state: real donors and loaders on the in-memory network, in virtual time."""

import asyncio
import contextlib

import pytest
import torch
from torch import nn

from averaging import virtual_time
from averaging.bandwidth import UplinkMeter
from averaging.errors import AveragingError, LinkError
from averaging.memory_network import Link, MemoryHub, MemoryStream
from averaging.network import Scoped
from swarm import swarm_pb2 as pb
from swarm.chunks import Contents, chunks_of, hash_of
from swarm.compute import VirtualCompute
from swarm.config import TrainingConfig
from swarm.donor import LINGER_S, SERVICE, Allowance, Donor
from swarm.donors import DONORS
from swarm.holdings import StageHoldings
from swarm.stage import Stage
from swarm.state import StateLoader

WIDTH = 1024  # of a square matrix: the state has 12 chunks
RATE = 1_000_000.0  # bytes per second of every donor's link
DATA_BYTES = 3 * 4 * WIDTH * WIDTH


class Mate:
    """A peer of the stage, with as much of it as giving and loading need."""

    def __init__(self, hub: MemoryHub, name: str, *, seed: int = 0, width: int = WIDTH) -> None:
        torch.manual_seed(seed)
        self.network = hub.network(name)
        self.stage = Stage(nn.Linear(width, width, bias=False), TrainingConfig(), stage=0, stages=1)
        self.compute = VirtualCompute(lambda priority: 0.001)
        uplink = UplinkMeter()
        self.holdings = StageHoldings(self.stage, self.compute)
        self.donor = Donor(self.network, self.holdings, upload_share=0.5, uplink=uplink)
        self.loadings: list = []
        self.loader = StateLoader(
            self.network,
            self.stage,
            self.compute,
            replay=self.stage.replay,
            on_loading=self.loadings.append,
        )

    async def give(self) -> "Mate":
        await self.donor.start()
        self.donor.available = True
        return self

    def step(self, number: int) -> None:
        """As all mates do, with the same mean."""
        generator = torch.Generator().manual_seed(number)
        mean = torch.randn(self.stage.values, generator=generator)
        ids = [number.to_bytes(16, "big")]
        self.stage.apply(mean, ids)
        if self.donor.is_held:
            self.holdings.keep(number, mean, ids)
        self.holdings.reached()


def step_all(mates, steps: int = 1) -> None:
    for _ in range(steps):
        for mate in mates:
            mate.step(mate.stage.version)


def simulate(test, *, rate: float = RATE) -> None:
    async def main():
        hub = MemoryHub()
        hub.link = lambda a, b: Link(latency_s=0.01, bytes_per_s=rate)
        await test(hub, asyncio.get_running_loop().time)

    virtual_time.run(main())


async def donors_of(hub, count: int, *, steps: int = 3, **how) -> list[Mate]:
    mates = [await Mate(hub, f"donor{number}", **how).give() for number in range(count)]
    step_all(mates, steps)
    return mates


def names(mates) -> list[str]:
    return [mate.network.peer_id for mate in mates]


def assert_same(newcomer: Mate, mate: Mate) -> None:
    mine, theirs = newcomer.stage.state(), mate.stage.state()
    assert newcomer.stage.version == mate.stage.version
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs) and mine.keys() == theirs.keys()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_state_comes_from_all_donors_at_the_sum_of_their_rates(count):
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, count), Mate(hub, "newcomer", seed=1)
        began_s = now()
        assert await newcomer.loader.load(names(mates))
        assert_same(newcomer, mates[0])
        ideal_s = DATA_BYTES / RATE / count
        assert now() - began_s < 1.15 * ideal_s + 1.0  # a chunk takes a second
        assert newcomer.loadings[-1].received_bytes == newcomer.loadings[-1].size_bytes >= DATA_BYTES
        assert max(loading.donors for loading in newcomer.loadings) == count

    simulate(test)


def test_a_state_travels_in_fewer_bytes_than_it_has():
    async def test(hub, now):
        (mate,), newcomer = await donors_of(hub, 1), Mate(hub, "newcomer", seed=1)
        began_s = now()
        assert await newcomer.loader.load(names([mate]))
        assert_same(newcomer, mate)
        assert now() - began_s < 0.9 * DATA_BYTES / RATE

    simulate(test)


def test_steps_that_close_while_the_state_comes_are_replayed():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 2), Mate(hub, "newcomer", seed=1)
        loading = asyncio.ensure_future(newcomer.loader.load(names(mates)))
        for _ in range(3):
            await asyncio.sleep(1.5)
            step_all(mates)
        assert await loading
        assert newcomer.stage.version == 6
        assert_same(newcomer, mates[0])
        step_all(mates)  # after it, until it takes part itself, its donors keep what it misses
        assert await newcomer.loader.follow()
        assert_same(newcomer, mates[1])
        assert not await newcomer.loader.follow()
        newcomer.loader.release()
        await asyncio.sleep(1)
        step_all(mates)
        assert not any(mate.holdings._means or mate.holdings._states for mate in mates), "kept for nobody"

    simulate(test)


def test_what_is_accumulated_stays_when_a_step_is_replayed():
    async def test(hub, now):
        (mate,), newcomer = await donors_of(hub, 1), Mate(hub, "newcomer", seed=1)
        await newcomer.loader.load(names([mate]))
        newcomer.stage.accumulate(b"m" * 16, [torch.ones(WIDTH, WIDTH)], tokens=4)
        newcomer.stage.freeze()
        newcomer.stage.accumulate(b"n" * 16, [torch.ones(WIDTH, WIDTH)], tokens=4)
        step_all([mate])
        assert await newcomer.loader.follow()
        assert_same(newcomer, mate)
        held = newcomer.stage.accumulator
        assert (held.step, held.tokens, newcomer.stage.frozen) == (4, 8, None)
        assert float(held.sums[0].sum()) == 2 * WIDTH * WIDTH

    simulate(test, rate=1e9)


def test_a_donor_that_dies_is_made_up_for_by_the_others():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 3), Mate(hub, "newcomer", seed=1)
        loading = asyncio.ensure_future(newcomer.loader.load(names(mates)))
        await asyncio.sleep(2)
        hub.kill("donor0")
        assert await loading
        assert_same(newcomer, mates[1])
        assert now() < 1.3 * DATA_BYTES / RATE / 2 + 1

    simulate(test)


def test_a_transfer_whose_only_donor_was_out_of_reach_goes_on_where_it_was():
    async def test(hub, now):
        (mate,), newcomer = await donors_of(hub, 1), Mate(hub, "newcomer", seed=1)
        loading = asyncio.ensure_future(newcomer.loader.load(names([mate])))
        await asyncio.sleep(7)
        hub.sever("newcomer", "donor0")
        with pytest.raises(AveragingError, match="MB are here"):
            await loading
        hub.heal("newcomer", "donor0")
        step_all([mate])
        here_bytes, began_s = newcomer.loadings[-1].received_bytes, now()
        assert here_bytes > 4e6
        assert await newcomer.loader.load(names([mate]))
        assert_same(newcomer, mate)
        replay_bytes = DATA_BYTES / 3
        assert now() - began_s < (DATA_BYTES - here_bytes + replay_bytes) / RATE + 2

    simulate(test)


def test_a_donor_that_has_yet_to_take_the_last_step_joins_in_when_it_has():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 2), Mate(hub, "newcomer", seed=1)
        step_all(mates[:1])
        loading = asyncio.ensure_future(newcomer.loader.load(names(mates)))
        await asyncio.sleep(0.3)
        step_all(mates[1:])
        assert await loading
        assert_same(newcomer, mates[1])
        assert max(each.donors for each in newcomer.loadings) == 2

    simulate(test)


class _Improving(Scoped):
    """A network that finds a better way to every peer after the first stream to it."""

    def __init__(self, network) -> None:
        super().__init__(network, "")
        self.network, self.opened = network, []

    def _name(self, service: str) -> str:
        return service

    async def open(self, peer, service, **how):
        stream = await super().open(peer, service, **how)
        if peer not in self.opened:
            stream.__class__ = _Superseded
        self.opened.append(peer)
        return stream


class _Superseded(MemoryStream):
    superseded = True


def test_the_state_goes_over_the_better_way_that_was_found_meanwhile():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 2), Mate(hub, "newcomer", seed=1)
        network = newcomer.loader.donors._network = _Improving(newcomer.network)
        assert await newcomer.loader.load(names(mates))
        assert sorted(network.opened) == sorted(names(mates) * 2)
        assert not any(source.superseded for source in newcomer.loader.donors._sources)
        assert len(newcomer.loader.donors._sources) == 2 and now() < DATA_BYTES / RATE / 2 * 1.15 + 1.5
        assert_same(newcomer, mates[0])

    simulate(test)


def test_a_state_asked_for_beforehand_is_that_of_its_version_however_far_the_donors_are_when_it_comes():
    async def test(hub, now):
        mates, archive = await donors_of(hub, 2), Mate(hub, "archive", seed=1)
        donors = archive.loader.donors
        donors._network = _Improving(archive.network)
        asking = asyncio.ensure_future(donors.offers(names(mates), at=5))
        for step in range(3, 9):
            await asyncio.sleep(1)
            assert asking.done() == (step >= 5)
            step_all(mates)
        offers = asking.result()
        assert [offer.name for offer in offers] == [(False, 5)] * 2 and offers[0] == offers[1]
        data = await donors.state(donors.best(offers))
        assert not any(source.superseded for source in donors._sources)
        archive.loader._load(data, 5)
        donors.release()
        reference = Mate(hub, "reference")
        step_all([reference], 5)
        assert_same(archive, reference)
        await asyncio.sleep(1)
        step_all(mates)
        assert not any(mate.holdings._means or mate.holdings._states for mate in mates), "kept for nobody"
        assert await donors.offers(names(mates), at=5) == [], "it is past"

    simulate(test)


def test_wishes_that_make_no_sense_are_refused_and_those_of_the_dead_forgotten():
    async def test(hub, now):
        (mate,), archive = await donors_of(hub, 1), Mate(hub, "archive", seed=1)
        assert await archive.loader.donors.offers(["donor0"], at=10**12) == []
        stranger = Mate(hub, "stranger", seed=1)
        asking = [
            asyncio.ensure_future(m.loader.donors.offers(["donor0"], at=9)) for m in (archive, stranger)
        ]
        await asyncio.sleep(1)
        assert mate.holdings._wishes.keys() == {9}
        hub.kill("stranger")
        asking[1].cancel()
        await asyncio.sleep(2 * LINGER_S)
        assert mate.donor._leases.keys() == {"archive"} and mate.holdings._waiting[9] == 1
        mate.holdings.close()
        assert await asking[0] == [] and not mate.holdings._wishes

    simulate(test)


def test_of_donors_that_disagree_the_majority_is_believed():
    async def test(hub, now):
        mates = await donors_of(hub, 3)
        with torch.no_grad():
            mates[0].stage._weights.vector[5] += 1
        newcomer = Mate(hub, "newcomer", seed=1)
        assert await newcomer.loader.load(names(mates))
        assert_same(newcomer, mates[2])

    simulate(test)


def test_a_state_that_is_here_already_is_not_transferred():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 2, steps=0), Mate(hub, "newcomer")
        assert await newcomer.loader.load(names(mates))
        assert now() < 1 and not newcomer.loadings

    simulate(test)


def test_who_is_new_itself_has_no_state_and_who_is_busy_or_out_of_reach_may_have_one():
    async def test(hub, now):
        new, newcomer = Mate(hub, "new"), Mate(hub, "newcomer", seed=1)
        await new.donor.start()
        assert not await newcomer.loader.load(names([new]))
        hub.link = lambda a, b: Link(latency_s=0.01)
        (busy,) = await donors_of(hub, 1)
        others = [Mate(hub, f"other{number}", seed=1) for number in range(9)]
        asked = await asyncio.gather(
            *(other.loader.load(names([busy])) for other in others), return_exceptions=True
        )
        refused = [found for found in asked if isinstance(found, LinkError)]
        assert len(refused) == 1 and "gives its state to others" in str(refused[0])
        for other in others:
            other.loader.release()
        await asyncio.sleep(1)
        assert await newcomer.loader.load(names([busy])), "places are free again"

    simulate(test)


def test_of_many_peers_a_few_are_asked_and_dead_ones_are_passed_over():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 8, width=64), Mate(hub, "newcomer", seed=1, width=64)
        for name in names(mates)[:3]:
            hub.kill(name)
        assert await newcomer.loader.load(names(mates))
        assert_same(newcomer, mates[4])
        assert len(newcomer.loader.donors._sources) == DONORS

    simulate(test)


def test_a_step_too_far_behind_is_not_replayed_but_the_state_is_loaded_anew():
    async def test(hub, now):
        mates, newcomer = await donors_of(hub, 1, width=64), Mate(hub, "newcomer", seed=1, width=64)
        await newcomer.loader.load(names(mates))
        step_all(mates, 12)
        assert not await newcomer.loader.follow()
        assert newcomer.stage.version == 3
        assert await newcomer.loader.load(names(mates))
        assert_same(newcomer, mates[0])

    simulate(test)


def test_three_newcomers_at_three_versions_need_no_more_than_two_snapshots_of_a_donor():
    async def test(hub, now):
        (mate,) = await donors_of(hub, 1)
        newcomers = [Mate(hub, f"newcomer{number}", seed=1) for number in range(3)]
        loading = []
        for newcomer in newcomers:
            loading.append(asyncio.ensure_future(newcomer.loader.load(names([mate]))))
            await asyncio.sleep(1)
            assert len(mate.holdings._states) <= 2
            step_all([mate])
        assert all(await asyncio.gather(*loading))
        for newcomer in newcomers:
            await newcomer.loader.follow()
            assert_same(newcomer, mate)

    simulate(test)


@contextlib.asynccontextmanager
async def liar(hub, answers):
    """A donor that says what it likes: `answers(message)` gives frames."""

    async def serve(stream):
        with contextlib.suppress(LinkError):
            while (frame := await stream.receive()) is not None:
                message = pb.FromNewcomer.FromString(frame.header)
                for header, payload in answers(message) if not message.alive else ():
                    await stream.send(header, payload)

    await hub.network("liar").serve(SERVICE, serve, max_payload_bytes=0)
    yield "liar"


def offer(version: int = 9, size: int = 100, hashes: bytes = bytes(32)) -> tuple[bytes, bytes]:
    said = pb.StateOffer(version=version, number=version, size_bytes=size)
    return pb.FromDonor(offer=said).SerializeToString(), hashes


JUNK = bytes(100)
FITS = Contents(100, tuple(map(hash_of, chunks_of(JUNK)))).pack()


def chunk(message, payload: bytes, *, squeezed: bool = False) -> tuple[bytes, bytes]:
    message.chunk.squeezed = squeezed
    return pb.FromDonor(chunk=message.chunk).SerializeToString(), payload


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (lambda message: [(b"\xff\xff", b"")], "malformed message of a donor"),
        (lambda message: [offer(size=1 << 60)], "at most"),
        (lambda message: [offer(hashes=bytes(31))], "bytes of hashes"),
        (lambda message: [offer(), offer(), offer()], "nobody asked for"),
        (lambda message: [chunk(message, b"x")], "nobody asked for"),
        (
            lambda message: [chunk(message, JUNK[1:]) if message.HasField("chunk") else offer()],
            "hash that it announced",
        ),
        (
            lambda message: [
                chunk(message, JUNK, squeezed=True) if message.HasField("chunk") else offer(hashes=FITS)
            ],
            "exponents in a squeezed chunk|no squeezed chunk",
        ),
        (
            lambda message: [chunk(message, JUNK) if message.HasField("chunk") else offer(hashes=FITS)],
            "not fit",
        ),
        (lambda message: [], "silent for"),
        (lambda message: [] if message.HasField("chunk") else [offer()], "all donors of version 9 were lost"),
    ],
)
def test_what_a_donor_makes_up_is_never_loaded(answers, says):
    async def test(hub, now):
        newcomer = Mate(hub, "newcomer", seed=1, width=64)
        before = newcomer.stage.hash()
        async with liar(hub, answers) as name:
            with pytest.raises(AveragingError, match=says):
                await newcomer.loader.load([name])
            assert newcomer.stage.hash() == before
            mates = await donors_of(hub, 1, width=64, steps=10)
            assert await newcomer.loader.load([name, *names(mates)])
        assert_same(newcomer, mates[0])

    simulate(test, rate=1e9)


def test_newcomers_get_their_share_of_the_uplink_and_no_more():
    async def test(hub, now):
        uplink = UplinkMeter()  # as of a volunteer who has said nothing of it
        mate = Mate(hub, "donor")
        donor = Donor(mate.network, mate.holdings, upload_share=0.5, uplink=uplink)
        await donor._allowance.spend(1 << 40)
        await donor._allowance.spend(1 << 40)
        assert now() == 0, "nothing is known of it"
        uplink.begin(0.0)
        uplink.end(10_000_000, 1.0)
        uplink.conclude()
        await donor._allowance.spend(5_000_000)
        await donor._allowance.spend(5_000_000)
        assert now() == pytest.approx(1.0)
        whole = Donor(mate.network, mate.holdings, upload_share=1.0, uplink=uplink)
        for _ in range(9):
            await whole._allowance.spend(10_000_000)
        assert now() == pytest.approx(1.0), "all of it is the link's own matter"
        await asyncio.sleep(1)
        allowance = Allowance(lambda: 1000.0)
        await asyncio.gather(*(allowance.spend(500) for _ in range(9)))
        assert now() == pytest.approx(6.0)
        await asyncio.sleep(10)
        await allowance.spend(500)  # what was not used is not saved up
        await allowance.spend(500)
        assert now() == pytest.approx(16.5)

    simulate(test)
