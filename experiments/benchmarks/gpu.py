"""A stage on a GPU: is it right, how fast is it against plain PyTorch, how much memory does it take?

    python -m experiments.benchmarks.gpu [--device cuda] [--width 1024] [--json]

right     the same microbatches through a stage on the CPU and on the device: gradients, then one optimizer
          step; the largest relative difference of any tensor, in float32 without TF32. And whether a step
          with the same mean gradient has the same bits on both, as it must where both serve one stage
fast      forward, backward, accumulation and step of one stage with int8 tensors in and out, as a peer
          does it, against a plain PyTorch loop over the same module, in turns
memory    the device's peak during each, against the bytes of the parameters
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from averaging.codecs import CODECS
from experiments.benchmarks.report import report
from swarm.config import RunConfig, parse_run
from swarm.model import build_stage
from swarm.stage import Stage

RUN = """
name: gpu
model: {{width: {width}, layers: 12, heads: {heads}, stages: 3}}
training:
  sequence_tokens: 256
  microbatch_sequences: 8
  target_batch_tokens: 16384
  optimizer: {{clip_norm: null}}
"""
MIDDLE, MICROBATCHES, RUNS = 1, 8, 5


def make_stage(config: RunConfig, device: str) -> Stage:
    module = build_stage(config.model, MIDDLE, seed=0)
    return Stage(module, config.training, stage=MIDDLE, stages=config.model.stages, device=device)


def hidden(config: RunConfig, seed: int) -> torch.Tensor:
    training = config.training
    shape = (training.microbatch_sequences, training.sequence_tokens, config.model.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_step(stage: Stage, config: RunConfig) -> list[torch.Tensor]:
    """Two microbatches and a step; returns the gradient sums and the parameters, on the CPU."""
    for seed in range(2):
        y, graph = stage.forward(hidden(config, seed), keep_graph=True)
        assert graph is not None
        gradients, _ = stage.backward(graph, hidden(config, seed + 10).to(y.device))
        stage.accumulate(bytes(16), gradients, config.training.microbatch_tokens)
    sums = [s.cpu().clone() for s in stage.accumulator.sums]
    stage.apply(stage.mean(stage.freeze()))
    return sums + [p.detach().cpu() for p in stage.module.parameters()]


def worst_difference(config: RunConfig, device: str) -> float:
    """The largest relative difference (by norm) of any gradient or stepped parameter from the CPU's."""
    pairs = zip(
        one_step(make_stage(config, "cpu"), config), one_step(make_stage(config, device), config), strict=True
    )
    return max(((a - b).norm() / a.norm().clamp_min(1e-12)).item() for a, b in pairs)


def same_bits(config: RunConfig, device: str) -> bool:
    """Do a CPU and the device that begin with the same state agree after steps with the same gradients?"""
    stages = [make_stage(config, each) for each in ("cpu", device)]
    for seed in range(3):
        mean = torch.randn(stages[0].values, generator=torch.Generator().manual_seed(seed)) / 1e3
        for stage in stages:
            stage.apply(mean)
    return stages[0].hash() == stages[1].hash()


def as_a_peer(config: RunConfig, device: str) -> Callable[[], None]:
    """One optimizer step as a peer makes it, with encoded tensors in and out."""
    stage, codec = make_stage(config, device), CODECS["int8"]
    shape = tuple(hidden(config, 0).shape)
    x, grad = (bytearray(codec.encode(hidden(config, seed))) for seed in (0, 1))

    def step() -> None:
        for _ in range(MICROBATCHES):
            y, graph = stage.forward(codec.decode(x, shape), keep_graph=True)
            codec.encode(y)
            assert graph is not None
            gradients, grad_x = stage.backward(graph, codec.decode(grad, shape))
            assert grad_x is not None
            codec.encode(grad_x)
            stage.accumulate(bytes(16), gradients, config.training.microbatch_tokens)
        stage.apply(stage.mean(stage.freeze()))
        synchronize(device)

    return step


def plain(config: RunConfig, device: str) -> Callable[[], None]:
    """The same work without a swarm: tensors stay where they are."""
    module = build_stage(config.model, MIDDLE, seed=0).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, foreach=True)
    x, grad = (hidden(config, seed).to(device) for seed in (0, 1))

    def step() -> None:
        for _ in range(MICROBATCHES):
            module(x.requires_grad_(True)).backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    return step


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str, work: Callable[[], None]) -> int:
    if not device.startswith("cuda"):
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; `--device cpu` only checks that this script runs")
    torch.backends.cuda.matmul.allow_tf32 = False
    config = parse_run(RUN.format(width=options.width, heads=options.width // 64), source="gpu")
    difference = worst_difference(config, options.device)
    sides = {"plain": plain(config, options.device), "peer": as_a_peer(config, options.device)}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(RUNS + 1):
        for side, step in sides.items():
            began = time.perf_counter()
            step()
            if number:
                times[side].append(time.perf_counter() - began)
    tokens = MICROBATCHES * config.training.microbatch_tokens
    values = sum(p.numel() for p in build_stage(config.model, MIDDLE, seed=0).parameters())
    rows = [
        {
            "side": side,
            "tokens/s": tokens / statistics.median(times[side]),
            "peak MB": peak_bytes(options.device, sides[side]) / 1e6,
            "parameters MB": 4 * values / 1e6,
        }
        for side in sides
    ]
    ratios = {
        "peer_over_plain": statistics.median(times["plain"]) / statistics.median(times["peer"]),
        "worst_difference_from_cpu": difference,
        "same_bits_as_cpu": float(same_bits(config, options.device)),
    }
    report("gpu", rows, ratios, options.json)


if __name__ == "__main__":
    main()
