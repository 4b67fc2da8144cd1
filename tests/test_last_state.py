"""A peer's own state on disk: found by whoever is started again, used only if it is of use."""

import json
import os
import time

import pytest

from averaging import virtual_time
from swarm.compute import VirtualCompute
from swarm.last_state import DESCRIPTION, FRESH_S, LastState, place_in
from tests.sim import Sim, tiny_run
from tests.test_checkpoint import stage_of


async def at_once(work):
    return work()


def last_state(folder, config) -> LastState:
    return LastState(folder, config, in_thread=at_once)


def in_time(test) -> None:
    async def main():
        await test(VirtualCompute(lambda priority: 0.001))

    virtual_time.run(main())


def test_what_was_saved_is_found_again_bit_by_bit(tmp_path):
    config = tiny_run()

    async def test(compute):
        saved = stage_of(config, 1, 3)
        for stage in (stage_of(config, 1, 2), saved):
            await last_state(tmp_path, config).save(stage, compute)
        again = stage_of(config, 1, 0)
        assert await last_state(tmp_path, config).restore(again, compute)
        assert (again.version, again.hash()) == (3, saved.hash())
        assert len(list(tmp_path.glob("*.safetensors"))) == 1, "only the newest is kept"

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
        await last_state(tmp_path, config).save(stage_of(config, 1, 3), compute)
        spoil(tmp_path)
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
        await last_state(tmp_path, config).save(stage_of(config, 1, 3), compute)
        assert not await last_state(tmp_path, config).restore(stage_of(config, 2, 0), compute)
        described = json.loads((tmp_path / DESCRIPTION).read_text())
        described["saved_at"] -= FRESH_S + 1
        (tmp_path / DESCRIPTION).write_text(json.dumps(described))
        assert not await last_state(tmp_path, config).restore(stage_of(config, 1, 0), compute)

    in_time(test)


def test_processes_of_a_run_have_places_of_their_own_and_who_is_started_again_has_the_old_one(tmp_path):
    with place_in(tmp_path, "run") as first, place_in(tmp_path, "run") as second:
        assert first != second
    with place_in(tmp_path, "run") as again:
        assert again == first


def test_what_runs_of_older_days_have_left_is_tidied_away_and_nothing_else(tmp_path):
    bystander = tmp_path / "notes.txt"
    bystander.write_text("mine")
    for run, age_s in (("old", FRESH_S + 60), ("recent", 60)):
        with place_in(tmp_path, run) as place:
            (place / DESCRIPTION).write_text("{}")
            os.utime(place / DESCRIPTION, (time.time() - age_s,) * 2)
    with place_in(tmp_path, "new"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "notes.txt", "recent"]


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with (
        caplog.at_level("WARNING", logger="swarm.last_state"),
        place_in(tmp_path / "file", "run") as place,
    ):
        assert place is None
    assert "no state will be kept" in caplog.text


def test_a_stage_whose_peers_have_all_lost_power_goes_on_from_their_disks(tmp_path):
    async def main():
        from tests.test_swarm import train

        sim = Sim(tiny_run("archive.every_steps=0"), 0)
        for stage in range(3):
            for number in range(2):
                folder = tmp_path / f"{stage}-{number}"
                folder.mkdir()
                await sim.start_peer(stage, last_state(folder, sim.config))
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        await train(sim, 60)
        victims = [p for p in sim.peers.values() if p.stage == 1]
        for victim in victims:
            sim.kill(victim.id)
        kept = json.loads((tmp_path / "1-0" / DESCRIPTION).read_text())["file"]["version"]
        assert kept > 0
        back = await sim.start_peer(1, last_state(tmp_path / "1-0", sim.config))
        await sim.until(lambda: back in sim.pipeline._heard_s, 60)
        assert sim.peers[back].peer.stage.version >= kept
        late = await sim.start_peer(1, last_state(tmp_path / "1-1", sim.config))
        await train(sim, 40, first=60)
        await sim.until(lambda: late in sim.pipeline._heard_s, 60)
        assert sim.peers[late].peer.stage.version > kept
        assert not sim.errors, sim.errors

    virtual_time.run(main())


def test_a_peer_that_is_back_at_once_transfers_nothing(tmp_path, caplog):
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
        await mine.save(sim.peers[me].peer.stage, sim.peers[me].compute)
        version = sim.peers[me].peer.stage.version
        sim.kill(me)
        with caplog.at_level("INFO", logger="swarm.state"):
            back = await sim.start_peer(1, last_state(tmp_path, sim.config))
            await sim.until(lambda: back in sim.pipeline._heard_s, 60)
        assert sim.peers[back].peer.stage.version == version
        told = [r.getMessage() for r in caplog.records]
        assert any("the same state" in line for line in told) and not any("loaded" in line for line in told)

    virtual_time.run(main())
