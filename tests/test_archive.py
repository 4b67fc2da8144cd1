"""The archive: checkpoints of one version, a stage that has lost all its peers, and a run that goes on."""

import asyncio

import safetensors.torch

from averaging import virtual_time
from swarm.checkpoint import checkpoints_in, read_checkpoint
from swarm.donor import LINGER_S
from tests.sim import Sim, tiny_run
from tests.test_swarm import train

EVERY = 4
SETTINGS = (f"archive.every_steps={EVERY}", "network.announce_s=1")


def simulate(test, *overrides: str, peers: int = 2) -> None:
    async def main():
        sim = Sim(tiny_run(*SETTINGS, *overrides), 0)
        for stage in range(3):
            for _ in range(peers):
                await sim.start_peer(stage)
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        await test(sim)
        assert not sim.errors, sim.errors

    virtual_time.run(main())


def versions(sim) -> list[int]:
    return [max(p.peer.stage.version for p in sim.peers.values() if p.stage == s) for s in range(3)]


def test_all_stages_are_archived_at_the_same_version_while_training_goes_on(tmp_path):
    every = 12  # longer than what the stages do between two announcements

    async def test(sim):
        archive = await sim.start_archive(tmp_path)
        await train(sim, 300)
        await sim.until(lambda: archive.newest is not None and archive.newest.step >= 2 * every, 30)
        found = [read_checkpoint(folder, sim.config) for folder in checkpoints_in(tmp_path)]
        assert len(found) >= 2 and all(checkpoint.step % every == 0 for checkpoint in found)
        for checkpoint in found:
            for stage, path in enumerate(checkpoint.files):
                some = next(p for p in sim.peers.values() if p.stage == stage)
                copy = some.peer._build()
                copy.load(safetensors.torch.load(path.read_bytes()), checkpoint.step)
                assert sim.hashes[stage, checkpoint.step] == {copy.hash()}
        assert not any(p.peer._donor.is_held for p in sim.peers.values()), "no means are kept for an archive"

    simulate(test, f"archive.every_steps={every}")


def test_a_stage_that_has_lost_all_peers_goes_on_from_the_archive(tmp_path):
    async def test(sim):
        archive = await sim.start_archive(tmp_path)
        await train(sim, 200)
        await sim.until(lambda: archive.newest is not None, 30)
        for peer in [p.id for p in sim.peers.values() if p.stage == 1]:
            sim.kill(peer)
        await asyncio.sleep(2 * sim.config.network.expire_s)
        archived = archive.newest.step
        newcomer = await sim.start_peer(1)
        await sim.until(lambda: newcomer in sim.pipeline.hearing, 60)
        assert sim.peers[newcomer].peer.stage.version == archived >= EVERY
        await train(sim, 40, first=200)
        assert sim.peers[newcomer].peer.stage.version > archived

    simulate(test)


def test_a_run_goes_on_from_its_checkpoint_and_peers_take_it_only_while_nobody_lives(tmp_path):
    async def first(sim):
        archive = await sim.start_archive(tmp_path)
        await train(sim, 200)
        await sim.until(lambda: archive.newest is not None, 30)

    simulate(first)

    async def again():
        sim = Sim(tiny_run(*SETTINGS, "archive.every_steps=0"), 0)
        newest = read_checkpoint(checkpoints_in(tmp_path)[-1], sim.config)
        await sim.start_archive(tmp_path, newest)
        for stage in range(3):
            for _ in range(2):
                await sim.start_peer(stage)
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        assert versions(sim) == [newest.step] * 3
        for number in range(1000, 1040):  # what the checkpoint contains already would not be counted again
            await sim.until(lambda: sim.pipeline.ledger.in_flight < 6)
            sim.issue(number)
        await sim.until(lambda: len(sim.completed) == 40)
        assert min(versions(sim)) > newest.step
        late = await sim.start_peer(0)
        await sim.until(lambda: late in sim.pipeline.hearing, 60)
        assert sim.peers[late].peer.stage.version > newest.step
        assert sim.pipeline.ledger.counters["lost"] == 0

    virtual_time.run(again())


def test_a_version_that_a_stage_has_passed_is_given_up_and_the_next_one_comes(tmp_path):
    async def test(sim):
        archive = await sim.start_archive(tmp_path)
        training = asyncio.ensure_future(train(sim, 320))
        await sim.until(lambda: len(asked(sim, 2)) == 2, 60)
        (step,) = {step for p in asked(sim, 2) for step in p.peer._holdings._wishes}
        for peer in asked(sim, 2):
            sim.kill(peer.id)
        await training
        assert archive.newest is not None and archive.newest.step > step
        assert not list(tmp_path.glob(f"step-{step:08d}*"))
        wished = {wish for p in sim.peers.values() for wish in p.peer._holdings._wishes}
        assert all(wish > archive.newest.step for wish in wished), "only of one that is under way"

    simulate(test, peers=3)


def test_a_checkpoint_that_was_missed_is_made_up_for_long_before_the_next_one_is_due(tmp_path):
    every = 24

    async def test(sim):
        archive = await sim.start_archive(tmp_path)
        training = asyncio.ensure_future(train(sim, 500))
        await sim.until(lambda: len(asked(sim, 2)) == 2, 60)
        for peer in asked(sim, 2):
            sim.kill(peer.id)
        await sim.until(lambda: archive.newest is not None, 60)
        assert every < archive.newest.step < 2 * every
        await training

    simulate(test, f"archive.every_steps={every}", peers=3)


def test_checkpoints_are_written_while_the_directory_is_read_slowly(tmp_path):
    async def test(sim):
        read = sim.directory.roster

        async def roster(stage):
            records = await read(stage)
            await asyncio.sleep(1.5)
            return records

        archive = await sim.start_archive(tmp_path)
        sim.directory.roster = roster
        await train(sim, 900)
        assert archive.newest is not None and archive.newest.step > 24

    simulate(test, "archive.every_steps=12")


def asked(sim, stage: int) -> list:
    """Peers that are to give their state at a version which is yet to come."""
    return [p for p in sim.peers.values() if p.stage == stage and p.peer._holdings._wishes]


def test_an_archive_that_dies_leaves_no_trace(tmp_path):
    async def test(sim):
        await sim.start_archive(tmp_path)
        training = asyncio.ensure_future(train(sim, 28))  # three steps: one before the archive's
        await sim.until(lambda: bool(asked(sim, 1)), 60)
        ((name, task),) = sim.archives.items()
        sim.hub.kill(name)
        task.cancel()
        await training
        await train(sim, 60, first=28)
        assert min(versions(sim)) >= 6
        await asyncio.sleep(2 * LINGER_S)
        for p in sim.peers.values():
            holdings = p.peer._holdings
            assert not (p.peer._donor._leases or holdings._wishes or holdings._states or holdings._means)

    simulate(test)
