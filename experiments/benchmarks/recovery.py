"""How long the hops of a killed peer wait until another has them: the distribution over many SIGKILLs.

    python -m experiments.benchmarks.recovery [--kills 20] [--json]

Runs the quickstart's processes (six peers, one trainer) and SIGKILLs a random serving peer every few
seconds. Recovery is the time from the kill (the organizer's clock) to the last of that peer's hops being
accepted by another (reported by that one). Deaths with no hop under way have nothing to recover and are
counted apart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.benchmarks.report import report

INTERVAL_S = 6.0
RUN_FILE = Path(__file__).parent.parent / "quickstart.yaml"


def recoveries(kills: int) -> tuple[list[float], dict[str, object]]:
    """Seconds per recovered death, and the run's summary."""
    with tempfile.TemporaryDirectory() as folder:
        minutes = (kills * 1.35 * INTERVAL_S + 15) / 60
        command = [
            sys.executable, "-m", "trainers.cli", "run", str(RUN_FILE), "--folder", folder,
            "--chaos", str(INTERVAL_S), "--minutes", f"{minutes:.2f}",
            "--set", "training.steps=100000", "--set", "monitor.wandb=disabled",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        path = Path(folder) / "quickstart" / "summary.json"
        if result.returncode or not path.exists():
            raise SystemExit(f"the run failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
        summary = json.loads(path.read_text())
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
            "rerouted hops": summary["microbatches"]["rerouted_hops"],  # type: ignore[index]
        }
    ]
    ratios = {"p50_s": statistics.median(times), "max_s": times[-1]}
    report("recovery", rows, ratios, options.json)


if __name__ == "__main__":
    main()
