"""Tensor <-> bytes: float32, float16, bfloat16, int8 or int4 in blocks, and the largest of every block.

Every codec is stateless, vectorised torch on the tensor's own device, and names the exact size of what
it produces, so that a receiver can check a length before it allocates. Decoding refuses bytes of
another length and values that are not finite: what passes is a finite float32 tensor.

Blocks of consecutive values (512 for int8, 128 for int4) are scaled by their largest magnitude: a float32
per block, stored first; 1.008 and 0.531 bytes per value. The scale of a block is finite exactly when all
its values are. A codec that is `lossy` loses the same small values every time: what matters in the long
run goes through `averaging.feedback`.
"""

from typing import Protocol

import torch

from averaging.errors import CodecError
from averaging.network import Buffer

INT8_BLOCK, INT4_BLOCK = 512, 128
TOP_BLOCK, TOP_KEPT = 256, 8  # positions in a block fit into a byte
LARGEST = torch.finfo(torch.float32).max


class Codec(Protocol):
    """One way to write a tensor; `number` is its name on the wire."""

    name: str
    number: int
    lossy: bool  # its errors are large enough to be fed back

    def size_bytes(self, values: int) -> int:
        """Exact encoded size of a tensor with that many values."""
        ...

    def encode(self, tensor: torch.Tensor) -> Buffer:
        """Encode a floating-point tensor of any shape; the result may share its memory."""
        ...

    def decode(self, data: Buffer, shape: tuple[int, ...], out: torch.Tensor | None = None) -> torch.Tensor:
        """Decode to a float32 CPU tensor of `shape`: a new one, or `out`, which is contiguous.

        Raises CodecError; what `out` holds then is nothing to be used.
        """
        ...


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its bytes, not copied if it lies contiguous in memory."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().data


def from_bytes(data: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """Its values, not copied if the bytes may be written."""
    view = memoryview(data)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)  # none is read-only


class _Cast:
    """A plain cast to a floating-point type."""

    def __init__(self, name: str, number: int, dtype: torch.dtype) -> None:
        self.name, self.number, self.lossy, self._dtype = name, number, False, dtype

    def size_bytes(self, values: int) -> int:
        return values * self._dtype.itemsize

    def encode(self, tensor: torch.Tensor) -> Buffer:
        if self._dtype is torch.float16:  # saturate: an overflow to infinity would be rejected as garbage
            tensor = tensor.clamp(-65504.0, 65504.0)
        return _bytes_of(tensor.detach().to(self._dtype).reshape(-1))

    def decode(self, data: Buffer, shape: tuple[int, ...], out: torch.Tensor | None = None) -> torch.Tensor:
        _check_length(self, data, shape)
        if not _count(shape):
            return torch.zeros(shape)
        source = from_bytes(data, self._dtype).view(shape)
        tensor = source.to(torch.float32) if out is None else out.copy_(source)
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise CodecError("tensor is not finite")
        return tensor


class _Int8:
    """Blocks of int8 values, each with a float32 scale."""

    name, number, lossy = "int8", 4, True

    def size_bytes(self, values: int) -> int:
        return values + 4 * _blocks(values, INT8_BLOCK)

    def encode(self, tensor: torch.Tensor) -> Buffer:
        scale, exact = in_steps(tensor, INT8_BLOCK, 127.0)
        return self.pack(scale, exact.round_(), tensor.numel())

    def pack(self, scale: torch.Tensor, codes: torch.Tensor, values: int) -> Buffer:
        """The message of `values` whole numbers [blocks, INT8_BLOCK] in steps of `scale` [blocks]."""
        encoded = bytearray(self.size_bytes(values))
        if encoded:
            scales, rest = _split(encoded, len(scale), torch.int8)
            scales.copy_(scale)
            rest.copy_(codes.view(-1)[:values])
        return encoded

    def decode(self, data: Buffer, shape: tuple[int, ...], out: torch.Tensor | None = None) -> torch.Tensor:
        _check_length(self, data, shape)
        values = _count(shape)
        tensor = torch.empty(shape) if out is None else out
        if not values:
            return tensor
        scale, codes = _parted(data, _blocks(values, INT8_BLOCK), torch.int8, most=128)
        full, flat = values // INT8_BLOCK, tensor.view(-1)
        rows = codes[: full * INT8_BLOCK].view(full, INT8_BLOCK)
        torch.mul(rows, scale[:full].unsqueeze(1), out=flat[: rows.numel()].view_as(rows))
        if full < len(scale):
            torch.mul(codes[rows.numel() :], scale[-1], out=flat[rows.numel() :])
        return tensor


