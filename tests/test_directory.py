"""The directory on the real DHT: what is found there, and what strangers cannot do to it."""

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest
import uvloop
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, PeerID
from hivemind.utils.crypto import RSAPrivateKey
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from averaging.daemon import start_daemon
from averaging.errors import LinkError
from swarm.config import dump_run
from swarm.dht import MAX_RECORD_BYTES, RUN_KEY, RUN_KEY_BYTES, OwnedRecords
from swarm.errors import RunMismatchError
from swarm.manifest import pack_manifest
from swarm.nodes import MOST_DIALS
from swarm.process import joined
from swarm.records import PeerRecord, parse_record
from tests.sim import tiny_run

pytestmark = pytest.mark.real


def test_a_peer_of_any_stage_is_found_by_its_record(monkeypatch):
    monkeypatch.setattr("swarm.dht.LOOK_AGAIN_S", 0.0)

    async def main():
        run = tiny_run()
        async with joined([]) as a, joined([a.addresses[0]]) as b:
            await a.directory.publish_manifest(pack_manifest(dump_run(run)))
            for here in (a, b):
                await here.directory.manifest()
            record = PeerRecord(peer=b.network.peer_id, stage=2, addresses=b.addresses, announced_s=0.0)
            assert await a.directory.addresses(b.network.peer_id) == ()
            await b.directory.announce(record)
            assert await a.directory.addresses(b.network.peer_id) == b.addresses
            moved = ("/ip4/10.0.0.1/tcp/31337",)
            await b.directory.announce(record.model_copy(update={"addresses": moved}))
            a.directory._read = {stage: (at - 3600, read) for stage, (at, read) in a.directory._read.items()}
            assert await a.directory.addresses(b.network.peer_id) == moved

    uvloop.run(main())


def test_one_read_answers_all_who_look_for_peers_that_are_not_there(monkeypatch):
    monkeypatch.setattr("swarm.dht.LOOK_AGAIN_S", 60.0)

    async def main():
        async with joined([]) as here:
            await here.directory.publish_manifest(pack_manifest(dump_run(tiny_run())))
            await here.directory.manifest()
            reads, roster = [], here.directory.roster

            def counted(stage):
                reads.append(stage)
                return roster(stage)

            monkeypatch.setattr(here.directory, "roster", counted)
            looked = await asyncio.gather(*(here.directory.addresses(f"nobody{i}") for i in range(20)))
            assert looked == [()] * 20 and sorted(reads) == [0, 1, 2]

    uvloop.run(main())


def test_who_reaches_nobody_is_told_so_and_finds_the_others_when_they_answer_again():
    async def main():
        async with joined([]) as organizer, joined([organizer.addresses[0] + "/"]) as peer:
            await organizer.directory.publish_manifest(pack_manifest(dump_run(tiny_run())))
            for here in (organizer, peer):
                await here.directory.manifest()
            peer.directory._node.protocol.wait_timeout = 0.5
            record = PeerRecord(peer=peer.network.peer_id, stage=1, addresses=peer.addresses, announced_s=0.0)
            daemon = organizer.network._p2p._child
            daemon.send_signal(signal.SIGSTOP)
            try:
                with pytest.raises(LinkError, match="nobody answers"):
                    await peer.directory.roster(1)  # not: nobody is there
                with pytest.raises(LinkError, match="nobody answers"):
                    await peer.directory.announce(record)
            finally:
                daemon.send_signal(signal.SIGCONT)
            peer.directory._node.protocol.wait_timeout = 3.0
            await peer.directory.announce(record)
            assert [found.peer for found in await organizer.directory.roster(1)] == [record.peer]

    uvloop.run(main())


def test_a_read_in_which_nobody_answered_is_none_although_more_nodes_are_known():
    async def main():
        async with joined([]) as organizer, joined([organizer.addresses[0]]) as peer:
            node = peer.directory._node
            table = node.protocol.routing_table
            for number in range(40):  # more than one read asks
                dead = PeerID(bytes([18, 32, *[number] * 32]))
                table.add_or_update_node(DHTID(number + 1), dead)
            node.protocol.wait_timeout = 0.3
            daemon = organizer.network._p2p._child
            daemon.send_signal(signal.SIGSTOP)
            try:
                while table.peer_id_to_uid:
                    with pytest.raises(LinkError):
                        await peer.directory.roster(1)
            finally:
                daemon.send_signal(signal.SIGCONT)
            node.protocol.wait_timeout = 3.0
            assert await peer.directory.roster(1) == []

    uvloop.run(main())


def test_nodes_that_were_forgotten_although_they_answer_are_asked_again():
    async def main():
        async with joined([]) as organizer:
            at_organizer = [organizer.addresses[0]]
            async with joined(at_organizer) as first, joined(at_organizer) as second:
                node = second.directory._node
                table, forgotten = node.protocol.routing_table, first.network._p2p.peer_id
                assert await second.directory.roster(1) == []
                assert forgotten in table.peer_id_to_uid
                del table[table.peer_id_to_uid[forgotten]]
                node.blacklist.register_failure(forgotten)  # as after its answer was not heard
                assert await second.directory.roster(1) == []
                assert forgotten in table.peer_id_to_uid and forgotten not in node.blacklist

    uvloop.run(main())


