"""Vectors without loss: every bit comes back, and what a codec had sent takes no more than it did."""

import pytest
import torch

from averaging.codecs import CODECS, INT8_BLOCK
from averaging.errors import CodecError
from averaging.exact import pack, unpack


def bits(vector: torch.Tensor) -> torch.Tensor:
    return vector.contiguous().view(torch.int32)


def travelled(values: int, codec: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(values, generator=generator) * 10 ** (
        torch.rand(values, generator=generator) * 6 - 5
    )
    return CODECS[codec].decode(CODECS[codec].encode(vector), (values,))


@pytest.mark.parametrize("values", [0, 1, 511, 512, 513, 100_000])
@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8", "int4", "topk"])
def test_every_bit_comes_back(codec, values):
    vector = travelled(values, codec)
    assert torch.equal(bits(unpack(pack(vector), values)), bits(vector))


@pytest.mark.parametrize(
    ("codec", "bytes_per_value"), [("int8", 1.011), ("float16", 2.003), ("float32", 4.003)]
)
def test_it_takes_what_the_codec_took(codec, bytes_per_value):
    values = 2000 * INT8_BLOCK
    packed = [len(pack(travelled(values, codec, seed))) for seed in range(3)]
    assert max(packed) <= bytes_per_value * values


def test_pieces_in_unlike_codecs_and_blocks_of_zeros_are_found_by_themselves():
    parts = [travelled(40 * INT8_BLOCK, "int8"), torch.zeros(3 * INT8_BLOCK), travelled(700, "float16")]
    parts.append(-torch.zeros(INT8_BLOCK))
    vector = torch.cat(parts)
    packed = pack(vector)
    assert torch.equal(bits(unpack(packed, vector.numel())), bits(vector)), "also the sign of a zero"
    assert len(packed) < 1.2 * vector.numel()


@pytest.mark.parametrize("spoil", ["short", "long", "kind", "infinite", "empty"])
def test_strangers_bytes_are_refused(spoil):
    values = 3 * INT8_BLOCK
    good = bytearray(pack(travelled(values, "int8")))
    if spoil == "kind":
        good[0] = 7
    if spoil == "infinite":
        good[3:7] = torch.tensor([float("inf")]).view(torch.uint8).numpy().tobytes()
    data = {"short": good[:-1], "long": good + b"x", "empty": b""}.get(spoil, good)
    with pytest.raises(CodecError):
        unpack(bytes(data), values)
