"""The event loop whose clock jumps."""

import asyncio

import pytest

from averaging import virtual_time


def test_timers_of_one_time_fire_as_they_were_set():
    async def test():
        loop, fired = asyncio.get_running_loop(), []
        for number in range(5):
            loop.call_at(3600.0, fired.append, number)
        await asyncio.sleep(3600)
        assert fired == [0, 1, 2, 3, 4] and loop.time() == 3600

    virtual_time.run(test())


def test_waiting_for_what_cannot_come_is_an_error():
    with pytest.raises(virtual_time.DeadlockError):
        virtual_time.run(asyncio.Event().wait())


def test_what_a_look_between_two_moments_raises_ends_the_run_and_is_not_hidden_by_its_end():
    async def test():
        def look() -> None:
            raise AssertionError("an invariant is broken")

        asyncio.get_running_loop().before_each_jump(look)
        await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="an invariant is broken"):
        virtual_time.run(test())
