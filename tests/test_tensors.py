"""States as tensors, in place: what the safetensors library writes, and what makes no sense."""

import json

import pytest
import safetensors.torch
import torch

from swarm.tensors import Pieces, pieces_of, tensors_in


def written(header: dict, body: bytes = b"") -> bytearray:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text + body)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_library_reads_states_that_we_write_and_we_read_its_own_in_place():
    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.0),
    }
    state["history"] = torch.arange(11, dtype=torch.uint8)
    ours, theirs = pieces_of(state).joined(), bytearray(safetensors.torch.save(state, {"format": "pt"}))
    for found in (safetensors.torch.load(bytes(ours)), tensors_in(ours), tensors_in(theirs)):
        assert found.keys() == state.keys()
        assert all(
            torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state
        )
    theirs[-1] ^= 1
    assert any(not torch.equal(found[name], state[name]) for name in state), "it is the same memory"


def test_floats_keep_their_order_and_lie_where_vectors_are_read_fastest():
    state = {"b": torch.ones(3), "history": torch.zeros(5, dtype=torch.uint8), "a": torch.ones(2)}
    data = pieces_of(state).joined()
    start = data.index(torch.ones(5).numpy().tobytes() + bytes(5))
    assert start % 64 == 0 and list(tensors_in(data)) == ["b", "a", "history"]


def test_pieces_are_read_as_if_they_were_one():
    data = bytes(range(60))
    pieces = Pieces([data[:1], b"", data[1:20], data[20:50], data[50:]])
    assert len(pieces) == 60 and pieces.joined() == data
    for start in range(61):
        for stop in range(65):
            assert pieces[start:stop] == data[start:stop]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        written({"a": 1}),
        written({"a": entry() | {"more": 1}}, bytes(8)),
        written({"a": entry(dtype="F64")}, bytes(8)),
        written({"a": entry(dtype=[])}, bytes(8)),
        written({"a": entry(shape=[-2], offsets=[0, 8])}, bytes(8)),
        written({"a": entry(shape=[1 << 62, 4], offsets=[0, 0])}, bytes(8)),
        written({"a": entry(shape=["2"])}, bytes(8)),
        written({"a": entry(shape=[True], offsets=[0, 4])}, bytes(8)),
        written({"a": entry(offsets=[0, 8, 8])}, bytes(8)),
        written({"a": entry(offsets=[8, 0])}, bytes(8)),
        written({"a": entry(offsets=[4, 12])}, bytes(8)),
        written({"a": entry(offsets=[1, 9])}, bytes(16)),
        written({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(16)),
        written({"a": entry(), "b": entry()}, bytes(16)),
    ],
)
def test_bytes_that_make_no_sense_are_refused(data):
    with pytest.raises(ValueError):
        tensors_in(bytearray(data))
