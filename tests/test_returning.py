"""An organizer that is started again: what it finds of its run."""

import asyncio

import pytest
import uvloop

from averaging import virtual_time
from averaging.errors import LinkError
from swarm.directory import MemoryDirectory
from swarm.launch import NOBODY, Living
from swarm.monitor import Monitor
from swarm.records import PeerRecord
from swarm.returning import HEARD_S, REMEMBERED, port_before, read_addresses, remember_peers, who_lives
from tests.sim import tiny_run

PEERS = [(f"{stage}{letter}", stage) for stage in range(3) for letter in "ab"]
TRAINER = {"kind": "trainer", "step": 50, "evaluations": [], "recoveries": [], "counters": {}, "tokens": 1}
RUN = ("local.peers_per_stage=2", "network.announce_s=4", "network.expire_s=16")


class Shaky(MemoryDirectory):
    """Of a DHT whose nodes have died: every read takes `read_s`, and most of them fail."""

    read_s, fails = 0.0, 0

    async def roster(self, stage):
        await asyncio.sleep(self.read_s)
        self.fails -= 1
        if self.fails >= 0:
            raise LinkError("dht", "nobody answers")
        return await super().roster(stage)


def look(tmp_path, arrivals, heard_s, *more, read_s=0.0, fails=0):
    """(peers by stage, trainers, seconds waited); the record of `PEERS[i]` is found after `arrivals[i]` s."""

    async def main():
        time_s = asyncio.get_running_loop().time
        directory, monitor = Shaky(time_s, expire_s=60.0), Monitor(tiny_run(*RUN, *more), tmp_path)
        directory.read_s, directory.fails = read_s, fails

        async def announce(at_s, peer, stage):
            await asyncio.sleep(at_s)
            await directory.announce(PeerRecord(peer=peer, stage=stage, loading=peer == "0b"))

        async def report(at_s):
            await asyncio.sleep(at_s)
            monitor.take("trainer", TRAINER)

        coming = [announce(at_s, *peer) for at_s, peer in zip(arrivals, PEERS, strict=False)]
        helper = PeerRecord(peer="trainer", stage=0, aggregates_only=True)
        await directory.announce(helper)
        tasks = [asyncio.ensure_future(task) for task in [*coming, *([report(heard_s)] if heard_s else [])]]
        living = await who_lives(directory, monitor)
        waited_s = time_s()
        for task in tasks:
            task.cancel()
        return [len(names) for names in living.peers.values()], living.trainers, waited_s

    return virtual_time.run(main())


def test_peers_that_are_found_only_when_they_announce_themselves_again_are_not_started_twice(tmp_path):
    peers, trainers, waited_s = look(tmp_path, [0.0, 3.9, 0.0, 2.0, 3.0, 1.0], heard_s=1.0)
    assert (peers, trainers) == ([2, 2, 2], 1) and waited_s < 5


def test_an_organizer_whose_run_is_whole_does_not_wait(tmp_path):
    peers, trainers, waited_s = look(tmp_path, [0.0] * 6, heard_s=0.1)
    assert (peers, trainers) == ([2, 2, 2], 1) and waited_s < 1


def test_peers_that_have_died_are_not_waited_for_longer_than_it_takes_to_know(tmp_path):
    peers, _, waited_s = look(tmp_path, [0.0] * 5, heard_s=1.0)
    assert peers == [2, 2, 1] and 4 < waited_s < 8


def test_a_trainer_that_has_died_is_not_waited_for_longer_than_it_may_be_silent(tmp_path):
    peers, trainers, waited_s = look(tmp_path, [0.0] * 6, heard_s=None)
    assert (peers, trainers) == ([2, 2, 2], 0) and HEARD_S < waited_s < HEARD_S + 1
    assert look(tmp_path, [0.0] * 6, None, "local.trainers=0")[2] < 1


def test_reads_that_fail_do_not_end_a_run_that_lives(tmp_path):
    peers, trainers, waited_s = look(tmp_path, [0.0] * 6, heard_s=0.1, fails=5)
    assert (peers, trainers) == ([2, 2, 2], 1) and waited_s < 3
    peers, trainers, waited_s = look(tmp_path, [0.0] * 6, heard_s=0.1, fails=10**9)
    assert (peers, trainers) == ([0, 0, 0], 1) and 4 < waited_s < 8


def test_who_announces_itself_in_time_is_found_although_reads_are_slow(tmp_path):
    peers, trainers, _ = look(tmp_path, [5.0] * 6, heard_s=1.0, read_s=2.5)
    assert (peers, trainers) == ([2, 2, 2], 1)


def test_peers_are_remembered_at_their_address_in_the_network_and_in_their_own_machine(tmp_path):
    loopback, local = "/ip4/127.0.0.1/tcp/7/p2p/Qm{}", "/ip4/10.0.0.9/tcp/7/p2p/Qm{}"

    async def main():
        directory = MemoryDirectory(asyncio.get_running_loop().time, expire_s=60.0)
        for number in range(100):
            addresses = (loopback.format(number), local.format(number))
            await directory.announce(PeerRecord(peer=f"Qm{number}", stage=0, addresses=addresses))
        await directory.announce(PeerRecord(peer="bare", stage=0))
        remembering = asyncio.create_task(remember_peers(directory, 1, tmp_path / "peers"))
        async with asyncio.timeout(60):
            while not (found := read_addresses(tmp_path / "peers")):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        remembering.cancel()
        assert found[0] == local.format(0) and loopback.format(0) in found and len(found) == 2 * REMEMBERED

    uvloop.run(main())


def test_peers_that_are_started_anew_take_no_name_of_those_who_live():
    living = Living({0: ["peer-2"], 1: ["peer-7", "a volunteer's", "peer-x"]}, 1)
    assert living.next_peer == 8 and NOBODY.next_peer == 0


@pytest.mark.parametrize(
    "written",
    ["", "nonsense", None, "/ip4/1.1.1.1/tcp/99999/p2p/Qm", "/ip4/1.1.1.1/tcp/1/p2p/Qm/p2p-circuit/p2p/Qm"],
)
def test_the_port_of_before_is_that_of_the_address_that_was_written_down(tmp_path, written):
    path = tmp_path / "address"
    path.write_text("/ip4/192.168.0.7/tcp/31337/p2p/QmSADob8Y7A7McCMhCS4VVhVo3vPNRieJXn5j3GLjEYS3V\n")
    assert port_before(path) == 31337
    path.unlink() if written is None else path.write_text(f"{written}\n")
    assert port_before(path) == 0
