"""The step: that of torch's AdamW, but with the same bits on every processor.

What a peer computes from the bytes that all of its stage are sent is run on processors that fuse
multiplication and addition and on one that does not, with one thread and with two, and on a GPU if there is
one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from averaging.codecs import CODECS
from averaging.lowrank import LowRank
from swarm.config import OptimizerConfig, TrainingConfig, parse_run
from swarm.history import History
from swarm.model import build_stage
from swarm.optimizer import PART, AdamW, learning_rate
from swarm.stage import HISTORY, Stage
from tests.plain import make_adamw

SHAPES = [torch.Size(shape) for shape in ((300, 500), (64, 64), (500,), (3,), (7, 9))]
SIZES = [shape.numel() for shape in SHAPES]
STEPS = 4
# Of x86: none of its newer instructions, fused multiplication and addition, all that this machine has; and
# two of the ways in which MKL rounds.
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_VML_DEBUG_CPU_TYPE": "3"}
PROCESSORS: list[tuple[dict[str, str], int, str]] = [
    (OTHER_PROCESSOR, 1, "cpu"),
    ({"ATEN_CPU_CAPABILITY": "avx2", "MKL_VML_DEBUG_CPU_TYPE": "5"}, 1, "cpu"),
    ({}, 2, "cpu"),
]
if torch.cuda.is_available():
    PROCESSORS.append(({}, 1, "cuda"))


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_are_those_of_torch(clip_norm):
    assert SIZES[0] > PART, "parts are to be cut"
    config = OptimizerConfig(clip_norm=clip_norm, beta1=0.8, weight_decay=0.2)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(SIZES), generator=generator)
    theirs = [nn.Parameter(p.view(s).clone()) for p, s in zip(values.split(SIZES), SHAPES, strict=True)]
    torchs = make_adamw(theirs, config)
    ours = AdamW(config, SHAPES, torch.device("cpu"))
    for number in range(STEPS):
        gradient = torch.randn(len(values), generator=generator) * 10.0**-number
        rate = learning_rate(config, number, 100)
        ours.step(values, gradient.clone(), number=number, lr=rate)
        for parameter, part in zip(theirs, gradient.split(SIZES), strict=True):
            parameter.grad = part.view_as(parameter)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(theirs, clip_norm)
        for group in torchs.param_groups:
            group["lr"] = rate
        torchs.step()
        expected = torch.cat([p.detach().reshape(-1) for p in theirs])
        assert (values - expected).norm() < 1e-6 * expected.norm()


def test_a_gradient_is_left_as_it_is():
    gradient = torch.ones(sum(SIZES))
    AdamW(OptimizerConfig(clip_norm=0.1), SHAPES, torch.device("cpu")).step(
        torch.zeros(sum(SIZES)), gradient, number=0, lr=0.1
    )
    assert torch.equal(gradient, torch.ones(sum(SIZES)))


def test_what_peers_make_of_the_same_bytes_has_the_same_bits_on_every_processor(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    values = sum(SIZES)
    file = {
        "state": torch.randn(3, values, generator=generator),
        "own": torch.randn(values, generator=generator),
    }
    file["state"][2].abs_()
    means = [torch.randn(values, generator=generator) * 0.01 for _ in range(STEPS)]
    for name, codec in CODECS.items():
        for number, mean in enumerate(means):
            data = codec.encode(mean)
            file[f"{name}/{number}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    factors = LowRank(SHAPES, 2)
    first = factors.first(means[0], 1.0)
    file["factors/0"], file["factors/1"] = first, factors.second(first)
    safetensors.torch.save_file(file, path := tmp_path / "bytes.safetensors")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_optimizer", str(path), str(threads), device],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            text=True,
        )
        for settings, threads, device in PROCESSORS
    ]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    capabilities = {each.pop("capability") for each in found}
    assert len(capabilities) > 1 or "DEFAULT" in capabilities, "an x86 processor is to pretend to be older"
    differing = {what for each in found for what in each if each[what] != found[0][what]}
    assert not differing and len(found[0]) == len(CODECS) + 2


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in SHAPES)


def _hashes(path: str, threads: int, device: str) -> dict[str, str]:
    """Of the state after a few steps with every codec, with factors of low rank, and of one from the seed."""
    torch.set_num_threads(threads)
    file = safetensors.torch.load_file(path)
    found = {"capability": torch.backends.cpu.get_cpu_capability()}

    def stage() -> Stage:
        made = Stage(_Module(), TrainingConfig(), stage=0, stages=1, device=device)
        kinds = ("parameter", "exp_avg", "exp_avg_sq")
        state = {
            f"{kind}/tensors.{index}": part.view(shape)
            for kind, vector in zip(kinds, file["state"], strict=True)
            for index, (part, shape) in enumerate(zip(vector.split(SIZES), SHAPES, strict=True))
        }
        history = torch.tensor(bytearray(History().pack()), dtype=torch.uint8)
        made.load(state | {HISTORY: history}, 3)
        return made

    for name, codec in CODECS.items():
        using = stage()
        for number in range(STEPS):
            data = file[f"{name}/{number}"].numpy().tobytes()
            using.apply(codec.decode(data, (sum(SIZES),)))
        found[name] = using.hash().hex()
    factors, using = LowRank(SHAPES, 2), stage()
    factors.first(file["own"], 1.0)
    factors.second(file["factors/0"])
    using.apply(factors.result(file["factors/1"], counted=True))
    found["factors"] = using.hash().hex()
    run = parse_run(
        "name: x\nmodel: {width: 64, layers: 2, heads: 2, vocabulary: 200, stages: 1}\n", source="f"
    )
    begun = Stage(build_stage(run.model, 0, seed=3), run.training, stage=0, stages=1, device=device)
    found["from the seed"] = begun.hash().hex()
    return found


if __name__ == "__main__":
    print(json.dumps(_hashes(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
