"""State transfer: a newcomer loads parameters, optimizer state and version from a living peer.

The donor takes a snapshot between two steps and sends it as safetensors in bounded chunks, announced by
its version, size and SHA-256. The newcomer checks size, hash, names, shapes and types before anything of
it is used: never a half-loaded state.

I/O: one event loop; snapshots in the compute thread.
"""

import asyncio
import functools
import hashlib
import logging
from collections.abc import Sequence

import safetensors
import safetensors.torch
from google.protobuf.message import DecodeError

from averaging.errors import AveragingError, LinkError, ProtocolError
from averaging.network import Network, PeerId, Stream
from swarm import swarm_pb2 as pb
from swarm.compute import Compute, Priority
from swarm.stage import Stage

SERVICE = "state"
CHUNK_BYTES = 1 << 20
ALLOWANCE_BYTES = 16 << 20  # for names, shapes and the history of microbatches
DEADLINE_S = 30.0  # for the offer and for each chunk
log = logging.getLogger(__name__)


class NoStateError(AveragingError):
    """The donor is itself new."""


class StateServer:
    """Gives this peer's state to newcomers, two at a time."""

    def __init__(self, network: Network, stage: Stage, compute: Compute) -> None:
        self._network, self._stage, self._compute = network, stage, compute
        self.available = False  # nothing to give before this peer has a state itself
        self._snapshot: tuple[int, bytes] | None = None
        self._slots = asyncio.Semaphore(2)

    async def start(self) -> None:
        await self._network.serve(SERVICE, self._give)

    async def _give(self, stream: Stream) -> None:
        try:
            frame = await stream.receive()
            request = pb.StateRequest.FromString(frame.header if frame else b"")
            if not self.available or request.stage != self._stage.stage:
                await stream.send(pb.StateOffer(available=False).SerializeToString())
                return await stream.finish()
            async with self._slots:
                version, data = await self._take_snapshot()
                digest = hashlib.sha256(data).digest()
                offer = pb.StateOffer(available=True, version=version, size_bytes=len(data), sha256=digest)
                await stream.send(offer.SerializeToString())
                for start in range(0, len(data), CHUNK_BYTES):
                    async with asyncio.timeout(DEADLINE_S):  # a reader that crawls must not keep the slot
                        await stream.send(b"", memoryview(data)[start : start + CHUNK_BYTES])
                await stream.finish()
        except (LinkError, DecodeError, TimeoutError) as error:
            log.info("state transfer ended early: %s", error)
            stream.abort()

    async def _take_snapshot(self) -> tuple[int, bytes]:
        """Serialize in the compute thread: between steps, and only once per version."""

        def snapshot() -> tuple[int, bytes]:
            if self._snapshot is None or self._snapshot[0] != self._stage.version:
                self._snapshot = self._stage.version, _serialized(self._stage)
            return self._snapshot

        return await asyncio.wrap_future(self._compute.submit(Priority.STEP, snapshot))


async def fetch_state(
    network: Network, stage: Stage, compute: Compute, donors: Sequence[PeerId], *, at_least: int = 0
) -> bool:
    """Load the state of the first donor that gives one of version `at_least` or more.

    One that is the stage's own already, bit by bit, as where all begin from the seed, is not transferred.
    Returns False if none of them has one; the stage is then unchanged, as it is when this raises.

    Raises:
        LinkError: none gave its state, and at least one could not be asked: it may have one.
    """
    unheard: LinkError | None = None
    for donor in donors:
        try:
            offer, data = await _download(network, stage, compute, donor, at_least)
            if data is None:
                log.info("%s holds the same state of version %d", donor[-8:], offer.version)
                return True
            load = functools.partial(_load, stage, donor, offer, data)
            await asyncio.wrap_future(compute.submit(Priority.STEP, load))
            log.info("loaded version %d (%.1f MB) from %s", offer.version, len(data) / 1e6, donor[-8:])
            return True
        except NoStateError as error:
            log.info("no state from %s: %s", donor[-8:], error)
        except (AveragingError, TimeoutError) as error:
            log.warning("no state from %s: %s", donor[-8:], error)
            if not (isinstance(error, LinkError) and error.refused):
                unheard = LinkError(donor, str(error) or "took too long")
    if unheard is not None:
        raise unheard
    return False


def _serialized(stage: Stage) -> bytes:
    return safetensors.torch.save(stage.state())


async def _download(
    network: Network, stage: Stage, compute: Compute, donor: PeerId, at_least: int
) -> tuple[pb.StateOffer, bytearray | None]:
    """A donor's offer, and its state unless the stage has the same."""
    stream = await network.open(donor, SERVICE, max_payload_bytes=CHUNK_BYTES)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await stream.send(pb.StateRequest(stage=stage.stage).SerializeToString())
            frame = await stream.receive()
        offer = pb.StateOffer.FromString(frame.header if frame else b"")
        if not offer.available:
            raise NoStateError(f"{donor[-8:]} has none to give yet")
        if offer.version < at_least:
            raise NoStateError(f"{donor[-8:]} is at version {offer.version} only")
        if offer.version == stage.version:
            own = await asyncio.wrap_future(compute.submit(Priority.STEP, lambda: _serialized(stage)))
            if hashlib.sha256(own).digest() == offer.sha256:
                return offer, None
        most = 4 * 4 * stage.values + ALLOWANCE_BYTES
        if offer.size_bytes > most:
            raise ProtocolError(donor, f"offers {offer.size_bytes} bytes, the stage takes at most {most}")
        data = bytearray()
        while len(data) < offer.size_bytes:
            async with asyncio.timeout(DEADLINE_S):
                frame = await stream.receive()
            if frame is None:
                raise LinkError(donor, "ended the state early")
            if len(frame.payload) != min(CHUNK_BYTES, offer.size_bytes - len(data)):
                raise ProtocolError(donor, "sends a state in crumbs")
            data += frame.payload
    except DecodeError:
        raise ProtocolError(donor, "malformed state offer") from None
    finally:
        stream.abort()
    if len(data) != offer.size_bytes or hashlib.sha256(data).digest() != offer.sha256:
        raise ProtocolError(donor, "the state does not match its hash")
    return offer, data


def _load(stage: Stage, donor: PeerId, offer: pb.StateOffer, data: bytearray) -> None:
    try:
        stage.load(safetensors.torch.load(bytes(data)), offer.version)
    except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ProtocolError(donor, f"its state does not fit: {error}") from None
