"""One round in one group: a butterfly all-reduce in pieces, after which all members hold the same bits.

Member i reduces slice i. Everyone sends each slice to its reducer, piece by piece; the reducer averages
a piece as soon as all parts of it are there, encodes the mean once, and sends the same bytes to every
member, itself included: decoding them is what makes all members bit-identical, compressed or not.
Sending, reducing and receiving overlap.

A member that breaks off or makes no progress for `progress_s` abandons the round for everybody: the
step is then closed anew without it. (Repairing the round instead starts here, in `_Reduction.fail`.)

I/O: one asyncio loop. Source: Moshpit SGD, arXiv:2103.03239, section 3.2; hivemind's partitioning.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError

from averaging.averaging_pb2 import Piece, RoundGreeting
from averaging.codecs import INT8_BLOCK, Codec
from averaging.errors import AveragingError, CodecError, LinkError, ProtocolError, RoundAbandonedError
from averaging.feedback import Feedback
from averaging.network import Buffer, Frame, Network, PeerId, Stream
from averaging.reduce import weighted_mean
from averaging.shares import Slice, equal_slices, pieces

SERVICE = "reduce"
PIECE_VALUES = 1 << 18  # 1 MiB of float32: one piece is under way while the next is encoded
Part = Buffer | torch.Tensor | None  # encoded, or my own; None without weight
FRAME_BYTES = 12  # of every frame, beside header and payload
RoundName = tuple[bytes, int]  # the plan's key, the number of the round
OPEN_ROUNDS = 16  # rounds that strangers may announce before this peer has their plan


@dataclass(frozen=True, slots=True)
class RoundResult:
    mean: torch.Tensor  # [values] float32, bit-identical on all members
    weight: float  # of the whole group
    sent_bytes: int


@dataclass(slots=True)
class _Reduction:
    """The reducer's side of one round: parts of my slice come in, means go out."""

    group: tuple[PeerId, ...]
    parts: list[Slice]
    codec: Codec
    encode: Callable[[torch.Tensor, Slice], Buffer]
    most_weight: float  # of one member
    weights: dict[PeerId, float] = field(default_factory=dict)
    arrived: list[dict[PeerId, Part]] = field(default_factory=list)
    means: list["asyncio.Future[Frame]"] = field(default_factory=list)  # as everybody gets them

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.arrived = [{} for _ in self.parts]
        self.means = [loop.create_future() for _ in self.parts]

    def add(self, peer: PeerId, index: int, part: Part) -> None:
        """Take a part; reduce the piece if it was the last one missing. Raises ProtocolError."""
        arrived = self.arrived[index]
        arrived[peer] = part
        if len(arrived) == len(self.group) and not self.means[index].done():
            ordered = [(self.weights[m], self._values(m, arrived[m], index)) for m in self.group]
            mean = weighted_mean(ordered, len(self.parts[index]))
            header = Piece(index=index, weight=self.weight).SerializeToString()
            self.means[index].set_result(Frame(header, self.encode(mean, self.parts[index])))
            arrived.clear()

    def _values(self, sender: PeerId, part: Part, index: int) -> torch.Tensor | None:
        """Decoded now, not when it arrived: parts that wait for the slowest member stay small."""
        if part is None or isinstance(part, torch.Tensor):
            return part
        return decode(self.codec, sender, part, self.parts[index])

    @property
    def weight(self) -> float:
        """Of all members; the same bits on every reducer."""
        return sum(self.weights[member] for member in self.group)

    def fail(self, error: RoundAbandonedError) -> None:
        """Tell whoever waits for a mean that is not there; no-op if all are."""
        for mean in self.means:
            if not mean.done():
                mean.set_exception(error)
                mean.exception()  # retrieved: nobody may be waiting for it


