"""Giving this peer's state to newcomers, and after it the mean gradients they have missed meanwhile.

    state    a snapshot between two steps, kept for as long as a newcomer holds on to this donor
    means    of the steps that close while one does: whoever has the snapshot replays them

Both go in chunks, whose hashes come first. All peers of a stage hold the same bits, so a newcomer takes
chunks of the same object from several donors. What is given may use a share of the uplink only: the rest is
for training.

I/O: one event loop; snapshots in the compute thread.
"""

import asyncio
import logging
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

import safetensors.torch
import torch
from google.protobuf.message import DecodeError

from averaging.bandwidth import UplinkMeter
from averaging.bounded import forget_oldest
from averaging.errors import LinkError, ProtocolError
from averaging.network import Network, PeerId, Stream, kept_alive
from swarm import swarm_pb2 as pb
from swarm.chunks import Contents, chunks_of, hash_of
from swarm.compute import Compute, between_hops
from swarm.history import ID_BYTES
from swarm.stage import Stage

SERVICE = "state"
SILENCE_S = 10.0  # after which the other end counts as lost
LINGER_S = 30.0  # that it may take to come back, and go on where it was
LEASES = 8  # newcomers at once
KEPT_STATES = 2  # another newcomer is offered one of these, and the means after it
MOST_STATES = 4  # if those of slow newcomers are too old by now for anybody else
KEPT_MEANS = 8  # who is further behind takes a newer state: that is less to send
COUNT = struct.Struct("<I")
ALIVE = pb.FromDonor(alive=True).SerializeToString()
Name = tuple[bool, int]  # (a mean?, its step or the state's version)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Given:
    """An object that can be had here, in chunks."""

    name: Name
    data: bytes
    contents: Contents


@dataclass(slots=True, eq=False)
class _Lease:
    """What a newcomer may still want."""

    stream: Stream
    since: int  # means from this step on
    given: Given | None = None
    has_joined: bool = False


