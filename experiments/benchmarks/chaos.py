"""Does the quickstart learn the same while its peers are being killed?

    python -m experiments.benchmarks.chaos [--seeds 1] [--chaos 15] [--json]

Runs the quickstart to its end twice per seed: left alone, and with a random peer SIGKILLed every 15 s.
Reported: how long the undisturbed run takes to a held-out loss below 2.5 nats per byte, and the two losses
at the same number of tokens (linear between evaluations).
"""

import argparse
import itertools
import statistics
import sys
from typing import Any

from experiments.benchmarks.quickstart import run_quickstart
from experiments.benchmarks.report import report

GOAL_NATS = 2.5


def run(seed: int, *more: str) -> dict[str, Any]:
    """One quickstart to its end; its summary."""
    return run_quickstart("--set", f"training.seed={seed}", *more)


def loss_at(evaluations: list[dict[str, float]], tokens: float) -> float:
    """Held-out loss at `tokens`, linear between the evaluations around it."""
    for before, after in itertools.pairwise(evaluations):
        if before["tokens"] <= tokens <= after["tokens"]:
            share = (tokens - before["tokens"]) / max(1, after["tokens"] - before["tokens"])
            return before["loss"] + share * (after["loss"] - before["loss"])
    raise ValueError(f"no evaluations around {tokens} tokens")


def seconds_to(evaluations: list[dict[str, float]], nats: float) -> float:
    """From the trainer's start to the first evaluation below `nats`."""
    return next((e["time_s"] for e in evaluations if e["loss"] < nats), float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--chaos", type=float, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, excess, goal_s = [], [], []
    for seed in range(options.seeds):
        calm, chaos = run(seed), run(seed, "--chaos", str(options.chaos))
        tokens = min(calm["evaluations"][-1]["tokens"], chaos["evaluations"][-1]["tokens"])
        losses = [loss_at(summary["evaluations"], tokens) for summary in (calm, chaos)]
        excess.append(losses[1] / losses[0])
        goal_s.append(seconds_to(calm["evaluations"], GOAL_NATS))
        for name, summary, loss in zip(("calm", "chaos"), (calm, chaos), losses, strict=True):
            rows.append(
                {
                    "seed": seed,
                    "run": name,
                    "loss at equal tokens": loss,
                    "tokens": tokens,
                    "s to below 2.5": seconds_to(summary["evaluations"], GOAL_NATS),
                    "tokens/s": summary["tokens_per_s"],
                    "kills": summary["kills"],
                    "rerouted": summary["microbatches"]["rerouted_hops"],
                    "lost": summary["microbatches"]["lost"],
                    "drifted": summary["drifted_states"],
                    "recovery p50 s": summary["recovery_s"]["p50"] or "",
                }
            )
            print(rows[-1], file=sys.stderr)
    ratios = {"chaos_over_calm": statistics.median(excess), "seconds_to_2_5": max(goal_s)}
    report("chaos", rows, ratios, options.json)


if __name__ == "__main__":
    main()