class ButterflyAllReduce:
    """Runs this peer's part of any number of rounds, as a member and as a reducer."""

    def __init__(self, network: Network, *, codec: Codec, progress_s: float, max_weight: float) -> None:
        """`max_weight` is what no member of a plan may weigh more than."""
        self._network, self._codec, self._progress_s = network, codec, progress_s
        self.max_weight = max_weight
        self._max_payload_bytes = codec.size_bytes(PIECE_VALUES)
        self._left_over: dict[str, Feedback] = {}
        self._rounds: dict[RoundName, asyncio.Future[_Reduction]] = {}
        self._announced: dict[PeerId, RoundName] = {}  # rounds that others began before this peer

    async def start(self) -> None:
        """Begin to answer the members of rounds that this peer takes part in."""
        await self._network.serve(SERVICE, self._reduce_for, max_payload_bytes=self._max_payload_bytes)

    async def run(
        self,
        name: RoundName,
        group: Sequence[PeerId],
        *,
        vector: torch.Tensor,
        weight: float,
        most_weight: float,
        feed_back: bool,
    ) -> RoundResult:
        """Average `vector` ([values] float32) with the group by weight, summed in the group's order.

        Args:
            name: the plan's key and the number of the round.
            most_weight: what no member of the group may weigh more than.
            feed_back: add what a lossy codec left out of the last messages; other groups would have other
                residuals, and so other bits.

        Raises:
            RoundAbandonedError: a member was lost; nobody may use what arrived.
        """
        me = self._network.peer_id
        slices = equal_slices(vector.numel(), len(group), INT8_BLOCK)
        # By name: the same peers reduce the same slices from step to step, whatever their seats.
        ordered = zip(sorted(group), slices, strict=True)
        cuts = {peer: pieces(part, PIECE_VALUES) for peer, part in ordered}
        values = vector.numel() if feed_back else 0
        sending, reducing = self._feedback("parts", values), self._feedback("means", values)
        reduction = _Reduction(tuple(group), cuts[me], self._codec, reducing.encode, most_weight)
        reduction.weights[me] = weight
        slot = self._slot(name)
        if slot.done():
            raise RoundAbandonedError("this round has been run before")
        slot.set_result(reduction)
        mean = torch.empty_like(vector)
        try:
            async with asyncio.TaskGroup() as tasks:
                exchanges = [
                    tasks.create_task(self._exchange(peer, name, cuts[peer], vector, weight, mean, sending))
                    for peer in group
                    if peer != me and cuts[peer]
                ]
                tasks.create_task(self._reduce_own(reduction, vector, weight, mean))
        except* AveragingError as errors:
            raise RoundAbandonedError(str(errors.exceptions[0])) from None
        finally:  # also when it is cancelled: nobody is to wait for what does not come any more
            reduction.fail(RoundAbandonedError("a groupmate abandoned the round"))
            asyncio.get_running_loop().call_later(2 * self._progress_s, self._rounds.pop, name, None)
        sent = (len(group) - 1) * sum(_wire_bytes(done.result()) for done in reduction.means)
        total = reduction.weight if cuts[me] else weight
        for task in exchanges:
            to_reducer, total = task.result()
            sent += to_reducer
        if not 0 <= total <= most_weight * len(group):
            raise RoundAbandonedError(f"a mean of weight {total:g} was sent")
        return RoundResult(mean, total, sent)

    async def _exchange(
        self,
        reducer: PeerId,
        name: RoundName,
        cut: list[Slice],
        vector: torch.Tensor,
        weight: float,
        mean: torch.Tensor,
        feedback: Feedback,
    ) -> tuple[int, float]:
        """Send my part of one slice to its reducer and receive its mean.

        Returns the bytes sent and the weight of the whole group.
        """
        stream = await self._network.open(reducer, SERVICE, max_payload_bytes=self._max_payload_bytes)
        try:
            await stream.send(RoundGreeting(plan=name[0], round=name[1], weight=weight).SerializeToString())
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(
                    _send_parts(stream, cut, vector if weight > 0 else None, feedback)
                )
                receiving = tasks.create_task(self._receive_means(stream, cut, mean))
            await stream.finish()
            return sending.result(), receiving.result()
        except* AveragingError as errors:
            raise errors.exceptions[0] from None
        finally:
            stream.abort()

    def _feedback(self, what: str, values: int) -> Feedback:
        """What is left over of this peer's last `what`."""
        kept = self._left_over.get(what)
        if kept is None or not kept.fits(values):
            kept = self._left_over[what] = Feedback(self._codec, values)
        return kept

    async def _receive_means(self, stream: Stream, cut: list[Slice], mean: torch.Tensor) -> float:
        """Fill in one slice of `mean`. Returns the weight that went into it."""
        weight = 0.0
        for number, part in enumerate(cut):
            # Twice: the reducer itself waits one deadline for a member that makes no progress.
            weight, payload = await _receive_piece(stream, number, 2 * self._progress_s)
            mean[part.start : part.stop] = decode(self._codec, stream.remote, payload, part)
        return weight

    async def _reduce_own(
        self, reduction: _Reduction, vector: torch.Tensor, weight: float, mean: torch.Tensor
    ) -> None:
        me = self._network.peer_id
        for number, part in enumerate(reduction.parts):
            reduction.add(me, number, vector[part.start : part.stop] if weight > 0 else None)
        for number, part in enumerate(reduction.parts):
            try:
                async with asyncio.timeout(2 * self._progress_s):
                    frame = await asyncio.shield(reduction.means[number])
            except TimeoutError:
                absent = len(reduction.group) - len(reduction.arrived[number])
                raise RoundAbandonedError(f"{absent} members sent nothing") from None
            mean[part.start : part.stop] = self._codec.decode(frame.payload, (len(part),))

    async def _reduce_for(self, stream: Stream) -> None:
        """Serve one member of a round that I reduce a slice of."""
        reduction = None
        try:
            async with asyncio.timeout(self._progress_s):
                greeting = await self._greeting(stream)
                # Shielded: the slot is shared with the other members and with `run`.
                reduction = await asyncio.shield(self._slot((greeting.plan, greeting.round)))
            if greeting.weight > reduction.most_weight:
                raise ProtocolError(stream.remote, f"takes part with a weight of {greeting.weight:g}")
            if stream.remote not in reduction.group or stream.remote in reduction.weights:
                raise ProtocolError(stream.remote, "is not a member of the round it wants to join")
            reduction.weights[stream.remote] = greeting.weight
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive_parts(stream, reduction, greeting.weight))
                tasks.create_task(self._send_means(stream, reduction))
            await stream.finish()
        except* (AveragingError, TimeoutError):
            stream.abort()
            if reduction is not None and stream.remote in reduction.group:
                reduction.fail(RoundAbandonedError(f"lost {stream.remote[-8:]} in the round"))

    async def _greeting(self, stream: Stream) -> RoundGreeting:
        frame = await stream.receive()
        try:
            greeting = RoundGreeting.FromString(frame.header if frame else b"")
        except DecodeError:
            raise ProtocolError(stream.remote, "malformed greeting of a round") from None
        if len(greeting.plan) != 16 or not 0 <= greeting.weight < math.inf:
            raise ProtocolError(stream.remote, f"malformed greeting: weight {greeting.weight}")
        name = (greeting.plan, greeting.round)
        if name not in self._rounds:
            ahead = self._announced.get(stream.remote)  # of this peer's own plan: one at a time
            waiting = ahead in self._rounds and not self._rounds[ahead].done()
            open_rounds = sum(not slot.done() for slot in self._rounds.values())
            if waiting or open_rounds >= OPEN_ROUNDS:
                raise ProtocolError(stream.remote, "announces one round too many")
            self._announced[stream.remote] = name
        return greeting

    async def _receive_parts(self, stream: Stream, reduction: _Reduction, weight: float) -> None:
        for number in range(len(reduction.parts)):
            payload = None
            if weight > 0:
                _, payload = await _receive_piece(stream, number, self._progress_s)
            reduction.add(stream.remote, number, payload)

    async def _send_means(self, stream: Stream, reduction: _Reduction) -> None:
        for number in range(len(reduction.parts)):
            async with asyncio.timeout(2 * self._progress_s):
                mean = await asyncio.shield(reduction.means[number])
            await stream.send(mean.header, mean.payload)

    def _slot(self, name: RoundName) -> "asyncio.Future[_Reduction]":
        slot = self._rounds.get(name)
        if slot is None:
            slot = self._rounds[name] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(12 * self._progress_s, self._rounds.pop, name, None)
        return slot


