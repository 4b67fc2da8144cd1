"""Do delayed updates hide averaging? One stage on two peers, over a link that averaging fills.

    python -m experiments.benchmarks.overlap [--mbit 16] [--seconds 40] [--rounds 3] [--json]      needs root

The product's own `swarm run` in a network namespace whose loopback carries so many Mbit/s, three times:

    none      the target batch is out of reach, so nothing is averaged and no step taken
    delayed   averaging and the optimizer step run behind the next batch (`delayed_updates: true`)
    waiting   they do not

With a link on which `waiting` has half the tokens/s of `none`, averaging takes as long as computing a batch
does. The sides take turns, `--rounds` times; medians are reported.
"""

import argparse
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.benchmarks.links import end_unless_permitted, sh
from experiments.benchmarks.pipeline import lines_of, wait_for
from experiments.benchmarks.report import report

RUN = """
name: overlap
model: {width: 256, layers: 6, heads: 4, stages: 1}
data: {source: stdlib}
training:
  sequence_tokens: 256
  microbatch_sequences: 2
  target_batch_tokens: 16384
  steps: 1000000
  eval_every: 1000000
  eval_microbatches: 1
pipeline: {in_flight: 8}
averaging: {codec: int8}
monitor: {wandb: disabled}
local: {peers_per_stage: 2, trainers: 1, threads: 1}
"""
SIDES = {
    "none": ("training.target_batch_tokens=1000000000",),
    "delayed": ("training.delayed_updates=true",),
    "waiting": ("training.delayed_updates=false",),
}
WARM_UP_TOKENS, WARM_UP_STEPS = 30_000, 2


@contextlib.contextmanager
def slow_loopback(mbit: float) -> Iterator[str]:
    """A network namespace of that name, with nothing in it but a loopback of so many Mbit/s."""
    name = f"swarm{os.getpid()}"
    sh(f"ip netns add {name}")
    try:
        sh(f"ip -n {name} link set lo mtu 1500 up")  # packets as on a real link
        sh(f"tc -n {name} qdisc add dev lo root tbf rate {mbit}mbit burst 65536 latency 50ms")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def measure(side: str, mbit: float, seconds: float) -> dict[str, float]:
    """Tokens per second and steps of one run."""
    with slow_loopback(mbit) as name, tempfile.TemporaryDirectory() as folder:
        run_file = Path(folder) / "run.yaml"
        run_file.write_text(RUN)
        settings = [word for setting in SIDES[side] for word in ("--set", setting)]
        run = [sys.executable, "-m", "trainers.cli", "run", str(run_file), "--folder", folder, *settings]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(["ip", "netns", "exec", name, *run], stdout=log, stderr=log)
        metrics = Path(folder) / "overlap" / "metrics.jsonl"
        try:
            first = wait_for(process, metrics, functools.partial(_is_warm, side), limit_s=300)
            time.sleep(seconds)
            last = lines_of(metrics)[-1]
        finally:
            process.terminate()
            process.wait(60)
    took_s = last["time"] - first["time"]
    return {
        "tokens/s": (last["progress/tokens"] - first["progress/tokens"]) / took_s,
        "steps": last["progress/steps"] - first["progress/steps"],
        "averaging Mbit/s": (last["wire/averaging_bytes"] - first["wire/averaging_bytes"]) * 8e-6 / took_s,
    }


def _is_warm(side: str, line: dict[str, float]) -> bool:
    """Do both peers take part? The second one may have to load the first one's state over the link."""
    if line["progress/tokens"] < WARM_UP_TOKENS or line["swarm/peers"] < 2:
        return False
    return side == "none" or (line["wire/averaging_bytes"] > 0 and line["progress/steps"] >= WARM_UP_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mbit", type=float, default=16)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    end_unless_permitted()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, each in found.items():
            each.append(measure(side, options.mbit, options.seconds))
            print(side, each[-1], file=sys.stderr)
    rows: list[dict[str, float | str]] = []
    for side, each in found.items():
        medians = {name: statistics.median(one[name] for one in each) for name in each[0]}
        rows.append({"side": side, "link Mbit/s": options.mbit} | medians)
    rates = {str(row["side"]): float(row["tokens/s"]) for row in rows}
    ratios = {f"{side}_over_none": rates[side] / rates["none"] for side in ("delayed", "waiting")}
    report("delayed updates over a slow link", rows, ratios, options.json)


if __name__ == "__main__":
    main()
