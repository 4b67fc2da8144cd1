"""How long the hops of a killed peer wait until another has them: the distribution over many SIGKILLs.

    python -m experiments.benchmarks.recovery [--kills 20] [--json]

Runs the quickstart's processes (six peers, one trainer) and SIGKILLs a random serving peer every few
seconds. Recovery is the time from the kill (the organizer's clock) to the last of that peer's hops being
accepted by another (reported by that one). Deaths with no hop under way have nothing to recover and are
counted apart.
"""

import argparse
import statistics
import sys
from typing import Any

from experiments.benchmarks.quickstart import run_quickstart
from experiments.benchmarks.report import report

INTERVAL_S = 6.0


def recoveries(kills: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds per recovered death, and the run's summary."""
    minutes = (kills * 1.35 * INTERVAL_S + 15) / 60
    summary = run_quickstart(
        "--chaos", str(INTERVAL_S), "--minutes", f"{minutes:.2f}", "--set", "training.steps=100000"
    )
    return summary["recovery_s"]["all"], summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    times, summary = recoveries(options.kills)
    times.sort()
    if len(times) < options.kills:
        print(f"only {len(times)} deaths had hops under way", file=sys.stderr)
    rows = [
        {
            "kills": summary["kills"],
            "with hops under way": len(times),
            "p50 s": statistics.median(times),
            "p90 s": times[int(0.9 * (len(times) - 1))],
            "max s": times[-1],
            "tokens/s": summary["tokens_per_s"],
            "rerouted hops": summary["microbatches"]["rerouted_hops"],
        }
    ]
    ratios = {"p50_s": statistics.median(times), "max_s": times[-1]}
    report("recovery", rows, ratios, options.json)


if __name__ == "__main__":
    main()
