"""A state as bytes, copied once, and as tensors again, in place.

Copying a large one to fresh memory takes a good part of the time that fetching it takes.

The safetensors format: the header's length (8 bytes, little endian), the header (JSON), the tensors' bytes.
Source: https://huggingface.co/docs/safetensors, "Format".

Torch, no I/O.
"""

import json
import math
from collections.abc import Mapping

import torch

LENGTH_BYTES = ALIGNED = 8
DTYPES = {"F32": torch.float32, "U8": torch.uint8}  # all that a state consists of
METADATA = "__metadata__"


def packed(tensors: Mapping[str, torch.Tensor]) -> bytearray:
    """Float32 and uint8 tensors, of any shape and on any device, as the safetensors library writes them."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda each: (-each[1].dtype.itemsize, each[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        first, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    start = LENGTH_BYTES + len(text)
    data = bytearray(start + end)
    data[:start] = len(text).to_bytes(LENGTH_BYTES, "little") + text
    for name, place in tensors_in(data).items():
        place.copy_(tensors[name])
    return data


def tensors_in(data: bytearray) -> dict[str, torch.Tensor]:
    """The tensors by name, in the memory of `data`. Raises ValueError."""
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if not LENGTH_BYTES < start <= len(data):
        raise ValueError(f"{len(data)} bytes are no safetensors file")
    try:
        header = json.loads(bytes(data[LENGTH_BYTES:start]))
        return {
            name: _tensor(data, start, name, **entry) for name, entry in header.items() if name != METADATA
        }
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"its header is malformed: {error}") from None


def _tensor(
    data: bytearray, start: int, name: str, *, dtype: str, shape: list[int], data_offsets: list[int]
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
    return torch.frombuffer(data, dtype=DTYPES[dtype], count=values, offset=first).view(shape)
