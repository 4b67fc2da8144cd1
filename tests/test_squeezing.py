"""Squeezed chunks: the same bits again, in fewer bytes where there is something to spare, and no bombs."""

import random
import zlib

import pytest
import torch

from swarm.squeezing import squeezed, unsqueezed


def chunk_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tail", [b"", b"x", b"xyz"])
@pytest.mark.parametrize("scale", [1e-8, 0.02, 1e6])
def test_weights_come_back_bit_by_bit_in_less_room(scale, tail):
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * scale
    data = chunk_of(values) + tail
    small = squeezed(data)
    assert small is not None and len(small) < 0.86 * len(data)
    assert unsqueezed(small, len(data)) == data


def test_all_that_float32_can_be_comes_back():
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3.4e38, -1.0]).repeat(100)
    data = chunk_of(odd) + chunk_of(torch.full((400,), float("nan")))
    assert unsqueezed(squeezed(data), len(data)) == data


@pytest.mark.parametrize("data", [b"", b"ab", random.Random(0).randbytes(100_000)])
def test_what_has_nothing_to_spare_stays_as_it_is(data):
    assert squeezed(data) is None


def test_what_is_no_squeezed_chunk_is_refused():
    data = chunk_of(torch.randn(1000))
    small, plain = squeezed(data), 3 * 1000
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    endless = bomb.compress(bytes(1 << 24)) + bomb.flush()
    for wrong in (b"", small[: plain - 1], small[:-1], small[:plain] + b"\xff" * 50, small[:plain] + endless):
        with pytest.raises(ValueError, match="squeezed chunk"):
            unsqueezed(wrong, len(data))
    with pytest.raises(ValueError, match="squeezed chunk"):
        unsqueezed(small, len(data) + 4)