def test_peers_still_find_each_other_when_the_only_node_that_they_had_in_common_dies(monkeypatch):
    monkeypatch.setitem(P2P.DHT_MODE_MAPPING, "server", {})  # the daemons find nobody by themselves

    async def main():
        async with AsyncExitStack() as living:
            organizer = await living.enter_async_context(joined([]))
            peers = [await living.enter_async_context(joined([organizer.addresses[0]])) for _ in range(3)]

            async def announce_all():
                for peer in peers:
                    record = PeerRecord(peer=peer.network.peer_id, stage=1, addresses=peer.addresses)
                    await peer.directory.announce(record)

            await announce_all()
            for peer in peers:
                await peer.directory.roster(1)  # as a peer does when it comes, and then every few seconds
            async with asyncio.timeout(10):
                for peer in peers:
                    await asyncio.gather(*peer.directory._nodes._dials)
            organizer.network._p2p._child.kill()
            await announce_all()
            for peer in peers:
                assert len(await peer.directory.roster(1)) == 3
            async with joined([peers[2].addresses[0]]) as late:
                assert len(await late.directory.roster(1)) == 3

    uvloop.run(main())


def test_an_address_where_nobody_is_or_that_is_none_is_not_dialled_at_every_read():
    async def main():
        async with joined([]) as here:
            dead = {f"Qm{letter * 44}": ["/ip4/127.0.0.1/tcp/1"] for letter in "abcdefghijkm"}
            nodes = here.directory._nodes
            nodes.introduce({**dead, "nonsense": ["nonsense"], "nowhere": []})
            nodes.introduce(dead)
            assert len(nodes._dials) == MOST_DIALS
            async with asyncio.timeout(10):
                assert not any(await asyncio.gather(*nodes._dials))
            nodes.introduce(dead)
            assert len(nodes._dials) <= len(dead) + 1 - MOST_DIALS

    uvloop.run(main())


def test_a_record_with_long_addresses_still_fits():
    addresses = tuple(
        f"/ip4/10.0.0.{n}/tcp/31337/p2p/{'Q' * 46}/p2p-circuit/p2p/{'Z' * 46}" for n in range(8)
    )
    record = PeerRecord(peer="Z" * 46, stage=1, addresses=addresses, name="a" * 64, announced_s=1.0)
    read = parse_record(record.pack(), owner=record.peer)
    assert len(read.addresses) >= 4 and read.addresses == addresses[: len(read.addresses)]


def test_of_two_runs_the_joined_organizers_is_taken():
    async def main():
        async with joined([]) as organizer:
            at_organizer = organizer.addresses[0]
            async with joined([at_organizer]) as rival, joined([at_organizer]) as peer:
                at_peer = peer.addresses[0]
                await organizer.directory.publish_manifest(pack_manifest(dump_run(tiny_run("name=ours"))))
                await rival.directory.publish_manifest(pack_manifest(dump_run(tiny_run("name=theirs"))))
                assert (await peer.directory.manifest()).config.name == "ours"
                async with joined([at_peer]) as late:
                    with pytest.raises(RunMismatchError, match="several runs"):
                        await late.directory.manifest()

    uvloop.run(main())


def test_a_strangers_plain_value_does_not_hide_the_records(tmp_path):
    async def main():
        async with joined([]) as organizer:
            await organizer.directory.publish_manifest(pack_manifest(dump_run(tiny_run())))
            address = organizer.addresses[0]
            daemon = await start_daemon(join=[address], identity=tmp_path / "identity")
            stranger = await DHTNode.create(p2p=daemon, initial_peers=[address])
            try:
                stored = await stranger.store(RUN_KEY, b"mine", get_dht_time() + 1e6, exclude_self=True)
                assert not stored
                assert (await organizer.directory.manifest()).config.name == "tiny"
            finally:
                await stranger.shutdown()
                await daemon.shutdown()

    uvloop.run(main())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        (b"stage", MSGPackSerializer.dumps(b"a record"), True),
        (b"stage", b"\xc1", False),  # no MessagePack begins like this: reading it would never end
        (b"stage", MSGPackSerializer.dumps({"a": 1}), False),
        (b"stage", MSGPackSerializer.dumps(b"x" * (MAX_RECORD_BYTES + 2000)), False),
        (RUN_KEY_BYTES, MSGPackSerializer.dumps(b"x" * (MAX_RECORD_BYTES + 2000)), True),
    ],
)
def test_only_short_bytes_with_their_owners_signature_enter_the_dht(key, value, allowed):
    owner = OwnedRecords(RSAPrivateKey())
    record = DHTRecord(key, owner.local_public_key, value, get_dht_time() + 10)
    signed = DHTRecord(key, record.subkey, owner.sign_value(record), record.expiration_time)
    reader = OwnedRecords(RSAPrivateKey())
    assert reader.validate(signed) == allowed
    assert not reader.validate(record), "without a signature"
    assert not reader.validate(DHTRecord(key, b"[owner:nonsense]", signed.value, record.expiration_time))
