"""A peer that leaves hands what it has accumulated to a stage mate: nothing of it is lost.

    giver    whose gradients, then their sum in parts    -> a mate that hears their trainers, too
    taker    adds the sum to its own, all of it or nothing, and says so
    giver    tells the trainers who has the gradients now

Exactly once: the giver parts with the sum before it asks, and asks another mate only while the one before
certainly has not got all parts. If that is in doubt it tells nobody; the trainers then have the gradients
computed again, and no plan commits with a microbatch in two sums.

I/O: one stream each; one event loop. Design section 8.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence

import torch
from google.protobuf.message import DecodeError

from averaging.codecs import CODECS
from averaging.errors import CodecError, LinkError
from averaging.network import Network, PeerId, Stream
from swarm import swarm_pb2 as pb
from swarm.compute import Compute, between_hops
from swarm.config import RunConfig
from swarm.errors import RejectedError, SwarmError
from swarm.messages import Handover, parse_handover
from swarm.server import HopServer
from swarm.stage import Stage
from swarm.update import step_rules

SERVICE = "handover"
PART_VALUES, SILENCE_S, AGAIN_S = 1 << 20, 5.0, 0.2
log = logging.getLogger(__name__)


class Heir:
    """What a peer takes over from stage mates that leave."""

    def __init__(
        self,
        network: Network,
        stage: Stage,
        compute: Compute,
        server: HopServer,
        config: RunConfig,
        *,
        mates: Callable[[], Collection[PeerId]],
    ) -> None:
        """`mates`: the stage's roster; nobody else has anything to hand over."""
        self._network, self._stage, self._compute, self._server = network, stage, compute, server
        self._strict, self._max_staleness = config.training.strict, config.training.max_staleness
        self._most_tokens, self._mates = step_rules(config).max_weight, mates
        self._taking = asyncio.Lock()  # one at a time: a sum takes as much memory as the stage
        self._stopped = False

    async def start(self) -> None:
        most = max(codec.size_bytes(PART_VALUES) for codec in CODECS.values())
        await self._network.serve(SERVICE, self._serve, max_payload_bytes=most)

    async def stop(self) -> None:
        """Take nothing any more, once what is under way is here."""
        self._stopped = True
        async with self._taking:
            pass

    def close(self) -> None:
        """Answer nobody any more."""
        self._network.unserve(SERVICE)

    async def _serve(self, stream: Stream) -> None:
        try:
            if (frame := await stream.receive(SILENCE_S)) is None:
                return
            offered = parse_handover(
                stream.remote, frame.header, stage=self._stage.stage, most_tokens=self._most_tokens
            )
            if self._taking.locked():
                await _reply(stream, "takes over from another one", pb.BUSY)
            else:
                async with self._taking:
                    await self._answer(stream, offered)
            await stream.finish()
        except (LinkError, RejectedError) as error:
            log.warning("took nothing over: %s", error)
            stream.abort()

    def _why_not(self, giver: PeerId, offered: Handover) -> str:
        if giver not in self._mates():
            return "not on the roster here"
        return self._unwelcome(offered) or self._unfit(offered)

    def _unwelcome(self, offered: Handover) -> str:
        if self._stopped or not self._server.has_room_for(offered.routes):
            return "leaves, too, or does not hear the trainers"
        return ""

    def _unfit(self, offered: Handover) -> str:
        """Why these gradients do not go with what is here; empty if they do."""
        ids = [route.microbatch for route in offered.routes]
        step, version = self._stage.accumulator.step, self._stage.version
        if self._strict and step != offered.step:
            return f"accumulates for step {step}, not {offered.step}"
        if version - offered.step > self._max_staleness:
            return f"is at version {version}, this is for step {offered.step}"
        if self._stage.history.touches(ids):
            return "some of it is in a step"
        if any(self._stage.holds(microbatch) for microbatch in ids):
            return "has accumulated some of it, too"
        return ""

    async def _answer(self, stream: Stream, offered: Handover) -> None:
        """Raises LinkError, RejectedError; nothing is taken then."""
        why_not = self._why_not(stream.remote, offered)
        await _reply(stream, why_not, pb.STALE if why_not else pb.ACCEPTED)
        if why_not:
            return
        vector = torch.empty(self._stage.values)
        for part in vector.split(PART_VALUES):
            if (frame := await stream.receive(SILENCE_S)) is None:
                raise LinkError(stream.remote, "ended in the middle of a handover")
            try:
                offered.codec.decode(frame.payload, tuple(part.shape), out=part)
            except CodecError as error:
                raise RejectedError(stream.remote, str(error)) from None
        ids = [route.microbatch for route in offered.routes]

        def add() -> tuple[str, int]:
            why_not = self._unfit(offered)
            return why_not, 0 if why_not else self._stage.take_over(vector, offered.tokens, ids)

        step, why_not = 0, self._unwelcome(offered)  # also by now
        if not why_not:
            why_not, step = await between_hops(self._compute, add)
        if not why_not:
            self._server.taken_over(offered.routes)
            log.info("took over %d microbatches of %s", len(ids), stream.remote[-8:])
        await _reply(stream, why_not, pb.STALE if why_not else pb.ACCEPTED, step)


