"""Error feedback: what a lossy codec could not say this time is added to what it says next time.

Alone such a codec loses the same small values every time. With feedback only the last message's error is
missing from the sum of all, so the mean over many steps is the true one. A residual is kept times the weight
of the message that it is missing from, and shared out over the weight of the next: so a sum of gradients
loses nothing when weights change, nor when a member that sent a piece to its reducer becomes the reducer of
it. What loses nothing carries none: residuals wait for the next lossy message. A message of an abandoned
round has its error sent again with the next, and takes along what it carried of old residuals: rare, and at
most one message's error, which is small but for top-k.

If int8 is the only lossy codec, residuals are kept in int8, too, a 254th of a step fine: a quarter of the
vector's memory.

Torch, no I/O. Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al., arXiv:1901.09847; weighing is ours.
"""

from typing import Protocol

import torch

from averaging.codecs import INT8, INT8_BLOCK, Codec, in_blocks, in_steps
from averaging.network import Buffer
from averaging.round import Round
from averaging.shares import Slice

LEAST = 1e-12  # messages of less weight carry no residual
FINE = 254.0  # residuals lie within half a step, so they fill the codes from -127 to 127


class Residual(Protocol):
    """What is left over of the last messages, for every value of a vector."""

    def encode(self, codec: Codec, values: torch.Tensor, part: Slice, weight: float) -> Buffer:
        """Encode `values` ([len(part)] float32) of so much weight, which lie at `part`, with what is left
        over there."""
        ...


class _Full:
    """In float32, for any codec."""

    def __init__(self, values: int) -> None:
        self._left = torch.zeros(values)

    def encode(self, codec: Codec, values: torch.Tensor, part: Slice, weight: float) -> Buffer:
        if not codec.lossy or weight < LEAST:
            return codec.encode(values)
        left = self._left[part.start : part.stop]
        wanted = torch.add(values, left, alpha=1 / weight)
        encoded = codec.encode(wanted)
        if bool(torch.isfinite(wanted.sum())):
            torch.sub(wanted, codec.decode(encoded, (len(part),)), out=left).mul_(weight)
        else:  # the receiver refuses it; nothing of it must come back
            left.zero_()
        return encoded


class _Int8:
    """For int8, in fractions of its own steps; parts begin at blocks."""

    def __init__(self, values: int) -> None:
        blocks = -(-values // INT8_BLOCK)
        self._left = torch.zeros(blocks, INT8_BLOCK, dtype=torch.int8)
        self._step = torch.zeros(blocks)
        self._room = torch.empty(0, INT8_BLOCK)  # to compute in: new memory for every part costs more

    def encode(self, codec: Codec, values: torch.Tensor, part: Slice, weight: float) -> Buffer:
        if codec is not INT8 or weight < LEAST:
            return codec.encode(values)
        blocks = slice(part.start // INT8_BLOCK, -(-part.stop // INT8_BLOCK))
        left, step = self._left[blocks], self._step[blocks]
        if len(self._room) < len(left):
            self._room = torch.empty(left.shape)
        room, rows = self._room[: len(left)], in_blocks(values, INT8_BLOCK)
        wanted = torch.addcmul(rows, left, step.unsqueeze(1), value=1 / weight, out=room)
        scale, exact = in_steps(wanted, INT8_BLOCK, 127.0)
        codes = torch.round(exact, out=wanted)
        if bool(torch.isfinite(scale.sum())):
            left.copy_(exact.sub_(codes).mul_(FINE).round_())
            torch.mul(scale, weight / FINE, out=step)
        else:
            step.zero_()
        return INT8.pack(scale, codes, len(part))


class _None:
    """Without a memory."""

    def encode(self, codec: Codec, values: torch.Tensor, part: Slice, weight: float) -> Buffer:
        return codec.encode(values)


class Feedback:
    """The residuals of one member, from step to step."""

    def __init__(self) -> None:
        self._of: tuple[int, bool] | None = None  # values, and whether in int8
        self._kept: Residual = _None()

    def of(self, round_: Round) -> Residual:
        """What is left over for the vector of such a round; a vector of another size begins anew."""
        lossy = {codec for codec in (round_.codec, round_.mean_codec) if codec.lossy}
        if not lossy or not round_.feed_back:
            return _None()
        found = (round_.values, lossy == {INT8})
        if self._of != found:
            self._of = found
            self._kept = _Int8(round_.values) if lossy == {INT8} else _Full(round_.values)
        return self._kept
