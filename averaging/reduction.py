"""The reducer's side of one round: parts of its pieces come in, means go out.

A piece is reduced as soon as a part of it is there from every member that is not lost. Whoever is lost
leaves the mean of the pieces that are still to come; if its part is needed, there is no mean any more.

Threading: one event loop, whose futures hand the means to whoever waits for them.
"""

import asyncio

import torch

from averaging.averaging_pb2 import Piece, RoundFrame
from averaging.codecs import CODECS, Codec
from averaging.errors import CodecError, ProtocolError, RoundAbandonedError
from averaging.feedback import Residual
from averaging.network import Buffer, Frame, PeerId
from averaging.reduce import weighted_mean
from averaging.round import Round, Work
from averaging.shares import Slice

Part = Buffer | torch.Tensor | None  # encoded, or my own; None without weight
HELD = CODECS["float32"]  # how means are passed on: the same bits, whatever they were encoded with


class Means:
    """The mean of one group as it arrives: values, and the weight that went into every piece."""

    def __init__(self, values: int) -> None:
        self.vector = torch.empty(values)
        self.settled = False  # all is here and in use: what is sent again is the same
        self._weights: dict[Slice, float] = {}

    def room(self, part: Slice) -> torch.Tensor:
        """Where to write a piece."""
        return torch.empty(len(part)) if self.settled else self.vector[part.start : part.stop]

    def note(self, part: Slice, weight: float) -> None:
        """A piece is here, of so much weight."""
        if not self.settled:
            self._weights[part] = weight

    def held(self, part: Slice) -> Buffer:
        """The mean of a piece, to be passed on."""
        return HELD.encode(self.vector[part.start : part.stop])

    def weight_of(self, part: Slice) -> float:
        return self._weights[part]

    @property
    def weight(self) -> float:
        """Of all that is in the vector: the mean over its values."""
        ordered = sorted(self._weights.items(), key=lambda item: item[0].start)
        total = sum(len(part) * weight for part, weight in ordered)
        return total / max(1, sum(len(part) for part, _ in ordered))


class Reduction:
    """Pieces that this peer reduces for its group, after those that it passes on."""

    def __init__(self, round_: Round, work: Work, residual: Residual) -> None:
        loop = asyncio.get_running_loop()
        self._round, self._residual = round_, residual
        self._pieces, self._passed = work.pieces, len(work.passed)
        self._speakers = [peer for peer in round_.members if peer in round_.speakers]
        self._weights: dict[PeerId, float] = {}
        self._arrived: list[dict[PeerId, Part]] = [{} for _ in self._pieces]
        self.means: list[asyncio.Future[Frame]] = [loop.create_future() for _ in self._pieces]
        self.lost: dict[PeerId, str] = {}  # members that are waited for no longer, and why
        self.used: set[PeerId] = set()  # members of whom something is in a mean

    def begin(self, peer: PeerId, weight: float) -> None:
        """Parts of this weight follow. Raises ProtocolError."""
        most = self._round.most_weight if peer in self._round.speakers else 0.0
        if not 0 <= weight <= most:
            raise ProtocolError(peer, f"takes part with a weight of {weight:g}")
        self._weights[peer] = weight
        if weight == 0 and peer in self._round.speakers:
            for index in range(self._passed, len(self._pieces)):
                self.add(peer, index, None)

    def add(self, peer: PeerId, index: int, part: Part) -> None:
        """Take a part; reduce the piece if it was the last one missing."""
        self._arrived[index][peer] = part
        self._reduce_if_complete(index)

    def hold(self, means: Means) -> None:
        """Pass on what is held."""
        for index, part in enumerate(self._pieces[: self._passed]):
            header = _piece_header(index, means.weight_of(part))
            self.means[index].set_result(Frame(header, means.held(part)))

    def leave(self, peer: PeerId, why: str) -> None:
        """Wait for it no longer; no-op if it has given all."""
        if peer in self.lost or all(mean.done() for mean in self.means):
            return
        self.lost[peer] = why
        if self._round.all_needed and peer in self._speakers and not self._has_given_all(peer):
            return self.fail(f"lost {peer[-8:]}: {why}")
        for index in range(self._passed, len(self._pieces)):
            self._reduce_if_complete(index)

    def _has_given_all(self, peer: PeerId) -> bool:
        return all(
            mean.done() or peer in arrived for mean, arrived in zip(self.means, self._arrived, strict=True)
        )

    def fail(self, why: str) -> None:
        """There will be no more means; no-op if all are there."""
        for mean in self.means:
            if not mean.done():
                mean.set_exception(RoundAbandonedError(why))
                mean.exception()  # retrieved: nobody may be waiting for it

    def _reduce_if_complete(self, index: int) -> None:
        arrived, mean = self._arrived[index], self.means[index]
        if mean.done() or any(m not in arrived and m not in self.lost for m in self._speakers):
            return
        part = self._pieces[index]
        inside = [member for member in self._speakers if arrived.get(member) is not None]
        total = sum(self._weights[member] for member in inside)
        shares = ((self._weights[m] / total, self._values(m, arrived[m], part)) for m in inside)
        try:
            mean_values, codec = weighted_mean(shares, len(part)), self._round.mean_codec_of(part)
            payload = self._residual.encode(codec, mean_values, part, total)
        except ProtocolError as error:
            return self._drop(error.peer, str(error))
        self.used.update(inside)
        mean.set_result(Frame(_piece_header(index, total), payload))
        arrived.clear()

    def _drop(self, member: PeerId, why: str) -> None:
        """What it sent is garbage: none of it goes into what is still to come."""
        for arrived in self._arrived:
            arrived.pop(member, None)
        self.lost.pop(member, None)
        self.leave(member, why)

    def _values(self, sender: PeerId, part: Part, piece: Slice) -> torch.Tensor:
        """Decoded now, not when it arrived: parts that wait for the slowest member stay small."""
        assert part is not None
        if isinstance(part, torch.Tensor):
            return part
        return decode(self._round.codec_of(piece), sender, part, (len(piece),))


def _piece_header(index: int, weight: float) -> bytes:
    return RoundFrame(piece=Piece(index=index, weight=weight)).SerializeToString()


def decode(
    codec: Codec, sender: PeerId, payload: Buffer, shape: tuple[int, ...], out: torch.Tensor | None = None
) -> torch.Tensor:
    """What `sender` sent of one piece, float32 of that shape. Raises ProtocolError."""
    try:
        return codec.decode(payload, shape, out)
    except CodecError as error:
        raise ProtocolError(sender, str(error)) from None
