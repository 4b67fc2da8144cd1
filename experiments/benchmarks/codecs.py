"""Does the quickstart's model learn the same when its gradients are averaged with fewer bits?

    python -m experiments.benchmarks.codecs [--codecs float32 int8 int4 rank4 topk] [--seeds 0 1 2] [--json]

One stage on four peers, trained with float32 and with each codec; reported are the losses at the same number
of tokens and the bytes that averaging took. `rank4` is PowerSGD, its factors in float16. Training is strict,
so that every run takes the same batches in the same steps; by how much float32 differs from itself shows what
is noise: about a per cent, so the ratios are medians over the seeds.
"""

import argparse
import statistics
import sys

from experiments.benchmarks.chaos import loss_at
from experiments.benchmarks.quickstart import run_quickstart
from experiments.benchmarks.report import report

ONE_STAGE = (
    "model.stages=1",
    "local.peers_per_stage=4",
    "pipeline.in_flight=8",
    "training.strict=true",
    "training.eval_every=20",
)


def averaging_of(name: str) -> list[str]:
    """The settings of the run file behind a name."""
    if name.startswith("rank"):
        return [f"averaging.rank={name.removeprefix('rank')}", "averaging.codec=float16"]
    return [f"averaging.codec={'float32' if name == 'reference' else name}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=["float32", "int8", "int4", "rank4", "topk"])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    excess: dict[str, list[float]] = {}
    for seed in options.seeds:
        runs = {}
        for name in ("reference", *options.codecs):
            settings = [*ONE_STAGE, f"training.seed={seed}", *averaging_of(name)]
            words = [word for setting in settings for word in ("--set", setting)]
            runs[name] = run_quickstart("--steps", str(options.steps), *words)
            print(seed, name, runs[name]["final_loss"], file=sys.stderr)
        tokens = min(run["evaluations"][-1]["tokens"] for run in runs.values())
        reference = loss_at(runs["reference"]["evaluations"], tokens)
        for name, run in runs.items():
            loss = loss_at(run["evaluations"], tokens)
            excess.setdefault(name, []).append(loss / reference)
            megabytes = run["wire_bytes"]["averaging"] / 1e6
            rows.append(
                {
                    "seed": seed,
                    "codec": name,
                    "loss at equal tokens": loss,
                    "over float32": loss / reference,
                    "averaging MB": megabytes,
                    "drifted": run["drifted_states"],
                }
            )
    ratios = {f"loss_{name}": statistics.median(each) for name, each in excess.items()}
    report("training with codecs", rows, ratios, options.json)


if __name__ == "__main__":
    main()
