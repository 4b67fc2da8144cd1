"""A float32 vector as bytes, without any loss: what came out of a codec is written as that had sent it.

    kinds       one byte per block of 512 values: float32, float16, or whole numbers in steps of a scale
    blocks      those of every kind together, in order

A mean that travelled in int8 takes a quarter of its size once more, and whoever reads it has its bits. The
codec need not be known: a block is what it looks like; if it looks like nothing it is written in full.
"""

import torch

from averaging.codecs import INT8_BLOCK, from_bytes, in_blocks, in_units, largest_of
from averaging.errors import CodecError
from averaging.network import Buffer

FULL, HALF, STEPS = 0, 1, 2  # kinds
ULPS = (0, 1, -1, 2, -2)  # by which a block's scale may differ from what its largest value says


def pack(vector: torch.Tensor) -> bytes:
    """The bits of `vector` [values] float32."""
    rows = in_blocks(vector, INT8_BLOCK)
    bits = rows.view(torch.int32)
    scale, codes, stepped = _in_steps(rows, bits)
    halves = rows.to(torch.float16)
    half = ~stepped & (halves.to(torch.float32).view(torch.int32) == bits).all(dim=1)
    kinds = torch.full((len(rows),), FULL, dtype=torch.uint8)
    kinds[half], kinds[stepped] = HALF, STEPS
    parts = (kinds, rows[kinds == FULL], halves[half], scale[stepped], codes[stepped])
    return b"".join(part.contiguous().view(torch.uint8).numpy().data for part in parts if part.numel())


def unpack(data: Buffer, values: int) -> torch.Tensor:
    """[values] float32. Raises CodecError."""
    view, blocks = memoryview(data), -(-values // INT8_BLOCK)
    if len(view) < blocks:
        raise CodecError(f"{len(view)} bytes are no vector of {values} values")
    kinds = from_bytes(view[:blocks], torch.uint8) if blocks else torch.empty(0)
    counts = [int((kinds == kind).sum()) for kind in (FULL, HALF, STEPS)]
    row_bytes = (4 * INT8_BLOCK, 2 * INT8_BLOCK, 4 + INT8_BLOCK)
    sizes = [count * size for count, size in zip(counts, row_bytes, strict=True)]
    if sum(counts) != blocks or len(view) != blocks + sum(sizes):
        raise CodecError(f"{len(view)} bytes are no vector of {values} values")
    rows = torch.empty(blocks, INT8_BLOCK)
    at = blocks

    def taken(dtype: torch.dtype, count: int, width: int) -> torch.Tensor:
        nonlocal at
        begin, at = at, at + count * width * dtype.itemsize
        return from_bytes(view[begin:at], dtype).view(count, width)

    if counts[FULL]:
        rows[kinds == FULL] = taken(torch.float32, counts[FULL], INT8_BLOCK)
    if counts[HALF]:
        rows[kinds == HALF] = taken(torch.float16, counts[HALF], INT8_BLOCK).to(torch.float32)
    if counts[STEPS]:
        scale = taken(torch.float32, counts[STEPS], 1)
        rows[kinds == STEPS] = taken(torch.int8, counts[STEPS], INT8_BLOCK) * scale
    vector = rows.view(-1)[:values]
    if not bool(torch.isfinite(vector).all()):
        raise CodecError("vector is not finite")
    return vector


def _in_steps(rows: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale [blocks], codes [blocks, 512] int8, which of the blocks they give, bit by bit [blocks])."""
    largest = largest_of(rows)
    scale, found = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    codes = torch.zeros(rows.shape, dtype=torch.int8)
    left = torch.isfinite(largest).nonzero().view(-1)
    for ulps in ULPS:
        if not len(left):
            break
        whole = len(left) == len(rows)
        some, their_bits = (rows, bits) if whole else (rows[left], bits[left])
        guess = _moved((largest if whole else largest[left]) / 127.0, ulps)
        numbers = in_units(some, guess).round_().clamp_(-127, 127).to(torch.int8)
        good = ((numbers * guess.unsqueeze(1)).view(torch.int32) == their_bits).all(dim=1)
        at = left[good]
        scale[at], codes[at], found[at] = guess[good], numbers[good], True
        left = left[~good]
    return scale, codes, found


def _moved(scale: torch.Tensor, ulps: int) -> torch.Tensor:
    """The float32 that is so many steps further; of a zero, zero."""
    return torch.where(scale > 0, (scale.view(torch.int32) + ulps).view(torch.float32), scale)
