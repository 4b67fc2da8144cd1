"""Give and take: of two groupmates that send each other parts, neither runs far ahead of the other.

Over a slow link what one sends delays the acknowledgements of what the other sends. Whoever gets ahead
starves the other one, then has sent all its parts, and its own link lies idle while it waits for the late
ones: without this, averaging takes a third longer than the links allow (log, 2026-11-22).

Threading: one event loop.
"""

import asyncio

AHEAD = 2  # pieces: one under way in each direction


class Pace:
    """How much of its parts one groupmate has given."""

    def __init__(self, pieces: int) -> None:
        """`pieces` is how many parts it has to give."""
        self._pieces, self._given = pieces, 0
        self._moved = asyncio.Event()

    def step(self) -> None:
        """One more has come."""
        self._given += 1
        self._moved.set()

    def release(self) -> None:
        """No more will come, or there is no need to wait for it."""
        self._given = self._pieces
        self._moved.set()

    async def allows(self, sent: int, of: int) -> None:
        """Wait until whoever has sent it so many `of` its own pieces may send one more."""
        while self._given < self._pieces and self._given * of < (sent - AHEAD) * self._pieces:
            self._moved.clear()
            await self._moved.wait()