async def _send_parts(
    stream: Stream, cut: list[Slice], vector: torch.Tensor | None, feedback: Feedback
) -> int:
    """Send my part of one slice; a part of no weight (None) needs no bytes. Returns the bytes sent."""
    sent = 0
    for number, part in enumerate(cut if vector is not None else ()):
        assert vector is not None
        payload = feedback.encode(vector[part.start : part.stop], part)
        frame = Frame(Piece(index=number).SerializeToString(), payload)
        await stream.send(frame.header, frame.payload)
        sent += _wire_bytes(frame)
    return sent


def _wire_bytes(frame: Frame) -> int:
    return FRAME_BYTES + len(frame.header) + len(frame.payload)


def decode(codec: Codec, sender: PeerId, payload: Buffer, part: Slice) -> torch.Tensor:
    """What `sender` sent of one piece, [len(part)] float32. Raises ProtocolError."""
    try:
        return codec.decode(payload, (len(part),))
    except CodecError as error:
        raise ProtocolError(sender, str(error)) from None


async def _receive_piece(stream: Stream, number: int, deadline_s: float) -> tuple[float, Buffer]:
    """The next piece, which must be `number`: its weight and its payload."""
    try:
        async with asyncio.timeout(deadline_s):
            frame = await stream.receive()
    except TimeoutError:
        raise LinkError(stream.remote, f"sent nothing for {deadline_s:.1f} s") from None
    try:
        piece = None if frame is None else Piece.FromString(frame.header)
    except DecodeError:
        raise ProtocolError(stream.remote, "malformed piece") from None
    if frame is None or piece is None or piece.index != number:
        raise ProtocolError(stream.remote, f"sent something else than piece {number}")
    return piece.weight, frame.payload
