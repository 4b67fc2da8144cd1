"""Tokens per second of the same model on the same cores: plain PyTorch, our swarm, and a hub.

    python -m experiments.benchmarks.pipeline [--widths 256 512 1024] [--seconds 30] [--rounds 3] [--json]

    plain   one process, one module, all cores; accumulates the microbatches of a step, AdamW
    swarm   the product's own commands: one peer per stage as processes, one trainer, int8 between stages
    hub     hivemind's MoE servers, one per stage, and a trainer that calls them hop by hop (see hub.py);
            hub16 is the same with tensors in float16 instead of hivemind's default

Three stages of one layer each (more with `--layers`: less to send for what is computed), microbatches of
4 x 256 tokens, six in flight, six per optimizer step. All of it counts on every side: forward, backward,
what is retained, accumulation and the optimizer. Each figure is taken over a window that begins when the
pipeline is full; the sides take turns, `--rounds` times, and the median is reported.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.benchmarks.report import report
from experiments.benchmarks.workers import end_workers, start_worker
from swarm.config import RunConfig, load_run
from swarm.model import build_stage

HUB_HANGS_BYTES = 4 << 20  # hivemind's unary answers of that size never arrive
RUN = """
name: pipeline
model: {{width: {width}, layers: {layers}, heads: {heads}, stages: 3}}
data: {{source: stdlib}}
training:
  sequence_tokens: 256
  microbatch_sequences: 4
  target_batch_tokens: 6144
  steps: 1000000
  eval_every: 1000000
  eval_microbatches: 1
  optimizer: {{clip_norm: null}}
pipeline: {{codec: int8, in_flight: 6, hop_deadline_s: 300, keep_graphs: 8}}
averaging: {{codec: int8}}
monitor: {{wandb: disabled, period_s: 1}}
local: {{peers_per_stage: 1, trainers: 1, threads: 1}}
"""


def plain_tokens_per_s(config: RunConfig, seconds: float) -> float:
    """One process with every core: a loop over microbatches and steps."""
    torch.set_num_threads(os.cpu_count() or 1)
    training, model = config.training, config.model
    whole = build_stage(model.model_copy(update={"stages": 1}), 0, seed=training.seed)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3, foreach=True)
    shape = (training.microbatch_sequences, training.sequence_tokens + 1)
    per_step = training.target_batch_tokens // training.microbatch_tokens

    def step() -> None:
        for _ in range(per_step):
            tokens = torch.randint(0, model.vocabulary, shape)
            logits = whole(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            (loss / training.target_batch_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return steps * training.target_batch_tokens / (time.perf_counter() - began)


def swarm_tokens_per_s(run_file: Path, seconds: float) -> float:
    """`swarm run` with its local peers and trainer, measured by the metrics it writes."""
    folder = Path(tempfile.mkdtemp(dir=run_file.parent))
    command = [sys.executable, "-m", "trainers.cli", "run", str(run_file), "--folder", str(folder)]
    log = (run_file.parent / "swarm.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    metrics = folder / "pipeline" / "metrics.jsonl"
    try:
        first = wait_for(process, metrics, lambda line: line["progress/steps"] >= 1, limit_s=600)
        time.sleep(seconds)
        last = lines_of(metrics)[-1]
        return (last["progress/tokens"] - first["progress/tokens"]) / (last["time"] - first["time"])
    finally:
        process.terminate()
        process.wait(30)


def wait_for(
    process: "subprocess.Popen[bytes]",
    metrics: Path,
    ready: Callable[[dict[str, float]], bool],
    *,
    limit_s: float,
) -> dict[str, float]:
    """The newest line of metrics once it is `ready`, in the moment that tokens are counted anew."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        lines = lines_of(metrics)
        if lines and ready(lines[-1]):
            return lines[-1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"the swarm did not get under way within {limit_s:.0f} s: see {metrics.parent}")


def lines_of(metrics: Path) -> list[dict[str, float]]:
    """What the organizer has written of a run so far."""
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]


@contextlib.contextmanager
def hub_servers(run_file: Path, stages: int, *more: str) -> Iterator[list[str]]:
    """One hivemind server process per stage; yields their addresses."""
    command = [sys.executable, "-m", "experiments.benchmarks.hub", str(run_file), *more, "--stage"]
    servers = [start_worker([*command, str(stage)]) for stage in range(stages)]
    try:
        addresses = [server.stdout.readline().strip() for server in servers if server.stdout]
        if not all(addresses):
            raise SystemExit("a hub server did not start")
        yield addresses
    finally:
        end_workers(servers)


def hub_tokens_per_s(run_file: Path, config: RunConfig, seconds: float, *more: str) -> float:
    """In a process of its own: hivemind's client leaves threads and a daemon behind."""
    with hub_servers(run_file, config.model.stages, *more) as addresses:
        command = [sys.executable, "-m", "experiments.benchmarks.hub", str(run_file)]
        result = subprocess.run(
            [*command, "--seconds", str(seconds), "--servers", *addresses],
            capture_output=True, text=True, timeout=seconds + 900, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"the hub's trainer failed: {result.stderr[-1500:]}")
        return float(result.stdout.strip().splitlines()[-1])


def measure(width: int, layers: int, seconds: float, rounds: int, hub: bool) -> dict[str, float]:
    """Median tokens/s of each side at one width."""
    figures: dict[str, list[float]] = {"plain": [], "swarm": [], "hub": [], "hub16": []}
    with tempfile.TemporaryDirectory() as folder:
        run_file = Path(folder) / "run.yaml"
        run_file.write_text(RUN.format(width=width, layers=layers, heads=width // 64))
        config = load_run(run_file)
        for _ in range(rounds):
            figures["plain"].append(plain_tokens_per_s(config, seconds))
            figures["swarm"].append(swarm_tokens_per_s(run_file, seconds))
            tensor_bytes = 4 * config.training.microbatch_tokens * width
            fits = tensor_bytes < HUB_HANGS_BYTES and hub
            figures["hub"].append(hub_tokens_per_s(run_file, config, seconds) if fits else math.nan)
            figures["hub16"].append(
                hub_tokens_per_s(run_file, config, seconds, "--float16") if hub else math.nan
            )
            print({"width": width} | {k: round(v[-1], 1) for k, v in figures.items()}, file=sys.stderr)
    return {side: statistics.median(values) for side, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--no-hub", action="store_true", help="only plain and swarm")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows, ratios = [], {}
    for width in options.widths:
        seconds = options.seconds * max(1.0, (width / 512) ** 2 / 2)  # enough steps at every width
        found = measure(width, options.layers, seconds, options.rounds, not options.no_hub)
        over_plain, over_hub = found["swarm"] / found["plain"], found["swarm"] / found["hub"]
        speeds = {f"{s} tokens/s": None if math.isnan(v) else round(v, 1) for s, v in found.items()}
        rows.append({"width": width} | speeds | {"swarm / plain": over_plain})
        ratios[f"swarm_over_plain_w{width}"] = over_plain
        if not math.isnan(over_hub):
            ratios[f"swarm_over_hub_w{width}"] = over_hub
    report("pipeline", rows, ratios, options.json)


if __name__ == "__main__":
    main()
