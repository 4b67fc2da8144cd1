"""What the rules of moving keep of the best that changing peers could compute, on traces of spot instances.

    python -m experiments.benchmarks.simulate [--trace FILE [--unit hours]] [--runs 10] [--json]

Without a file: synthetic traces of 32 hours, another one for every run. 16 peers per traced instance, 4 and
16 stages of equal cost; a join or a move takes 60 s. Per cent of optimal: the weakest stage's capacity over
time, against the best integer assignment of the peers alive at each moment. The baselines run beside it:
nobody moves, and SWARM's own rule (arXiv:2301.11913, algorithm 2) every 300 s and every 60 s.

Then how fast whole runs are simulated, every hop of them, with hops of about 2 s.
"""

import argparse
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benchmarks.report import report, report_ratios
from swarm.config import RunConfig, parse_run
from trainers.simulation.run import Result, Simulation, Surroundings, simulate
from trainers.simulation.trace import UNITS_S, Trace, parse_trace, synthetic_trace

HOURS, WANTED, PER_INSTANCE, STATE_S = 32.0, 12, 16, 60.0
RULES = {
    "none": ["rebalancing.rule=none"],
    "paper, 300 s": ["rebalancing.rule=paper", "rebalancing.period_s=300"],
    "paper, 60 s": ["rebalancing.rule=paper", "rebalancing.period_s=60"],
    "default": [],
}
HOP_S, MICROBATCH = 2.0, 2048


def config(stages: int, overrides: list[str]) -> RunConfig:
    text = f"name: simulated\nmodel: {{layers: {stages}, stages: {stages}}}"
    return parse_run(text, source="simulated", overrides=overrides)


def one(stages: int, rule: str, speeds: tuple[float, ...], trace: Trace, seed: int) -> dict[str, float]:
    around = Surroundings(
        per_instance=PER_INSTANCE, speeds=speeds, costs=[1.0] * stages, state_s=STATE_S, seed=seed
    )
    result = simulate(config(stages, RULES[rule]), trace, around)
    first_s, end_s = result.first_s, result.end_s
    return {
        "of optimal": result.kept(),
        "first hour": result.kept(first_s, first_s + 3600),
        "last hour": result.kept(end_s - 3600),
        "moves": float(result.moves),
    }


def kept(
    pool: ProcessPoolExecutor, traces: list[Trace], stages: int, rule: str, speeds: tuple[float, ...]
) -> dict[str, Any]:
    jobs = [pool.submit(one, stages, rule, speeds, trace, seed) for seed, trace in enumerate(traces)]
    runs = [job.result() for job in jobs]
    means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    worst = min(run["of optimal"] for run in runs)
    return {"stages": stages, "rule": rule, "speeds": "equal" if len(speeds) == 1 else "1, 2, 4", **means} | {
        "worst run": worst
    }


def speed(peers: int, stages: int, trainers: int, seconds: float) -> dict[str, Any]:
    """A run of equal peers that are all there, every hop simulated."""
    batch = peers * 8 * MICROBATCH // stages
    overrides = [
        "model.width=1024",
        "training.sequence_tokens=512",
        f"training.target_batch_tokens={batch}",
        f"pipeline.in_flight={4 * peers // trainers}",
        "pipeline.hop_deadline_s=120",
    ]
    around = Surroundings(
        speeds=[MICROBATCH / HOP_S], costs=[1.0] * stages, state_s=10.0, trainers=trainers, seed=0
    )
    simulation = Simulation(config(stages, overrides), Trace((0.0,), (peers,), seconds), around)
    began_s = time.perf_counter()
    result = simulation.run()
    took_s = time.perf_counter() - began_s
    return {
        "peers": peers,
        "stages": stages,
        "trainers": trainers,
        "simulated s": seconds,
        "s": took_s,
        "simulated s per s": seconds / took_s,
        "hops per s": result.tokens[-1][1] / MICROBATCH * stages / took_s,
        "tokens of optimal, second half": _second_half(result),
    }


def _second_half(result: Result) -> float:
    half = [each for each in result.tokens if each[0] >= result.end_s / 2]
    (since_s, before), (until_s, after) = half[0], half[-1]
    return (after - before) / (until_s - since_s) / result.moments[-1].optimum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--unit", choices=UNITS_S, default="seconds")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--peers", type=int, nargs="*", default=[64, 1000], help="for the speed; none: skip")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.trace is not None:
        trace = parse_trace(options.trace.read_text(), source=str(options.trace), unit=options.unit)
        traces, name = [trace] * options.runs, options.trace.stem
    else:
        drawn = (random.Random(seed) for seed in range(options.runs))
        traces, name = [synthetic_trace(hours=HOURS, wanted=WANTED, rng=rng) for rng in drawn], "synthetic"
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with ProcessPoolExecutor() as pool:
        for stages in (4, 16):
            for rule in RULES:
                rows.append(kept(pool, traces, stages, rule, (1.0,)))
            ratios[f"optimal_default_{stages}stages"] = rows[-1]["of optimal"]
            rows += [kept(pool, traces, stages, rule, (1.0, 2.0, 4.0)) for rule in ("none", "default")]
    fast = [speed(peers, *((4, 1) if peers < 200 else (16, 8)), seconds=900.0) for peers in options.peers]
    ratios |= {f"seconds_per_second_{row['peers']}peers": row["simulated s per s"] for row in fast}
    report(f"simulate, {name}", rows, {}, False)
    if fast:
        report("simulate, every hop", fast, {}, False)
    report_ratios(f"simulate, {name}", [*rows, *fast], ratios, options.json)


if __name__ == "__main__":
    main()
