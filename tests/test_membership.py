"""A peer's place on the roster."""

import asyncio

from averaging import virtual_time
from swarm.directory import MemoryDirectory
from swarm.membership import KNOWN_PERIODS, Membership
from swarm.records import PeerRecord


class SlowDirectory(MemoryDirectory):
    """Every call takes 3 s, as when a node of the DHT does not answer."""

    async def announce(self, record: PeerRecord) -> None:
        await asyncio.sleep(3.0)
        await super().announce(record)

    async def roster(self, stage: int) -> list[PeerRecord]:
        await asyncio.sleep(3.0)
        return await super().roster(stage)


def test_a_record_is_renewed_as_often_although_calls_are_slow():
    async def main() -> None:
        time_s = asyncio.get_running_loop().time
        directory = SlowDirectory(time_s, expire_s=8.0)
        own = PeerRecord(peer="me", stage=0)
        member = Membership(directory, own, progress=lambda: (0, 0.0, 0), period_s=4.0)
        await member.enter()
        keeping = asyncio.create_task(member.keep())
        for _ in range(100):
            await asyncio.sleep(1.0)
            assert await MemoryDirectory.roster(directory, 0), f"gone at {time_s()} s"
        keeping.cancel()

    virtual_time.run(main())


def test_who_came_a_moment_ago_is_a_newcomer_to_who_was_there_and_to_itself():
    async def main() -> None:
        time_s = asyncio.get_running_loop().time
        directory = MemoryDirectory(time_s, expire_s=8.0)

        async def enter(name: str) -> Membership:
            own = PeerRecord(peer=name, stage=0)
            member = Membership(directory, own, progress=lambda: (0, 0.0, 0), period_s=1.0)
            await member.enter()
            return member

        first = await enter("first")
        assert first.newcomers() == []
        await asyncio.sleep(5.0)
        late = await enter("late")
        await first.read()
        assert (first.newcomers(), late.newcomers()) == (["late"], ["late"])
        await asyncio.sleep(KNOWN_PERIODS + 0.1)
        assert (first.newcomers(), late.newcomers()) == ([], [])

    virtual_time.run(main())
