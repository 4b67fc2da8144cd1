"""A state as bytes, where its tensors lie, and as tensors again, in place.

Copying a large one to fresh memory takes a good part of the time that fetching it takes.

The safetensors format: the header's length (8 bytes, little endian), the header (JSON), the tensors' bytes.
Source: https://huggingface.co/docs/safetensors, "Format".

Torch, no I/O.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch

from averaging.network import Buffer

LENGTH_BYTES = 8
ALIGNED = 64  # where the first tensor lies: eight would do, but vectors are read fastest so
DTYPES = {"F32": torch.float32, "U8": torch.uint8}  # all that a state consists of
METADATA = "__metadata__"


class Pieces:
    """Bytes that lie in several places, one after the other."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._parts = [memoryview(part) for part in parts if len(part)]
        self._starts = [0, *accumulate(map(len, self._parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> Buffer:
        """Those from `start` to `stop`: in their place, or copied if they lie in several."""
        start, stop, _ = span.indices(len(self))
        found, at = list[memoryview](), bisect_right(self._starts, start) - 1
        while start < stop:
            first, last = self._starts[at], self._starts[at + 1]
            found.append(self._parts[at][start - first : min(stop, last) - first])
            start, at = last, at + 1
        return found[0] if len(found) == 1 else b"".join(found)

    def joined(self) -> bytearray:
        """All of it, copied."""
        data = bytearray(len(self))
        for start, part in zip(self._starts, self._parts, strict=False):
            data[start : start + len(part)] = part
        return data


def pieces_of(tensors: Mapping[str, torch.Tensor]) -> Pieces:
    """Float32 and uint8 tensors, of any shape, as a safetensors file: in their order, but floats first, and
    those on the CPU in their own memory."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda each: -each[1].dtype.itemsize)
    header, end = {}, 0
    for name, tensor in ordered:
        first, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNED)
    lead = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return Pieces([lead, *(_bytes_of(tensor) for _, tensor in ordered)])


def _bytes_of(tensor: torch.Tensor) -> Buffer:
    flat = tensor.detach().reshape(-1).cpu()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def tensors_in(data: bytearray | memoryview) -> dict[str, torch.Tensor]:
    """The tensors by name, in the memory of `data`. Raises ValueError."""
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if not LENGTH_BYTES < start <= len(data):
        raise ValueError(f"{len(data)} bytes are no safetensors file")
    whole = torch.frombuffer(data, dtype=torch.uint8)
    try:
        header = json.loads(bytes(data[LENGTH_BYTES:start]))
        tensors = {
            name: _tensor(whole, start, name, **entry) for name, entry in header.items() if name != METADATA
        }
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"its header is malformed: {error}") from None
    spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors.values())
    if any(end > first for (_, end), (first, _) in pairwise(spans)):
        raise ValueError("its tensors overlap")  # a step would write into several of them at once
    return tensors


def _tensor(
    data: torch.Tensor, start: int, name: str, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> torch.Tensor:
    numbers = [*shape, *data_offsets]
    if dtype not in DTYPES or len(data_offsets) != 2 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"tensor {name!r} is malformed")
    first, end = (start + offset for offset in data_offsets)
    width, values = DTYPES[dtype].itemsize, math.prod(shape)
    if end > len(data) or end - first != values * width or first % width:
        raise ValueError(f"tensor {name!r} does not lie where its header says")
    if not values:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return data[first:end].view(DTYPES[dtype]).view(shape)
