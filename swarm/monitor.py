"""What the organizer knows of its run: metrics in, table, files, plot and summary out.

Everything here is optional for the run itself: peers and trainers go on without it.

I/O: files in the run's folder, W&B, the terminal.
"""

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from averaging.bounded import forget_oldest
from averaging.network import PeerId
from swarm.config import RunConfig
from swarm.launch import Kill
from swarm.metrics import TABLE
from swarm.model import stage_costs
from swarm.rebalance import Seat, capacities

MAX_SENDERS, MAX_HASHES = 16_384, 65_536
FRESH_S = 6.0  # a process that has not reported for longer is not shown as live
log = logging.getLogger(__name__)


class Monitor:
    """Collects what processes push and renders it."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._latest: dict[PeerId, tuple[float, dict[str, Any]]] = {}
        self._began = time.time()
        self._rate_at, self._rate_tokens, self._rate = time.time(), 0, 0.0
        self._first_tokens_at: float | None = None
        self._tokens_at_first: dict[PeerId, int] = {}  # of trainers: they may be older than this process
        self._last_tokens_at = self._began
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._wandb: Any = None
        self.drift = 0  # peers seen with another state than their stage mates at one version
        self._hashes: dict[tuple[int, int], tuple[str, str]] = {}  # stage, version -> first seen, with whom

    def open_wandb(self) -> None:
        """Begin logging to W&B, offline unless configured."""
        if self.config.monitor.wandb == "disabled":
            return
        import os

        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb.init(
            project=self.config.monitor.project,
            name=self.config.name,
            dir=str(self.folder),
            mode=self.config.monitor.wandb,
            config=self.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )

    def take(self, sender: PeerId, values: dict[str, Any]) -> None:
        """Note one push of metrics, validated."""
        if sender not in self._latest and len(self._latest) >= MAX_SENDERS:
            return
        _, before = self._latest.get(sender, (0.0, {}))
        self._latest[sender] = (time.time(), values)
        if values["kind"] == "peer" and values.get("hash") and before.get("hash") != values["hash"]:
            self._compare(values)
        if values["kind"] == "trainer" and values.get("tokens"):
            now = time.time()
            self._first_tokens_at = self._first_tokens_at or now
            self._tokens_at_first.setdefault(sender, int(values["tokens"]))
            self._last_tokens_at = now

    def _compare(self, values: dict[str, Any]) -> None:
        """Is a peer's new state that of its stage mates?"""
        name, stage, version = str(values.get("name")), int(values["stage"]), int(values["version"])
        known, whose = self._hashes.setdefault((stage, version), (values["hash"], name))
        if known != values["hash"]:
            self.drift += 1
            log.warning(
                "stage %d, version %d: %s and %s hold different states; one of them will load the other's",
                *(stage, version, whose, name),
            )
        forget_oldest(self._hashes, MAX_HASHES)

    # views

    def _of(self, kind: str, *, fresh: bool = False) -> dict[PeerId, dict[str, Any]]:
        oldest = time.time() - FRESH_S if fresh else 0.0
        return {p: v for p, (at, v) in self._latest.items() if v["kind"] == kind and at >= oldest}

    def serving(self) -> list[str]:
        """Names of the peers that report."""
        return [str(values.get("name")) for values in self._of("peer", fresh=True).values()]

    @property
    def trainers(self) -> int:
        """Those that report."""
        return len(self._of("trainer", fresh=True))

    def peer_of(self, name: str) -> PeerId | None:
        return next((p for p, v in self._of("peer").items() if v.get("name") == name), None)

    def evaluations(self) -> list[dict[str, float]]:
        """Of all trainers, in order of tokens."""
        found = [e for v in self._of("trainer").values() for e in v.get("evaluations", [])]
        return sorted(found, key=lambda e: (e["step"], e["tokens"]))

    def tokens(self) -> int:
        return sum(int(v.get("tokens", 0)) for v in self._of("trainer").values())

    def step(self) -> int:
        return max((int(v.get("step", 0)) for v in self._of("trainer").values()), default=0)

    def finished(self) -> bool:
        """Does a trainer say that it is done, after steps that peers of every stage say they took?"""
        reached: Counter[int] = Counter()
        for values in self._of("peer").values():
            reached[values["stage"]] = max(reached[values["stage"]], int(values["version"]))
        stages, steps = range(self.config.model.stages), self.config.training.steps
        done = any(values["finished"] for values in self._of("trainer").values())
        return done and all(reached[stage] >= steps for stage in stages)

    def predicted_tokens_s(self) -> float:
        """What the devices of the weakest stage could compute, if they had nothing to wait for.

        Who has not measured itself yet counts as usual.
        """
        peers = [v for v in self._of("peer", fresh=True).values() if v.get("hash")]  # those with a state
        known = [float(v["speed"]) for v in peers if v.get("speed")]
        if not known:
            return 0.0
        usual = statistics.median(known)
        seats = (Seat(str(v.get("name")), int(v["stage"]), float(v.get("speed") or usual)) for v in peers)
        stages = self.config.model.stages
        return min(capacities([s for s in seats if s.stage < stages], stage_costs(self.config.model)))

    def _loss(self) -> float | None:
        losses = [v["loss"] for v in self._of("trainer").values() if v.get("loss") is not None]
        return statistics.fmean(losses) if losses else None

    def _counters(self, kind: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for values in self._of(kind).values():
            total.update(values.get("counters", {}) if kind == "trainer" else _numbers(values))
        return total

    def _tokens_seen(self) -> int:
        """Those that trainers have done since this process first heard of them."""
        return self.tokens() - sum(self._tokens_at_first.values())

    def record(self, kills: int) -> Mapping[str, Any]:
        """Write one line of metrics.jsonl (and to W&B); returns it."""
        now, tokens = time.time(), self.tokens()
        if now - self._rate_at >= 0.5:
            seen = self._tokens_seen()
            rate = (seen - self._rate_tokens) / (now - self._rate_at)
            self._rate += 0.3 * (rate - self._rate)
            self._rate_at, self._rate_tokens = now, seen
        peers, trainers = self._counters("peer"), self._counters("trainer")
        evaluations = self.evaluations()
        values = {
            "loss/train_nats": self._loss(),
            "loss/heldout_nats": evaluations[-1]["loss"] if evaluations else None,
            "progress/steps": self.step(),
            "progress/tokens": tokens,
            "speed/tokens_per_s": round(self._rate, 1),
            "speed/predicted_tokens_per_s": round(self.predicted_tokens_s(), 1),
            "pipeline/in_flight": sum(
                int(v.get("in_flight", 0)) for v in self._of("trainer", fresh=True).values()
            ),
            "pipeline/rerouted_hops": trainers["rerouted_hops"],
            "pipeline/staleness_steps": _staleness(peers),
            "swarm/peers": len(self._of("peer", fresh=True)),
            "swarm/kills": kills,
            "wire/activation_bytes": peers["activation_bytes"],
            "wire/gradient_bytes": peers["gradient_bytes"],
            "wire/averaging_bytes": peers["averaging_bytes"],
        }
        line = {"time": round(now, 3), **{name: values[name] for name in TABLE}}
        self._metrics.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in line.items() if k != "time" and v is not None})
        return line

    def table(self, join: str, kills: Iterable[Kill], note: str = "") -> Group:
        """The live view of the run."""
        kills = list(kills)
        table = Table(title=f"[bold]{self.config.name}[/]", title_justify="left", expand=False)
        for column in ("stage", "peers", "version", "queue", "tokens/s", "held MB", "averaged MB", "kills"):
            table.add_column(column, justify="right")
        peers = self._of("peer", fresh=True).values()
        for stage in range(self.config.model.stages):
            pool = [v for v in peers if v.get("stage") == stage]
            ever = [v for v in self._of("peer").values() if v.get("stage") == stage]
            table.add_row(
                str(stage),
                str(len(pool)),
                str(max((int(v["version"]) for v in pool), default=0)) if pool else "-",
                " ".join(str(v["queue"]) for v in pool) or "-",
                f"{sum(float(v['tokens_per_s']) for v in pool):,.0f}",
                f"{sum(int(v['retained_bytes']) for v in pool) / 1e6:.1f}",
                f"{sum(int(v.get('averaging_bytes', 0)) for v in ever) / 1e6:.1f}",
                str(sum(kill.stage == stage for kill in kills)),
            )
        evaluations, loss = self.evaluations(), self._loss()
        counters = self._counters("trainer")
        lines = [
            f"step {self.step()} of {self.config.training.steps}   {self.tokens():,} tokens   "
            f"{self._rate:,.0f} tokens/s of {self.predicted_tokens_s():,.0f} predicted   "
            f"{time.time() - self._began:.0f} s",
            f"loss {'-' if loss is None else format(loss, '.3f')} nats per token   held-out "
            + (" -> ".join(f"{e['loss']:.3f}" for e in evaluations[-5:]) or "-"),
            f"microbatches: {counters['completed']} completed, {counters['rerouted_hops']} hops rerouted, "
            f"{counters['lost']} lost   kills: {len(kills)}",
            f"join: {join}",
        ]
        return Group(table, Text("\n".join([*lines, note] if note else lines)))

    # the end

    def summary(self, kills: list[Kill]) -> dict[str, Any]:
        """What summary.json holds."""
        trainers, peers, evaluations = self._counters("trainer"), self._counters("peer"), self.evaluations()
        recoveries = self.recoveries(kills)
        seconds = self._last_tokens_at - (self._first_tokens_at or self._last_tokens_at)
        tokens = self._tokens_seen()
        return {
            "name": self.config.name,
            "steps": self.step(),
            "tokens": self.tokens(),
            "initial_loss": evaluations[0]["loss"] if evaluations else None,
            "final_loss": evaluations[-1]["loss"] if evaluations else None,
            "tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else None,
            "kills": len(kills),
            "microbatches": {
                "issued": trainers["issued"],
                "completed": trainers["completed"],
                "rerouted_hops": trainers["rerouted_hops"],
                "lost": trainers["lost"],
                "duplicated": peers["duplicates"],
            },
            "recovery_s": {
                "p50": round(statistics.median(recoveries), 3) if recoveries else None,
                "max": round(max(recoveries), 3) if recoveries else None,
                "all": [round(seconds, 3) for seconds in recoveries],
            },
            "wire_bytes": {
                "activations": peers["activation_bytes"],
                "gradients": peers["gradient_bytes"],
                "averaging": peers["averaging_bytes"],
            },
            "staleness_steps": _staleness(peers),
            "drifted_states": self.drift,
            "evaluations": evaluations,
            "seconds": round(time.time() - self._began, 1),
        }

    def recoveries(self, kills: list[Kill]) -> list[float]:
        """Seconds from each death to the last of its hops being accepted elsewhere."""
        died = {self.peer_of(kill.name): kill.time for kill in kills}
        latest: dict[PeerId, float] = {}
        for values in self._of("trainer").values():
            for recovery in values.get("recoveries", []):
                began = died.get(recovery["peer"], recovery["noticed"])
                took = recovery["recovered"] - began
                latest[recovery["peer"]] = max(latest.get(recovery["peer"], 0.0), took)
        return list(latest.values())

    def close(self, kills: list[Kill], console: Console) -> dict[str, Any]:
        """Write summary.json and loss.png, end W&B; returns the summary."""
        self.record(len(kills))
        self._metrics.close()
        summary = self.summary(kills)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.plot(kills)
        if self._wandb is not None:
            self._wandb.summary.update({k: v for k, v in summary.items() if not isinstance(v, list | dict)})
            self._wandb.finish()
        console.print(f"summary, metrics and plot are in {self.folder}/")
        return summary

    def plot(self, kills: list[Kill]) -> None:
        """Draw loss.png: training and held-out loss over tokens, a mark for every kill."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = [json.loads(text) for text in (self.folder / "metrics.jsonl").read_text().splitlines()]
        training = [(x["progress/tokens"], x["loss/train_nats"]) for x in lines if x["loss/train_nats"]]
        held_out = [(e["tokens"], e["loss"]) for e in self.evaluations()]
        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
        if training:
            axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.5, label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
        for index, kill in enumerate(kills):
            at = [x["progress/tokens"] for x in lines if x["time"] <= kill.time]
            label = "a peer is killed" if index == 0 else None
            axes.axvline(at[-1] if at else 0, color="tab:red", alpha=0.3, linewidth=1, label=label)
        axes.set(xlabel="tokens", ylabel="nats per token", title=self.config.name)
        if training or held_out:
            axes.legend()
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(self.folder / "loss.png")
        pyplot.close(figure)


def _numbers(values: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}


def _staleness(peers: Counter[str]) -> float:
    """Steps that the weights of a gradient are behind the step it counts in; on average, so far."""
    return round(peers["steps_behind"] / max(1, peers["microbatches"]), 3)
