"""Checkpoints on disk: whole or not there, and read only if every byte is right."""

import json

import pytest
import torch

from swarm.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    checkpoints_in,
    keep_newest,
    read_checkpoint,
)
from swarm.holdings import serialized
from swarm.model import build_stage
from swarm.stage import Stage
from tests.sim import tiny_run


def stage_of(config, number: int, step: int) -> Stage:
    stage = Stage(build_stage(config.model, number, seed=0), config.training, stage=number, stages=3)
    for at in range(step):
        stage.apply(torch.full((stage.values,), 0.01), [at.to_bytes(16, "big")])
    return stage


def write(folder, config, step: int = 2):
    writer = CheckpointWriter(folder, config, step)
    for number in (2, 0, 1):
        writer.add(number, serialized(stage_of(config, number, step)), step)
    return writer.finish()


@pytest.mark.parametrize("strict", ["true", "false"])
def test_what_was_written_is_read_and_every_stage_can_load_it(tmp_path, strict):
    config = tiny_run(f"training.strict={strict}", "training.delayed_updates=false")
    written = write(tmp_path, config)
    found = read_checkpoint(written.folder, config)
    assert found == written and found.step == 2 and found.versions == (2, 2, 2)
    for number, path in enumerate(found.files):
        from safetensors.torch import load

        again = stage_of(config, number, 0)
        again.load(load(path.read_bytes()), found.step)
        assert again.hash() == stage_of(config, number, 2).hash()


def test_one_that_is_not_finished_is_not_there(tmp_path):
    config = tiny_run()
    writer = CheckpointWriter(tmp_path, config, 7)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        writer.add(0, b"abc", 7)
    writer.add(0, serialized(stage_of(config, 0, 0)), 7)
    assert checkpoints_in(tmp_path) == []
    writer.drop()
    assert list(tmp_path.iterdir()) == []


def test_the_newest_ones_are_kept_and_one_of_the_same_step_is_replaced(tmp_path):
    config = tiny_run()
    for step in (1, 2, 10, 2):
        write(tmp_path, config, step)
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        "step-00000001",
        "step-00000002",
        "step-00000010",
    ]
    keep_newest(tmp_path, 2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002", "step-00000010"]
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000010.bad")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002"]


def described(folder, **changes) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_bytes(folder):
    path = folder / "stage-1.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(folder):
    path = folder / "stage-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_shapes(folder):
    """Files of another model under a description of this one."""
    other = tiny_run("model.width=16")
    written = write(folder.parent / "other", other)
    model = json.loads((folder / "checkpoint.json").read_text())["model"]
    for path in written.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    described(folder, model=model)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_bytes, r"stage-1.safetensors: sha256 is not the one"),
        (cut_short, r"stage-1.safetensors: size_bytes: \d+, checkpoint.json says \d+"),
        (
            lambda folder: (folder / "stage-2.safetensors").unlink(),
            "stage-2.safetensors: cannot be read: No such",
        ),
        (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json: cannot be read: No such"),
        (
            lambda folder: (folder / "checkpoint.json").write_text("{"),
            "checkpoint.json: the file: Invalid JSON",
        ),
        (
            lambda folder: described(folder, format=0),
            "checkpoint.json: format 0 is older than this program's 1",
        ),
        (lambda folder: described(folder, format=2), "checkpoint.json: format 2 is newer"),
        (
            lambda folder: described(folder, stages=[{"version": -1}]),
            "checkpoint.json: stages.0.name: Field req",
        ),
        (lambda folder: (folder / "checkpoint.json").write_bytes(b"\xff\x00"), "checkpoint.json: is no text"),
        (lambda folder: described(folder, stages=[]), "checkpoint.json: stages: 0 of 3 are there"),
        (lambda folder: described(folder, strict=True), "checkpoint.json: strict is True, the run has"),
        (other_shapes, r"stage-0.safetensors: exp_avg/\S+ is \(16, 16\), in the run's model it is \(16, 8\)"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_refused_with_one_line(tmp_path, spoil, says):
    config = tiny_run()
    folder = write(tmp_path, config).folder
    spoil(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(folder, config)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused_by_its_description(tmp_path):
    folder = write(tmp_path, tiny_run()).folder
    with pytest.raises(CheckpointError, match=r"checkpoint.json: model.width is 8, the run has 16"):
        read_checkpoint(folder, tiny_run("model.width=16"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be created: Not a directory"):
        CheckpointWriter(tmp_path / "file", tiny_run(), 1)
