"""A peer's own state on disk: found by whoever is started again, used only if it is of use."""

import asyncio
import errno
import json
import os
import time

import pytest

from averaging import virtual_time
from swarm.compute import VirtualCompute
from swarm.last_state import DESCRIPTION, FRESH_S, LOCK, LastState
from tests.sim import Sim, tiny_run
from tests.test_checkpoint import stage_of


async def at_once(work):
    return work()


def last_state(folder, config) -> LastState:
    """As a process has it; one that dies is closed, as its locks end with it."""
    return LastState(folder, config, "run", in_thread=at_once)


def place(folder, stage: int = 1, number: int = 0):
    return folder / "run" / f"stage-{stage}" / str(number)


async def saved(folder, config, stage, compute) -> None:
    state = last_state(folder, config)
    await state.save(stage, compute)
    await state.close()


def in_time(test) -> None:
    async def main():
        await test(VirtualCompute(lambda priority: 0.001))

    virtual_time.run(main())


def test_what_was_saved_is_found_again_bit_by_bit(tmp_path):
    config = tiny_run()

    async def test(compute):
        newest = stage_of(config, 1, 3)
        for stage in (stage_of(config, 1, 2), newest):
            await saved(tmp_path, config, stage, compute)
        again = stage_of(config, 1, 0)
        assert await last_state(tmp_path, config).restore(again, compute)
        assert (again.version, again.hash()) == (3, newest.hash())
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1, "only the newest is kept"

    in_time(test)


def spoil_byte(folder):
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def spoil_description(folder):
    (folder / DESCRIPTION).write_text("{")


def take_away(folder):
    (path,) = folder.glob("*.safetensors")
    path.unlink()


def lead_elsewhere(folder):
    described = json.loads((folder / DESCRIPTION).read_text())
    described["file"]["name"] = "../../secret"
    (folder / DESCRIPTION).write_text(json.dumps(described))


@pytest.mark.parametrize("spoil", [spoil_byte, spoil_description, take_away, lead_elsewhere])
def test_a_damaged_one_changes_nothing_and_is_told_in_a_line(tmp_path, spoil, caplog):
    config = tiny_run()

    async def test(compute):
        await saved(tmp_path, config, stage_of(config, 1, 3), compute)
        spoil(place(tmp_path))
        fresh = stage_of(config, 1, 0)
        before = fresh.hash()
        assert not await last_state(tmp_path, config).restore(fresh, compute)
        assert (fresh.version, fresh.hash()) == (0, before)

    with caplog.at_level("WARNING", logger="swarm.last_state"):
        in_time(test)
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and "\n" not in record.getMessage()


def test_of_another_stage_or_another_day_it_is_not_used(tmp_path):
    config = tiny_run()

    async def test(compute):
        await saved(tmp_path, config, stage_of(config, 1, 3), compute)
        assert not await last_state(tmp_path, config).restore(stage_of(config, 2, 0), compute)
        path = place(tmp_path) / DESCRIPTION
        described = json.loads(path.read_text())
        described["saved_at"] -= FRESH_S + 1
        path.write_text(json.dumps(described))
        assert not await last_state(tmp_path, config).restore(stage_of(config, 1, 0), compute)

    in_time(test)


def test_processes_that_start_in_another_order_find_what_their_stages_have_left(tmp_path):
    config = tiny_run()

    async def test(compute):
        first, second, third = (last_state(tmp_path, config) for _ in range(3))
        for state, number, step in ((first, 0, 3), (second, 1, 4), (third, 1, 5)):
            await state.save(stage_of(config, number, step), compute)
        for state in (first, second, third):
            await state.close()
        living = [last_state(tmp_path, config) for _ in range(3)]
        for state, number, step in zip(living, (1, 1, 0), (5, 4, 3), strict=True):  # the newest first
            again = stage_of(config, number, 0)
            assert await state.restore(again, compute)
            assert again.version == step

    in_time(test)


