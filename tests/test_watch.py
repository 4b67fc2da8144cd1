"""What a peer believes of what its trainers say about its mates."""

import asyncio

from averaging import virtual_time
from averaging.memory_network import MemoryHub
from swarm import swarm_pb2 as pb
from swarm.config import NetworkConfig
from swarm.watch import SERVICE, SILENT_BEATS, Session, Watchers

NOW_S = 1000.0


class Told:
    """A peer's watchers, whose trainers said something so many seconds ago."""

    def __init__(self, **ago_s: float) -> None:
        self.now_s = NOW_S
        self.settings = NetworkConfig()
        self.hub = MemoryHub()
        self.watchers = Watchers(
            self.hub.network("me"),
            self.settings,
            clock=lambda: self.now_s,
            status=lambda: (0, 0),
            history=list,
            on_end=lambda session: None,
        )
        for name, ago in ago_s.items():
            session = Session(name, b"12345678", NOW_S + 1, said_s=NOW_S - ago)
            self.watchers._sessions[name, b"12345678"] = session

    def __getitem__(self, trainer: str) -> Session:
        return self.watchers._sessions[trainer, b"12345678"]

    def lose(self, trainer: str) -> None:
        self.now_s = NOW_S + 2  # its lease is over
        self.watchers._expire(self[trainer])


def test_a_mate_is_silent_only_if_all_trainers_say_so_and_all_are_heard():
    told = Told(t=0.1, u=0.2)
    told["t"].silent, told["u"].silent = frozenset({"a", "b"}), frozenset({"b", "c"})
    assert told.watchers.silent() == {"b"}
    told["u"].said_s -= SILENT_BEATS * told.settings.heartbeat_s
    assert told.watchers.silent() == frozenset(), "what it hears by now is not known"
    assert Told().watchers.silent() == frozenset()


def test_after_a_trainer_is_lost_nobody_counts_as_silent_for_as_long_as_records_live():
    told = Told(t=-1.9, u=0.0)
    told["t"].silent = frozenset({"b"})
    told.lose("u")
    assert told.watchers.hear_this() and told.watchers.silent() == frozenset()
    told.now_s += told.settings.expire_s
    told["t"].said_s = told.now_s
    assert told.watchers.silent() == {"b"}


def test_a_trainer_that_was_lost_and_is_back_is_believed_at_once():
    async def test():
        told = Told(t=0.0)
        told.lose("t")
        assert told.watchers._lost_lately
        await told.watchers.start()
        told.watchers.ready()
        stream = await told.hub.network("t").open("me", SERVICE)
        await stream.send(pb.WatchPing(session=b"another1", fresh=True).SerializeToString())
        beat = pb.WatchFrame.FromString((await stream.receive()).header).heartbeat
        assert told.watchers.silent() == frozenset(), "it has said nothing yet"
        echo = pb.WatchPing(session=b"another1", echo_s=beat.sent_at_s, silent=["b"])
        await stream.send(echo.SerializeToString())
        await asyncio.sleep(0.1)
        assert told.watchers.hear_this() and told.watchers.silent() == {"b"}
        await stream.finish()

    virtual_time.run(test())


def test_a_peer_is_heard_if_some_trainer_answers_or_none_was_there():
    assert Told().watchers.hear_this() and Told(t=0.1, u=9.0).watchers.hear_this()
    assert not Told(t=SILENT_BEATS).watchers.hear_this()
    told = Told(t=9.0)
    told.lose("t")
    assert not told.watchers.hear_this()
    said_goodbye = Told(t=0.1)
    said_goodbye["t"].goodbye = True
    said_goodbye.lose("t")
    assert said_goodbye.watchers.hear_this()


def test_a_peer_knows_for_how_long_it_has_been_heard():
    async def test():
        told = Told(t=0.1)
        await told.watchers.start()
        told.watchers.ready()
        stream = await told.hub.network("t").open("me", SERVICE)

        async def echo() -> None:
            ping = pb.WatchPing(session=b"12345678", echo_s=told.now_s)
            await stream.send(ping.SerializeToString())
            await asyncio.sleep(0.1)

        await echo()
        for _ in range(5):
            told.now_s += told.settings.heartbeat_s
            await echo()
        assert told.watchers.heard_for_s() == float("inf"), "never was there a break"
        told.now_s += SILENT_BEATS * told.settings.heartbeat_s
        await echo()
        assert told.watchers.heard_for_s() == 0.0
        told.now_s += told.settings.heartbeat_s
        assert told.watchers.heard_for_s() == told.settings.heartbeat_s
        told.now_s += SILENT_BEATS * told.settings.heartbeat_s
        assert told.watchers.heard_for_s() == 0.0, "nobody hears it"
        told["t"].lease_until_s = told.now_s
        stream.abort()
        await asyncio.sleep(0.1)
        told.now_s += told.settings.expire_s
        assert told.watchers.hear_this() and told.watchers.heard_for_s() == told.settings.expire_s

    virtual_time.run(test())


def test_one_trainer_alone_cannot_say_that_the_stage_is_further():
    told = Told(t=0.1, u=0.1)
    told["t"].version, told["u"].version = 1 << 60, 7
    assert told.watchers.version() == 7
    assert Told(t=9.0).watchers.version() == 0