class _RefusedError(SwarmError):
    """The mate does not take it: ask another one."""


class _BusyError(SwarmError):
    """The mate does not take it now: ask again."""


class _DoubtError(SwarmError):
    """The mate may have taken it: ask nobody else."""


async def hand_over(
    network: Network, offered: Handover, vector: torch.Tensor, mates: Sequence[PeerId], *, stage: int
) -> tuple[PeerId, int] | None:
    """Give a sum [values] to the first of the `mates` that takes it: (who, the step it counts in there).

    Those that are busy are asked again, for as long as the caller waits.
    """
    remaining = list(mates)
    while remaining:
        for mate in list(remaining):
            try:
                return mate, await _give(network, offered, vector, mate, stage)
            except _BusyError:
                continue
            except (LinkError, _RefusedError, _DoubtError) as error:
                log.info("handing over: %s", error)
                if isinstance(error, _DoubtError):
                    return None
            remaining.remove(mate)
        await asyncio.sleep(AGAIN_S)
    return None


async def _give(network: Network, offered: Handover, vector: torch.Tensor, mate: PeerId, stage: int) -> int:
    """Raises LinkError, _RefusedError, _DoubtError."""
    stream = await network.open(mate, SERVICE)
    try:
        await stream.send(offered.pack(stage))
        await _answer(stream)
        *parts, last = vector.split(PART_VALUES)
        for part in parts:
            await stream.send(b"", offered.codec.encode(part))
        try:
            await stream.send(b"", offered.codec.encode(last))
            step = (await _answer(stream)).step
        except LinkError as error:
            raise _DoubtError(f"{error}; whether it has them is not known") from None
    except BaseException:
        stream.abort()
        raise
    with contextlib.suppress(LinkError):  # it has them
        await stream.finish()
    return step


async def _answer(stream: Stream) -> pb.HandoverReply:
    """Raises LinkError, _RefusedError."""
    if (frame := await stream.receive(SILENCE_S)) is None:
        raise LinkError(stream.remote, "ended a handover")
    try:
        reply = pb.HandoverReply.FromString(frame.header)
    except DecodeError:
        raise LinkError(stream.remote, "malformed answer to a handover") from None
    if reply.status == pb.BUSY:
        raise _BusyError
    if reply.status != pb.ACCEPTED:
        raise _RefusedError(f"{stream.remote[-8:]} does not take it: {reply.reason[:200]}")
    return reply


async def _reply(stream: Stream, why_not: str, status: pb.Status, step: int = 0) -> None:
    await stream.send(pb.HandoverReply(status=status, reason=why_not, step=step).SerializeToString())