def test_what_other_runs_of_older_days_have_left_is_tidied_away_and_nothing_else(tmp_path):
    config = tiny_run()
    (tmp_path / "notes.txt").write_text("mine")

    async def test(compute):
        living = LastState(tmp_path, config, "living", in_thread=at_once)
        for state in (
            living,
            *(LastState(tmp_path, config, run, in_thread=at_once) for run in ("old", "new")),
        ):
            await state.save(stage_of(config, 1, 1), compute)
            if state is not living:
                await state.close()
        for run in ("old", "living"):
            for path in (tmp_path / run / "stage-1" / "0").iterdir():
                os.utime(path, (time.time() - FRESH_S - 60,) * 2)
        await last_state(tmp_path, config).restore(stage_of(config, 1, 0), compute)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["living", "new", "notes.txt", "run"]
        assert (tmp_path / "living" / "stage-1" / "0" / LOCK).exists()

    in_time(test)


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    config = tiny_run()

    async def test(compute):
        state = last_state(tmp_path / "file", config)
        assert not await state.restore(stage_of(config, 1, 0), compute)
        await state.save(stage_of(config, 1, 1), compute)

    with caplog.at_level("WARNING", logger="swarm.last_state"):
        in_time(test)
    assert "cannot be used" in caplog.messages[0] and "no state is kept for a restart" in caplog.messages[1]


def test_a_disk_that_is_full_keeps_what_was_there_and_no_half_of_a_file(tmp_path, monkeypatch):
    config = tiny_run()

    async def test(compute):
        await saved(tmp_path, config, stage_of(config, 1, 3), compute)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("swarm.checkpoint.os.fsync", full)
            await saved(tmp_path, config, stage_of(config, 1, 4), compute)
        assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["3.safetensors"]
        again = stage_of(config, 1, 0)
        assert await last_state(tmp_path, config).restore(again, compute) and again.version == 3

    in_time(test)


def version_on(disk) -> int:
    found = json.loads((place(disk) / DESCRIPTION).read_text())["file"]
    return found["version"]


def test_a_stage_whose_peers_have_all_lost_power_goes_on_from_the_newest_of_their_disks(tmp_path):
    """Also if the one with an old state is back first."""

    async def main():
        from tests.test_swarm import train

        sim = Sim(tiny_run("archive.every_steps=0"), 0)
        for stage in (0, 0, 2, 2):
            await sim.start_peer(stage)
        often = LastState(tmp_path / "often", sim.config, "run", every_s=0, in_thread=at_once)
        once = LastState(tmp_path / "once", sim.config, "run", every_s=1e9, in_thread=at_once)
        victims = [await sim.start_peer(1, state) for state in (often, once)]
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        await train(sim, 60)
        newest = max(sim.peers[victim].peer.stage.version for victim in victims)
        await often.save(sim.peers[victims[0]].peer.stage, sim.peers[victims[0]].compute)
        for victim in victims:
            sim.kill(victim)
        for state in (often, once):
            await state.close()
        assert version_on(tmp_path / "once") == 1 < newest - 1 <= version_on(tmp_path / "often")
        first = await sim.start_peer(1, last_state(tmp_path / "once", sim.config))
        await asyncio.sleep(0.5)
        second = await sim.start_peer(1, last_state(tmp_path / "often", sim.config))
        await sim.until(lambda: all(p in sim.pipeline.hearing for p in (first, second)), 90)
        assert min(sim.peers[peer].peer.stage.version for peer in (first, second)) >= newest - 1
        await train(sim, 40, first=60)
        assert not sim.errors, sim.errors

    virtual_time.run(main())


def test_a_peer_that_is_back_before_the_next_step_transfers_nothing(tmp_path, caplog):
    """It was asked to leave, and saves what it has when it does."""

    async def main():
        from tests.test_swarm import train

        sim = Sim(tiny_run("archive.every_steps=0"), 0)
        for stage in range(3):
            for _ in range(2):
                await sim.start_peer(stage)
        mine = last_state(tmp_path, sim.config)
        me = await sim.start_peer(1, mine)
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        await train(sim, 60)
        left = sim.peers[me].peer.stage
        await sim.terminate(me)
        await mine.close()
        with caplog.at_level("INFO", logger="swarm.state"):
            back = await sim.start_peer(1, last_state(tmp_path, sim.config))
            await sim.until(lambda: back in sim.pipeline.hearing, 60)
        assert sim.peers[back].peer.stage.version == left.version
        told = [r.getMessage() for r in caplog.records]
        assert any("the same state" in line for line in told) and not any("loaded" in line for line in told)

    virtual_time.run(main())
