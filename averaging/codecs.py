"""Tensor <-> bytes: float32, float16, bfloat16 and int8 in blocks.

Every codec is stateless, vectorised torch on the tensor's own device, and names the exact size of what
it produces, so that a receiver can check a length before it allocates. Decoding refuses bytes of
another length and values that are not finite: what passes is a finite float32 tensor.

int8: each block of 512 consecutive values is scaled by its largest magnitude (a float32 per block,
stored first), 1.008 bytes per value. The scale of a block is finite exactly when all its values are.

The codecs of the wire; biased codecs with error feedback belong here too and keep this interface.
"""

from typing import Protocol

import torch

from averaging.errors import CodecError
from averaging.network import Buffer

INT8_BLOCK = 512


class Codec(Protocol):
    """One way to write a tensor; `number` is its name on the wire."""

    name: str
    number: int

    def size_bytes(self, values: int) -> int:
        """Exact encoded size of a tensor with that many values."""
        ...

    def encode(self, tensor: torch.Tensor) -> Buffer:
        """Encode a floating-point tensor of any shape; the result may share its memory."""
        ...

    def decode(self, data: Buffer, shape: tuple[int, ...]) -> torch.Tensor:
        """Decode to a new float32 CPU tensor of `shape`. Raises CodecError."""
        ...


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its bytes, not copied if it lies contiguous in memory."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().data


def _from_bytes(data: Buffer, dtype: torch.dtype) -> torch.Tensor:
    view = memoryview(data)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)  # none is read-only


class _Cast:
    """A plain cast to a floating-point type."""

    def __init__(self, name: str, number: int, dtype: torch.dtype) -> None:
        self.name, self.number, self._dtype = name, number, dtype

    def size_bytes(self, values: int) -> int:
        return values * self._dtype.itemsize

    def encode(self, tensor: torch.Tensor) -> Buffer:
        if self._dtype is torch.float16:  # saturate: an overflow to infinity would be rejected as garbage
            tensor = tensor.clamp(-65504.0, 65504.0)
        return _bytes_of(tensor.detach().to(self._dtype).reshape(-1))

    def decode(self, data: Buffer, shape: tuple[int, ...]) -> torch.Tensor:
        _check_length(self, data, shape)
        if not _count(shape):
            return torch.zeros(shape)
        tensor = _from_bytes(data, self._dtype).to(torch.float32).view(shape)
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise CodecError("tensor is not finite")
        return tensor


class _Int8:
    """Blocks of int8 values, each with a float32 scale."""

    name, number = "int8", 4

    def size_bytes(self, values: int) -> int:
        return values + 4 * _blocks(values)

    def encode(self, tensor: torch.Tensor) -> Buffer:
        flat = tensor.detach().to(torch.float32).reshape(-1)
        values, blocks = flat.numel(), _blocks(flat.numel())
        padded = (
            flat if values == blocks * INT8_BLOCK else torch.zeros(blocks * INT8_BLOCK, device=flat.device)
        )
        if padded is not flat:
            padded[:values] = flat
        rows = padded.view(blocks, INT8_BLOCK)
        # Not `aminmax`: along the innermost dimension it takes ten times as long as these two.
        scale = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).div_(127.0)
        inverse = torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale)).clamp_(max=3e38)
        codes = torch.mul(rows, inverse.unsqueeze(1)).round_().to(torch.int8)
        return b"".join((_bytes_of(scale), _bytes_of(codes.view(-1)[:values])))

    def decode(self, data: Buffer, shape: tuple[int, ...]) -> torch.Tensor:
        _check_length(self, data, shape)
        values = _count(shape)
        if not values:
            return torch.zeros(shape)
        blocks = _blocks(values)
        view = memoryview(data)
        scale = _from_bytes(view[: 4 * blocks], torch.float32)
        if not bool(torch.isfinite(scale).all()):
            raise CodecError("tensor is not finite")
        codes = _from_bytes(view[4 * blocks :], torch.int8)
        if values < blocks * INT8_BLOCK:
            codes = torch.cat([codes, torch.zeros(blocks * INT8_BLOCK - values, dtype=torch.int8)])
        out = torch.mul(codes.view(blocks, INT8_BLOCK), scale.unsqueeze(1))
        if not bool(torch.isfinite(scale.abs().max() * 128)):
            raise CodecError("tensor is not finite")
        return out.view(-1)[:values].view(shape)


def _blocks(values: int) -> int:
    return -(-values // INT8_BLOCK)


def _check_length(codec: Codec, data: Buffer, shape: tuple[int, ...]) -> None:
    expected = codec.size_bytes(_count(shape))
    if len(data) != expected:
        raise CodecError(f"{codec.name} tensor of shape {shape} takes {expected} bytes, got {len(data)}")


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _Cast("float32", 1, torch.float32),
        _Cast("float16", 2, torch.float16),
        _Cast("bfloat16", 3, torch.bfloat16),
        _Int8(),
    )
}
_BY_NUMBER = {codec.number: codec for codec in CODECS.values()}


def codec_by_number(number: int) -> Codec:
    """The codec of that number on the wire. Raises CodecError."""
    try:
        return _BY_NUMBER[number]
    except KeyError:
        raise CodecError(f"unknown codec number {number}") from None
