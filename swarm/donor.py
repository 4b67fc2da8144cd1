"""Giving a stage's state to newcomers, and after it the mean gradients they have missed meanwhile.

Both go in chunks, whose hashes come first; newcomers take chunks of the same object from several donors. What
is given may use a share of the uplink only: the rest is for training.

I/O: one event loop.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from averaging.bandwidth import UplinkMeter
from averaging.errors import LinkError, ProtocolError
from averaging.network import Network, PeerId, Stream, kept_alive
from swarm import swarm_pb2 as pb
from swarm.chunks import chunk_of
from swarm.holdings import Given, Holdings
from swarm.squeezing import squeezed

SERVICE = "state"
SILENCE_S = 10.0  # after which the other end counts as lost
LINGER_S = 30.0  # that it may take to come back, and go on where it was
LEASES = 8  # newcomers at once
MOST_TOLD = 4  # that a newcomer comes
NEVER = 1 << 62  # the first step whose mean it may want
ALIVE = pb.FromDonor(alive=True).SerializeToString()
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Lease:
    """What a newcomer may still want."""

    stream: Stream
    since: int  # means from this step on
    given: Given | None = None
    told: int = 0  # how often the trainers were, that it comes


class Donor:
    """Gives what this peer has, while it has anything."""

    def __init__(
        self,
        network: Network,
        holdings: Holdings,
        *,
        upload_share: float,
        uplink: UplinkMeter,
        on_coming: Callable[[], None] = lambda: None,
    ) -> None:
        """Newcomers together get at most `upload_share` of the `uplink`, once that has been measured; 1: all.

        `on_coming`: one of them stands on the roster, or will in a moment.
        """
        self._network, self._holdings, self._on_coming = network, holdings, on_coming
        self._allowance = Allowance(
            lambda: 0 if upload_share == 1 else upload_share * (uplink.reported or uplink.measured)
        )
        self.available = False  # nothing to give before this peer has a state itself
        self._leases: dict[PeerId, _Lease] = {}

    async def start(self) -> None:
        await self._network.serve(SERVICE, self._serve)

    def close(self) -> None:
        """Give nothing any more."""
        self._network.unserve(SERVICE)

    @property
    def is_held(self) -> bool:
        """Does anybody hold on to it who may want the means of steps that close now?"""
        return any(lease.since != NEVER for lease in self._leases.values())

    # one newcomer

    async def _serve(self, stream: Stream) -> None:
        peer = stream.remote
        lease = _Lease(stream, self._holdings.version)
        try:
            message = await self._heard(stream)
            known = self._leases.get(peer)
            if not self.available or (known is None and len(self._leases) >= LEASES):
                no = pb.StateOffer(version=self._holdings.version, busy=self.available)
                await stream.send(pb.FromDonor(offer=no).SerializeToString())
                return await stream.finish()
            if known is not None:  # it has come back, and may want what it had begun with
                lease.since, lease.given = known.since, known.given
                known.stream.abort()
            self._leases[peer] = lease
            async with kept_alive(stream, ALIVE, SILENCE_S):  # also while a large state is packed
                while message is not None:
                    await self._answer(stream, lease, message)
                    message = await self._heard(stream)
            await stream.finish()
            self._end(peer, lease)
        except (LinkError, ProtocolError) as error:
            log.debug("a newcomer is gone: %s", error)
            stream.abort()
            asyncio.get_running_loop().call_later(LINGER_S, self._end, peer, lease)

    def _end(self, peer: PeerId, lease: _Lease) -> None:
        if self._leases.get(peer) is lease:
            del self._leases[peer]
            self._forget()

    async def _heard(self, stream: Stream) -> pb.FromNewcomer | None:
        """None when it needs nothing more."""
        frame = await stream.receive(SILENCE_S)
        try:
            return None if frame is None else pb.FromNewcomer.FromString(frame.header)
        except DecodeError:
            raise ProtocolError(stream.remote, "malformed request for a state") from None

    async def _answer(self, stream: Stream, lease: _Lease, message: pb.FromNewcomer) -> None:
        match message.WhichOneof("content"):
            case "ask":
                if message.ask.stage != self._holdings.stage:
                    raise ProtocolError(stream.remote, f"asks for stage {message.ask.stage}")
                await self._offer(stream, lease, message.ask)
            case "chunk":
                await self._send_chunk(stream, lease, message.chunk)
            case "coming" if lease.given is not None and lease.told < MOST_TOLD:
                lease.told += 1
                self._on_coming()

    async def _offer(self, stream: Stream, lease: _Lease, ask: pb.StateAsk) -> None:
        is_mean, is_wish = ask.HasField("step"), ask.HasField("at")
        if is_mean:
            given = await self._holdings.mean(ask.step)
        elif is_wish and lease.given is not None and lease.given.name == (False, ask.at):
            given = lease.given  # it has come back
        elif is_wish:
            lease.since = NEVER
            given = await self._unless_gone(stream, self._holdings.state_at(ask.at))
        else:
            given = await self._holdings.state(ask.begun if ask.HasField("begun") else None)
        busy = given is None and not (is_mean or is_wish)
        offer = pb.StateOffer(version=self._holdings.version, busy=busy)
        if given is not None:
            lease.given = given
            lease.since = NEVER if is_wish else given.name[1]
            offer.number, offer.size_bytes = given.name[1], given.contents.size_bytes
        self._forget()
        packed = b"" if given is None else given.contents.pack()
        await stream.send(pb.FromDonor(offer=offer).SerializeToString(), packed)

    async def _unless_gone(self, stream: Stream, coming: Coroutine[None, None, Given | None]) -> Given | None:
        """What may take long, while the newcomer is heard. Raises LinkError, ProtocolError."""
        waiting, hearing = asyncio.create_task(coming), asyncio.create_task(self._hear_out(stream))
        try:
            await asyncio.wait([waiting, hearing], return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                raise hearing.result()
            return waiting.result()
        finally:
            waiting.cancel()
            hearing.cancel()

    async def _hear_out(self, stream: Stream) -> LinkError | ProtocolError:
        """Why nothing comes from it any more."""
        try:
            while await self._heard(stream) is not None:
                pass
        except (LinkError, ProtocolError) as error:
            return error
        return LinkError(stream.remote, "does not wait any more")

    async def _send_chunk(self, stream: Stream, lease: _Lease, wanted: pb.StateChunk) -> None:
        given = lease.given
        if given is None or given.name != (wanted.mean, wanted.number):
            raise ProtocolError(stream.remote, "wants a chunk of what it was not offered")
        if wanted.index >= given.contents.chunks:
            raise ProtocolError(stream.remote, f"wants chunk {wanted.index} of {given.contents.chunks}")
        chunk = chunk_of(given.data, wanted.index)
        small = None if wanted.mean else squeezed(chunk)  # means are small already
        wanted.squeezed = small is not None
        sent = chunk if small is None else small
        await self._allowance.spend(len(sent))
        await stream.send(pb.FromDonor(chunk=wanted).SerializeToString(), sent)

    def _forget(self) -> None:
        """What nobody may want any more."""
        wanted = {lease.given.name for lease in self._leases.values() if lease.given is not None}
        oldest = min((lease.since for lease in self._leases.values()), default=NEVER)
        self._holdings.forget(wanted, None if oldest == NEVER else oldest)


class Allowance:
    """Bytes that may go out, at a rate."""

    def __init__(self, bytes_per_s: Callable[[], float]) -> None:
        """`bytes_per_s` is asked again and again; 0: no limit is known."""
        self._bytes_per_s, self._free_s = bytes_per_s, 0.0

    async def spend(self, size: int) -> None:
        """Wait for one's turn."""
        now_s, rate = asyncio.get_running_loop().time(), self._bytes_per_s()
        self._free_s = max(now_s, self._free_s)
        wait_s = self._free_s - now_s
        if rate > 0:
            self._free_s += size / rate
        await asyncio.sleep(wait_s)