class Donor:
    """Gives what this peer has, while it has anything."""

    def __init__(
        self,
        network: Network,
        stage: Stage,
        compute: Compute,
        *,
        upload_share: float,
        uplink: UplinkMeter,
        on_joined: Callable[[], None] = lambda: None,
    ) -> None:
        """Newcomers together get at most `upload_share` of the `uplink`, once that has been measured.

        `on_joined`: one of them stands on the roster now.
        """
        self._network, self._stage, self._compute = network, stage, compute
        self._on_joined = on_joined
        self._allowance = Allowance(lambda: upload_share * (uplink.reported or uplink.measured))
        self.available = False  # nothing to give before this peer has a state itself
        self._leases: dict[PeerId, _Lease] = {}
        self._states: dict[int, Given] = {}  # by version
        self._means: dict[int, Callable[[], bytes]] = {}  # by step
        self._packed_means: dict[int, Given] = {}
        self._packing = asyncio.Lock()

    async def start(self) -> None:
        await self._network.serve(SERVICE, self._serve)

    def close(self) -> None:
        """Give nothing any more."""
        self._network.unserve(SERVICE)

    def keep(self, step: int, mean: torch.Tensor, microbatches: Collection[bytes]) -> None:
        """The mean gradient [values] of a closed step, for those who hold on to this donor."""
        if self._leases:
            self._means[step] = lambda: pack_mean(mean, microbatches)
            forget_oldest(self._means, KEPT_MEANS)

    # one newcomer

    async def _serve(self, stream: Stream) -> None:
        peer = stream.remote
        lease = _Lease(stream, self._stage.version)
        try:
            message = await self._heard(stream)
            known = self._leases.get(peer)
            if not self.available or (known is None and len(self._leases) >= LEASES):
                no = pb.StateOffer(version=self._stage.version, busy=self.available)
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
                if message.ask.stage != self._stage.stage:
                    raise ProtocolError(stream.remote, f"asks for stage {message.ask.stage}")
                await self._offer(stream, lease, message.ask)
            case "chunk":
                await self._send_chunk(stream, lease, message.chunk)
            case "joined" if lease.given is not None and not lease.has_joined:
                lease.has_joined = True
                self._on_joined()

    async def _offer(self, stream: Stream, lease: _Lease, ask: pb.StateAsk) -> None:
        is_mean = ask.HasField("step")
        begun = ask.begun if ask.HasField("begun") else None
        given = await (self._mean(ask.step) if is_mean else self._state(begun))
        offer = pb.StateOffer(version=self._stage.version, busy=given is None and not is_mean)
        if given is not None:
            lease.given, lease.since = given, given.name[1]
            offer.number, offer.size_bytes = given.name[1], given.contents.size_bytes
        self._forget()
        packed = b"" if given is None else given.contents.pack()
        await stream.send(pb.FromDonor(offer=offer).SerializeToString(), packed)

    async def _send_chunk(self, stream: Stream, lease: _Lease, wanted: pb.StateChunk) -> None:
        given = lease.given
        if given is None or given.name != (wanted.mean, wanted.number):
            raise ProtocolError(stream.remote, "wants a chunk of what it was not offered")
        if wanted.index >= given.contents.chunks:
            raise ProtocolError(stream.remote, f"wants chunk {wanted.index} of {given.contents.chunks}")
        chunk = next(chunks_of(given.data, first=wanted.index))
        await self._allowance.spend(len(chunk))
        await stream.send(pb.FromDonor(chunk=wanted).SerializeToString(), chunk)

    # what can be had

    async def _state(self, begun: int | None) -> Given | None:
        """The state of now, or `begun` or one of a moment ago with all means since; None if there is no room
        for another."""
        async with self._packing:
            version = self._stage.version
            usable = [v for v in self._states if self._means.keys() >= {*range(v, version)}]
            if begun in usable:
                return self._states[begun]
            if version in self._states:
                return self._states[version]
            if usable and len(self._states) >= KEPT_STATES:
                return self._states[max(usable)]
            if len(self._states) >= MOST_STATES:
                return None
            version, data = await between_hops(
                self._compute, lambda: (self._stage.version, serialized(self._stage))
            )
            given = self._states[version] = await _given((False, version), data)
            return given

    async def _mean(self, step: int) -> Given | None:
        async with self._packing:
            if step not in self._packed_means and step in self._means:
                data = await between_hops(self._compute, self._means[step])
                self._packed_means[step] = await _given((True, step), data)
            return self._packed_means.get(step)

    def _forget(self) -> None:
        """What nobody may want any more."""
        wanted = {lease.given.name for lease in self._leases.values() if lease.given is not None}
        self._states = {v: given for v, given in self._states.items() if (False, v) in wanted}
        self._packed_means = {s: given for s, given in self._packed_means.items() if (True, s) in wanted}
        oldest = min((lease.since for lease in self._leases.values()), default=None)
        self._means = {s: m for s, m in self._means.items() if oldest is not None and s >= oldest}


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


def serialized(stage: Stage) -> bytes:
    return safetensors.torch.save(stage.state())


def pack_mean(mean: torch.Tensor, microbatches: Collection[bytes]) -> bytes:
    """A mean gradient [values] float32 and the ids of what is in it."""
    return b"".join((COUNT.pack(len(microbatches)), *sorted(microbatches), mean.numpy().tobytes()))


def unpack_mean(data: bytearray, values: int) -> tuple[torch.Tensor, list[bytes]]:
    """Raises ValueError."""
    count = COUNT.unpack_from(data)[0] if len(data) >= COUNT.size else 0
    start = COUNT.size + count * ID_BYTES
    if len(data) != start + 4 * values:
        raise ValueError(f"{len(data)} bytes are no mean of {values} values with {count} microbatches")
    ids = [bytes(data[at : at + ID_BYTES]) for at in range(COUNT.size, start, ID_BYTES)]
    return torch.frombuffer(data[start:], dtype=torch.float32), ids


async def contents_of(data: bytes) -> Contents:
    """Hash it, a chunk at a time: others have their turn in between."""
    hashes = []
    for chunk in chunks_of(data):
        hashes.append(hash_of(chunk))
        await asyncio.sleep(0)
    return Contents(len(data), tuple(hashes))


async def _given(name: Name, data: bytes) -> Given:
    return Given(name, data, await contents_of(data))
