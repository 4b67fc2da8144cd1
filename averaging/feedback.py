"""Error feedback: what a lossy codec could not say this time is added to what it says next time.

Alone such a codec loses the same small values every time. With feedback only the last message's error is
missing from the sum of all, so the mean over many steps is the true one. A member keeps one residual: of the
means it reduces, on its own slice, and elsewhere of the parts it sends. A message of an abandoned round takes
along what it carried of old residuals: rare, and never more than one message's error.

The residual of int8 is kept in int8, too, a 254th of a step fine: a quarter of the vector's memory.

Torch, no I/O. Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al., arXiv:1901.09847.
"""

from typing import Protocol

import torch

from averaging.codecs import INT8, INT8_BLOCK, Codec, in_blocks, in_steps
from averaging.network import Buffer
from averaging.shares import Slice

FINE = 254.0  # residuals lie within half a step, so they fill the codes from -127 to 127


class Residual(Protocol):
    """What is left over of the last messages, for every value of a vector."""

    def encode(self, values: torch.Tensor, part: Slice) -> Buffer:
        """Encode `values` ([len(part)] float32), which lie at `part`, with what is left over there."""
        ...

    def forget(self, part: Slice) -> None:
        """Nothing is left over there."""
        ...


class _Full:
    """In float32, for any codec."""

    def __init__(self, codec: Codec, values: int) -> None:
        self._codec, self._left = codec, torch.zeros(values)

    def encode(self, values: torch.Tensor, part: Slice) -> Buffer:
        left = self._left[part.start : part.stop]
        wanted = values + left
        encoded = self._codec.encode(wanted)
        if bool(torch.isfinite(wanted.sum())):
            torch.sub(wanted, self._codec.decode(encoded, (len(part),)), out=left)
        else:  # the receiver refuses it; nothing of it must come back
            left.zero_()
        return encoded

    def forget(self, part: Slice) -> None:
        self._left[part.start : part.stop] = 0


class _Int8:
    """For int8, in fractions of its own steps; parts begin at blocks."""

    def __init__(self, values: int) -> None:
        blocks = -(-values // INT8_BLOCK)
        self._left = torch.zeros(blocks, INT8_BLOCK, dtype=torch.int8)
        self._step = torch.zeros(blocks)

    def encode(self, values: torch.Tensor, part: Slice) -> Buffer:
        left, step = self._at(part)
        wanted = torch.addcmul(in_blocks(values, INT8_BLOCK), left, step.unsqueeze(1))
        scale, exact = in_steps(wanted, INT8_BLOCK, 127.0)
        codes = torch.round(exact, out=wanted)
        if bool(torch.isfinite(scale.sum())):
            left.copy_(exact.sub_(codes).mul_(FINE).round_())
            torch.div(scale, FINE, out=step)
        else:
            step.zero_()
        return INT8.pack(scale, codes, len(part))

    def _at(self, part: Slice) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = slice(part.start // INT8_BLOCK, -(-part.stop // INT8_BLOCK))
        return self._left[blocks], self._step[blocks]

    def forget(self, part: Slice) -> None:
        self._at(part)[1].zero_()


class _None:
    """For codecs that lose nothing to speak of, and for rounds of changing groups."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, values: torch.Tensor, part: Slice) -> Buffer:
        return self._codec.encode(values)

    def forget(self, part: Slice) -> None:
        pass


class Feedback:
    """The residuals of one member, from step to step."""

    def __init__(self, codec: Codec, mean_codec: Codec) -> None:
        self._codecs = (codec, mean_codec)
        self._values = 0
        self._parts: Residual = _None(codec)
        self._means: Residual = _None(mean_codec)
        self._own: tuple[Slice, ...] = ()

    def of(self, values: int, own: tuple[Slice, ...]) -> tuple[Residual, Residual]:
        """What is left over of parts and of means, for a vector of which this member reduces the pieces
        `own`.

        They share memory if their codec is one. Pieces that it has begun or ceased to reduce start anew: what
        was left over of a part is not what is left over of a mean.
        """
        if self._values != values:
            self._values = values
            codec, mean_codec = self._codecs
            self._parts = _residual(codec, values)
            self._means = self._parts if mean_codec is codec else _residual(mean_codec, values)
        else:
            for part in {*own} ^ {*self._own}:
                self._parts.forget(part)
                self._means.forget(part)
        self._own = own
        return self._parts, self._means

    def none(self) -> tuple[Residual, Residual]:
        """Without a memory."""
        codec, mean_codec = self._codecs
        return _None(codec), _None(mean_codec)


def _residual(codec: Codec, values: int) -> Residual:
    if not codec.lossy:
        return _None(codec)
    return _Int8(values) if codec is INT8 else _Full(codec, values)
