"""What a newcomer asks one donor for, and what it answers: offers, and chunks of what it has offered.

What comes from a donor is checked here: that it was asked for, that its size makes sense, and that every
chunk has the hash which was announced.

I/O: one stream; one event loop.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError

from averaging.errors import AveragingError, LinkError, ProtocolError
from averaging.network import Buffer, Stream, kept_alive
from swarm import swarm_pb2 as pb
from swarm.chunks import Contents, Download
from swarm.donor import SILENCE_S
from swarm.holdings import Name
from swarm.squeezing import unsqueezed

WISH_S = 4 * 3600.0  # for a state at a version that is yet to come; a donor that is gone is noticed sooner
ANSWER_S = 300.0  # for an offer, and for each chunk; who is not heard at all is given up much sooner
ALLOWANCE_BYTES = 16 << 20  # for names, shapes and the history of microbatches
VECTORS = 4  # of parameters, moments, and parameters before the last step
ALIVE = pb.FromNewcomer(alive=True).SerializeToString()


class Part(Protocol):
    """What a state is of: a stage with so many parameters."""

    @property
    def stage(self) -> int: ...

    @property
    def values(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """What a donor has of what it was asked for."""

    name: Name
    contents: Contents


class NothingError(AveragingError):
    """The donor, which is at `version`, has nothing of what it was asked for; it may have later."""

    def __init__(self, what: str, *, version: int) -> None:
        super().__init__(what)
        self.version = version


class Source:
    """A donor as a newcomer sees it: a stream, open for as long as something may be wanted of it."""

    def __init__(self, stream: Stream, part: Part, changed: Callable[[], None]) -> None:
        self.peer, self._stream, self._part, self._changed = stream.remote, stream, part, changed
        self.error: AveragingError | None = None
        self.offered: Offer | None = None  # last
        self.download: tuple[Name, Download] | None = None  # what its chunks are for
        self.owed: set[tuple[Name, int]] = set()
        self.heard_s = 0.0  # when it last sent a chunk, or was asked for the first
        self._offers: asyncio.Queue[tuple[pb.StateOffer, Buffer]] = asyncio.Queue(1)
        self._tasks = [asyncio.create_task(self._read())]

    @property
    def superseded(self) -> bool:
        """Has a better way to the donor been found since?"""
        return self._stream.superseded

    async def ask(self, step: int | None = None, *, begun: int | None = None, at: int | None = None) -> Offer:
        """What it has: the mean that closed `step`, or a state, of version `begun` or its newest, or the one
        `at` a version, as soon as that is reached.

        Raises:
            NothingError: it does not have that.
            AveragingError: it did not answer, or what it said makes no sense.
        """
        ask = pb.StateAsk(stage=self._part.stage, step=step, begun=begun, at=at)
        message, limit_s = pb.FromNewcomer(ask=ask), ANSWER_S if at is None else WISH_S
        try:
            async with asyncio.timeout(limit_s):
                await self._stream.send(message.SerializeToString())
                if len(self._tasks) == 1:
                    self._tasks.append(asyncio.create_task(self._beat()))
                offer, packed = await self._offer()
        except TimeoutError:
            raise LinkError(self.peer, f"no offer within {limit_s:.0f} s") from None
        if offer.busy:
            raise LinkError(self.peer, "gives its state to others at the moment")
        if not offer.size_bytes:
            what = f"{self.peer[-8:]} has nothing to give at version {offer.version}"
            raise NothingError(what, version=offer.version)
        if step is not None and offer.number != step:
            raise ProtocolError(self.peer, f"offers step {offer.number}, asked for {step}")
        if at is not None and offer.number != at:
            raise ProtocolError(self.peer, f"offers version {offer.number}, asked for {at}")
        vectors = VECTORS if step is None else 1
        most_bytes = vectors * 4 * self._part.values + ALLOWANCE_BYTES
        contents = Contents.unpack(offer.size_bytes, packed, donor=self.peer, most_bytes=most_bytes)
        self.offered = Offer((step is not None, offer.number), contents)
        return self.offered

    async def _offer(self) -> tuple[pb.StateOffer, Buffer]:
        answer = asyncio.ensure_future(self._offers.get())
        try:
            await asyncio.wait([answer, self._tasks[0]], return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
        finally:
            answer.cancel()
        raise self.error or LinkError(self.peer, "is gone")

    async def want(self, name: Name, index: int) -> None:
        """Ask for a chunk; it comes to `download`. Raises LinkError."""
        if not self.owed:
            self.heard_s = asyncio.get_running_loop().time()
        self.owed.add((name, index))
        chunk = pb.StateChunk(mean=name[0], number=name[1], index=index)
        await self._stream.send(pb.FromNewcomer(chunk=chunk).SerializeToString())

    async def say_coming(self) -> None:
        """Let it tell the trainers to look at the roster. Raises LinkError."""
        await self._stream.send(pb.FromNewcomer(coming=True).SerializeToString())

    async def _beat(self) -> None:
        async with kept_alive(self._stream, ALIVE, SILENCE_S):
            await asyncio.get_running_loop().create_future()

    async def _read(self) -> None:
        try:
            while True:
                frame = await self._stream.receive(SILENCE_S)
                if frame is None:
                    raise LinkError(self.peer, "has closed the stream")
                self._take(pb.FromDonor.FromString(frame.header), frame.payload)
        except DecodeError:
            self.error = ProtocolError(self.peer, "malformed message of a donor")
        except AveragingError as error:
            self.error = error
        self._changed()

    def _take(self, message: pb.FromDonor, payload: Buffer) -> None:
        match message.WhichOneof("content"):
            case "offer":
                if self._offers.full():
                    raise ProtocolError(self.peer, "makes offers that nobody asked for")
                self._offers.put_nowait((message.offer, payload))
            case "chunk":
                name, index = (message.chunk.mean, message.chunk.number), message.chunk.index
                if (name, index) not in self.owed:
                    raise ProtocolError(self.peer, f"sends chunk {index} of {name}, which nobody asked for")
                self.owed.discard((name, index))
                self.heard_s = asyncio.get_running_loop().time()
                if self.download is not None and self.download[0] == name:
                    self._fill(self.download[1], index, payload, squeezed=message.chunk.squeezed)
                self._changed()

    def _fill(self, download: Download, index: int, payload: Buffer, *, squeezed: bool) -> None:
        try:
            chunk = unsqueezed(payload, download.contents.chunk_bytes(index)) if squeezed else payload
        except ValueError as error:
            raise ProtocolError(self.peer, f"chunk {index}: {error}") from None
        download.take(self.peer, index, chunk)

    def close(self) -> None:
        """Break off: it keeps for a while what was begun."""
        for task in self._tasks:
            task.cancel()
        self._stream.abort()

    async def finish(self) -> None:
        """Need nothing more of it."""
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(LinkError):
            await self._stream.finish()
        self._stream.abort()