class _Int4:
    """Blocks of 4-bit values from -7 to 7, two in a byte, each block with a float32 scale."""

    name, number, lossy = "int4", 5, True

    def size_bytes(self, values: int) -> int:
        return (values + 1) // 2 + 4 * _blocks(values, INT4_BLOCK)

    def encode(self, tensor: torch.Tensor) -> Buffer:
        scale, exact = in_steps(tensor, INT4_BLOCK, 7.0)
        pairs = exact.round_().add_(8.0).to(torch.uint8).view(-1, 2)
        packed = pairs[:, 0] | (pairs[:, 1] << 4)
        return b"".join((_bytes_of(scale), _bytes_of(packed[: (tensor.numel() + 1) // 2])))

    def decode(self, data: Buffer, shape: tuple[int, ...], out: torch.Tensor | None = None) -> torch.Tensor:
        _check_length(self, data, shape)
        values = _count(shape)
        if not values:
            return torch.zeros(shape)
        scale, packed = _parted(data, _blocks(values, INT4_BLOCK), torch.uint8, most=7)
        packed = _filled_up(packed, len(scale) * INT4_BLOCK // 2)
        codes = torch.stack((packed & 15, packed >> 4), dim=1).view(len(scale), INT4_BLOCK)
        whole = codes.float().sub_(8.0).clamp_(min=-7.0)  # -8 is nothing that `encode` says
        tensor = whole.mul_(scale.unsqueeze(1)).view(-1)[:values].view(shape)
        return tensor if out is None else out.copy_(tensor)


class _TopK:
    """Of every block of 256 the 8 values of largest magnitude, as bfloat16 with their positions; 0.094 bytes
    per value. The rest counts as zero: alone it is never heard of."""

    name, number, lossy = "topk", 6, True

    def size_bytes(self, values: int) -> int:
        return 3 * TOP_KEPT * _blocks(values, TOP_BLOCK)

    def encode(self, tensor: torch.Tensor) -> Buffer:
        rows = in_blocks(tensor.detach().to(torch.float32).reshape(-1), TOP_BLOCK)
        position = rows.abs().topk(TOP_KEPT, dim=1, sorted=False).indices
        kept = rows.gather(1, position).to(torch.bfloat16)
        return b"".join((_bytes_of(kept), _bytes_of(position.to(torch.uint8))))

    def decode(self, data: Buffer, shape: tuple[int, ...], out: torch.Tensor | None = None) -> torch.Tensor:
        _check_length(self, data, shape)
        values = _count(shape)
        if not values:
            return torch.zeros(shape)
        blocks, view = _blocks(values, TOP_BLOCK), memoryview(data)
        kept = from_bytes(view[: 2 * TOP_KEPT * blocks], torch.bfloat16).view(blocks, TOP_KEPT)
        if not bool(torch.isfinite(kept).all()):
            raise CodecError("tensor is not finite")
        position = from_bytes(view[2 * TOP_KEPT * blocks :], torch.uint8).view(blocks, TOP_KEPT)
        rows = torch.zeros(blocks, TOP_BLOCK).scatter_(1, position.long(), kept.float())
        tensor = rows.view(-1)[:values].view(shape)
        return tensor if out is None else out.copy_(tensor)


def _blocks(values: int, block: int) -> int:
    return -(-values // block)


def in_steps(tensor: torch.Tensor, block: int, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale [blocks], values in steps of it, from -most to most [blocks, block]), filled up with zeros."""
    rows = in_blocks(tensor.detach().to(torch.float32).reshape(-1), block)
    scale = largest_of(rows).div_(most)
    return scale, in_units(rows, scale)


def largest_of(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of every block [blocks]."""
    # Not `aminmax`: along the innermost dimension it takes ten times as long as these two.
    return torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))


def in_units(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The values of every block in units of its scale, zeros if that is none."""
    inverse = torch.where(scale > 0, scale.reciprocal(), torch.zeros_like(scale)).clamp_(max=3e38)
    return torch.mul(rows, inverse.unsqueeze(1))


def in_blocks(flat: torch.Tensor, block: int) -> torch.Tensor:
    """[blocks, block], filled up with zeros; the same memory if none are needed."""
    blocks = _blocks(flat.numel(), block)
    return _filled_up(flat, blocks * block).view(blocks, block)


def _parted(data: Buffer, blocks: int, dtype: torch.dtype, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of the blocks, checked, and the codes. Raises CodecError."""
    scale, codes = _split(data, blocks, dtype)
    if not all(abs(float(end)) * most <= LARGEST for end in torch.aminmax(scale)):  # nor if one is NaN
        raise CodecError("tensor is not finite")
    return scale, codes


def _split(data: Buffer, blocks: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    view = memoryview(data)
    return from_bytes(view[: 4 * blocks], torch.float32), from_bytes(view[4 * blocks :], dtype)


def _filled_up(flat: torch.Tensor, values: int) -> torch.Tensor:
    """With zeros to so many values; the same tensor if it has them."""
    if flat.numel() == values:
        return flat
    return torch.cat([flat, flat.new_zeros(values - flat.numel())])


def _check_length(codec: Codec, data: Buffer, shape: tuple[int, ...]) -> None:
    expected = codec.size_bytes(_count(shape))
    if len(data) != expected:
        raise CodecError(f"{codec.name} tensor of shape {shape} takes {expected} bytes, got {len(data)}")


FLOAT16, INT8 = _Cast("float16", 2, torch.float16), _Int8()
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _Cast("float32", 1, torch.float32),
        FLOAT16,
        _Cast("bfloat16", 3, torch.bfloat16),
        INT8,
        _Int4(),
        _TopK(),
    )
}
_BY_NUMBER = {codec.number: codec for codec in CODECS.values()}


def codec_by_number(number: int) -> Codec:
    """The codec of that number on the wire. Raises CodecError."""
    try:
        return _BY_NUMBER[number]
    except KeyError:
        raise CodecError(f"unknown codec number {number}") from None
