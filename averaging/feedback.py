"""Error feedback: what a lossy codec could not say this time is added to what it says next time.

Alone such a codec loses the same small values every time. With feedback only the last message's error is
missing from the sum of all, so the mean over many steps is the true one. A member keeps one residual for the
parts it sends and one for the means it reduces. A message of an abandoned round takes along what it
carried of old residuals: rare, and never more than one message's error.

Torch, no I/O. Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al., arXiv:1901.09847.
"""

import torch

from averaging.codecs import Codec
from averaging.network import Buffer
from averaging.shares import Slice


class Feedback:
    """Encodes slices of one vector, step after step; of no values: without a memory."""

    def __init__(self, codec: Codec, values: int) -> None:
        self._codec = codec
        self._residual = torch.zeros(values if codec.lossy else 0)

    def fits(self, values: int) -> bool:
        """Is it for vectors of that size?"""
        return not self._codec.lossy or self._residual.numel() == values

    def encode(self, values: torch.Tensor, part: Slice) -> Buffer:
        """Encode `values` ([len(part)] float32), which lie at `part` of the vector."""
        if not self._residual.numel():
            return self._codec.encode(values)
        left = self._residual[part.start : part.stop]
        wanted = values + left
        encoded = self._codec.encode(wanted)
        if bool(torch.isfinite(wanted.sum())):
            torch.sub(wanted, self._codec.decode(encoded, (len(part),)), out=left)
        else:  # the receiver refuses it; nothing of it must come back
            left.zero_()
        return encoded
