"""A float32 vector as bytes, without any loss: what came out of a codec is written as that had sent it.

    kinds       one byte per block of 512 values: float32, float16, or whole numbers in steps of a scale
    blocks      those of every kind together, in order

A mean that travelled in int8 takes a quarter of its size once more, and whoever reads it has its bits. The
codec need not be known: a block is what it looks like; if it looks like nothing it is written in full.
"""

from collections.abc import Callable
from itertools import accumulate

import torch

from averaging.codecs import INT8_BLOCK, from_bytes, in_blocks, in_units, largest_of
from averaging.errors import CodecError
from averaging.network import Buffer

FULL, HALF, STEPS = 0, 1, 2  # kinds
ULPS = (0, 1, -1, 2, -2)  # by which a block's scale may differ from what its largest value says
PART = 512  # blocks at once: what they are compared with finds room in a cache
COLUMNS = (  # after the kinds: types, and values of a block
    (torch.float32, INT8_BLOCK),
    (torch.float16, INT8_BLOCK),
    (torch.float32, 1),  # scales
    (torch.int8, INT8_BLOCK),
)


def pack(vector: torch.Tensor) -> bytes:
    """The bits of `vector` [values] float32."""
    packed = map(_packed, vector.split(PART * INT8_BLOCK))
    parts = (part for column in zip(*packed, strict=True) for part in column if part.numel())
    return b"".join(part.contiguous().view(torch.uint8).numpy().data for part in parts)


def _packed(vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Kinds, and what the blocks of each are written as."""
    rows = in_blocks(vector, INT8_BLOCK)
    scale, codes, stepped = _in_steps(rows)
    kinds = torch.where(stepped, STEPS, FULL).to(torch.uint8)
    others = rows[~stepped]
    halves = others.to(torch.float16)
    same = (halves.to(torch.float32).view(torch.int32) == others.view(torch.int32)).all(dim=1)
    kinds[~stepped] = torch.where(same, HALF, FULL).to(torch.uint8)
    return kinds, others[~same], halves[same], scale[stepped], codes[stepped]


def unpack(data: Buffer, values: int) -> torch.Tensor:
    """[values] float32. Raises CodecError."""
    view, blocks = memoryview(data), -(-values // INT8_BLOCK)
    if len(view) < blocks:
        raise CodecError(f"{len(view)} bytes are no vector of {values} values")
    kinds = from_bytes(view[:blocks], torch.uint8) if blocks else torch.empty(0)
    full, half, stepped = (int((kinds == kind).sum()) for kind in (FULL, HALF, STEPS))
    counts = zip((full, half, stepped, stepped), COLUMNS, strict=True)
    sizes = [count * width * dtype.itemsize for count, (dtype, width) in counts]
    if full + half + stepped != blocks or len(view) != blocks + sum(sizes):
        raise CodecError(f"{len(view)} bytes are no vector of {values} values")
    ends = [blocks + end for end in accumulate(sizes)]
    fulls, halves, scale, codes = (
        (from_bytes(view[end - size : end], dtype) if size else torch.empty(0)).view(-1, width)
        for end, size, (dtype, width) in zip(ends, sizes, COLUMNS, strict=True)
    )
    written: dict[int, Callable[[slice], torch.Tensor]] = {
        FULL: lambda some: fulls[some],
        HALF: lambda some: halves[some].to(torch.float32),
        STEPS: lambda some: codes[some] * scale[some],
    }
    rows, used = torch.empty(blocks, INT8_BLOCK), dict.fromkeys(written, 0)
    for part, their_kinds in zip(rows.split(PART), kinds.split(PART), strict=True):
        for kind, blocks_in in written.items():
            where = their_kinds == kind
            if count := int(where.sum()):
                part[where] = blocks_in(slice(used[kind], used[kind] + count))
                used[kind] += count
        if not bool(torch.isfinite(part).all()):
            raise CodecError("vector is not finite")
    return rows.view(-1)[:values]


def _in_steps(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale [blocks], codes [blocks, 512] int8, which of the blocks they give, bit by bit [blocks])."""
    largest = largest_of(rows)
    scale, found = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    codes = torch.zeros(rows.shape, dtype=torch.int8)
    left = torch.isfinite(largest).nonzero().view(-1)
    for ulps in ULPS:
        if not len(left):
            break
        whole = len(left) == len(rows)
        some = rows if whole else rows[left]
        guess = _moved((largest if whole else largest[left]) / 127.0, ulps)
        numbers = in_units(some, guess).round_().clamp_(-127, 127).to(torch.int8)
        good = ((numbers * guess.unsqueeze(1)).view(torch.int32) == some.view(torch.int32)).all(dim=1)
        if whole and bool(good.all()):
            return guess, numbers, good
        at = left[good]
        scale[at], codes[at], found[at] = guess[good], numbers[good], True
        left = left[~good]
    return scale, codes, found


def _moved(scale: torch.Tensor, ulps: int) -> torch.Tensor:
    """The float32 that is so many steps further; of a zero, zero."""
    return torch.where(scale > 0, (scale.view(torch.int32) + ulps).view(torch.float32), scale)
