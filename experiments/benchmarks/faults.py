"""Minutes of the quickstart with a fault every few seconds, against as many minutes left alone.

    python -m experiments.benchmarks.faults [--minutes 10] [--every 10] [--seeds 0 1 2] [--json]

Real processes: organizer, trainer, two peers per stage. At full speed all share the cores, whoever lives, and
could do as much as replacements leave of these while they start. With `--device-share` the devices compute
for a part of the time only, so that not the cores limit the run, and could do what they have left in the
weakest stage. Dealt by the seed: SIGKILL and SIGTERM of a peer, which is replaced at once, SIGSTOP of a peer
for 20 s, SIGKILL of the organizer, which is started again 5 s later.
No fault takes the last peer that serves a stage: who wakes up serves once it has caught up.
Reported: tokens/s, also against what the peers that served could do, as the undisturbed runs right before and
right after show it (a shared machine may get slower by a tenth within the hour); the loss at equal tokens, of
the same seed, at the last evaluation that both have and as the mean over all evaluations of the second half
(one alone is 3 % above or below its neighbours); microbatches lost. What this program computes itself counts
for neither. Ratios are means over the seeds: two undisturbed runs of one seed differed by 7 % in tokens/s and
2 % in the loss. Linux.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from typing import Any

from experiments.benchmarks.chaos import loss_at
from experiments.benchmarks.quickstart import RUN_FILE
from experiments.benchmarks.report import report
from swarm.config import RunConfig, load_run
from swarm.launch import Child, LocalRun, last_line

FAULTS = {"kill": 3, "terminate": 3, "stop": 3, "organizer": 1}  # how often, relative to each other
STOPPED_S, ORGANIZER_AWAY_S = 20.0, 5.0
CATCH_UP_S = 60.0  # that a peer which wakes up may take
LOOK_S = 0.25
CALM_S = 45.0  # at the end: stopped peers are back by then
START_S, END_S = 120.0, 180.0
BEGUN = "held-out loss"  # what a trainer says once it trains
SERVES, LEADS = "serving stage", "others join with"  # what a peer and an organizer say once they are there
CAUGHT_UP = "loaded version"  # what a peer says once it has what its stage did while it was stopped


@dataclass
class Minutes:
    """One run of so many minutes, with faults or without."""

    config: RunConfig
    overrides: list[str]
    folder: Path
    options: argparse.Namespace
    seed: int
    dealt: Counter[str] = field(default_factory=Counter)
    away: set[str] = field(default_factory=set)  # peers that run, but are stopped, behind, or leaving
    organizer_away: bool = False
    port: str = "0"  # the organizer's; at first any
    shares: list[float] = field(default_factory=list)  # of the peers of the weakest stage, over time
    starting_s: dict[str, float] = field(default_factory=dict)  # of the cores, by who replaced another
    # Parts of the cores, from the first sample to the last
    busy: float = 0.0  # with anything but this program
    watching: float = 0.0  # with this program
    replaced: float = 0.0  # by those who replaced others, to start
    summary: dict[str, Any] = field(default_factory=dict)  # the organizer's, in the end

    async def carry_out(self, *, faults: bool) -> None:
        """Leaves the organizer's summary in `summary`."""
        await self._start_organizer()
        address = await self._told("the organizer's address", self._run_folder / "address")
        self.port = address.split("/")[4]  # it will be there again
        self.local = LocalRun(self.config, address, self.folder / "local", seed=self.seed)
        ending: list[asyncio.Task[None]] = []
        try:
            await self.local.start(minutes=self.options.minutes)
            trainer = next(child for child in self.local.children if child.kind == "trainer")
            await self._until(lambda: BEGUN in trainer.log.read_text(), START_S, "the run trains")
            ending.append(asyncio.create_task(self._watch()))
            if faults:
                ending.append(asyncio.create_task(self._deal()))
            left_s = 60 * self.options.minutes + END_S
            await self._until(lambda: not trainer.running, left_s, "the trainer ends")
            if trainer.process.returncode:
                raise SystemExit(f"the trainer failed: {last_line(trainer.log)}")
            self.organizer.send_signal(signal.SIGINT)
            await asyncio.wait_for(self.organizer.wait(), END_S)
            self.summary = loads((self._run_folder / "summary.json").read_text())
        finally:
            for task in ending:
                task.cancel()
            await self.local.stop()
            if self.organizer.returncode is None:
                self.organizer.terminate()
                await asyncio.wait_for(self.organizer.wait(), END_S)

    # the organizer

    @property
    def _run_folder(self) -> Path:
        return self.folder / self.config.name

    async def _start_organizer(self, *more: str) -> None:
        sets = [part for override in [*self.overrides, "local=null"] for part in ("--set", override)]
        command = ["-m", "trainers.cli", "run", str(RUN_FILE), "--folder", str(self.folder)]
        self.organizer_log = self.folder / f"organizer-{self.dealt['organizer']}.log"
        with self.organizer_log.open("wb") as output:
            self.organizer = await asyncio.create_subprocess_exec(
                *(sys.executable, *command, "--port", self.port, *sets, *more),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def _told(self, what: str, path: Path) -> str:
        await self._until(path.exists, START_S, what)
        return (await asyncio.to_thread(path.read_text)).strip()

    # faults

    async def _deal(self) -> None:
        rng = random.Random(self.seed)
        kinds = self.options.kinds
        weights = [FAULTS[kind] for kind in kinds]
        end_s = time.monotonic() + 60 * self.options.minutes - CALM_S
        next_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while (next_s := next_s + self.options.every) < end_s:
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                kind = rng.choices(kinds, weights)[0]
                if kind == "organizer":
                    if self.organizer.returncode is None:
                        self.dealt[kind] += 1
                        tasks.create_task(self._kill_organizer())
                    continue
                while not (able := self._able()):  # noqa: ASYNC110 - processes and their logs are polled
                    await asyncio.sleep(LOOK_S)
                self.dealt[kind] += 1
                tasks.create_task(self._strike(kind, rng.choice(able)))

    def _able(self) -> list[Child]:
        return self.local.dispensable([child.name for child in self._serving()])

    async def _strike(self, kind: str, victim: Child) -> None:
        self._tell(f"{kind} {victim.name} of stage {victim.stage}")
        self.away.add(victim.name)
        if kind == "stop":
            victim.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            said = len(victim.log.read_text())
            victim.process.send_signal(signal.SIGCONT)
            end_s = time.monotonic() + CATCH_UP_S  # it may have nothing to catch up with
            while CAUGHT_UP not in victim.log.read_text()[said:] and time.monotonic() < end_s:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            self.away.discard(victim.name)
            return
        victim.process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        await self._start_peer(victim.stage)

    async def _start_peer(self, stage: int | None) -> None:
        """It joins through whoever lives, as a volunteer would who knows two addresses."""
        peers = self._run_folder / "peers"
        if peers.exists():
            self.local.join = [self.local.join[0], *peers.read_text().split()[:2]]
        await self.local.start_peer(stage)

    async def _kill_organizer(self) -> None:
        self._tell("kill the organizer")
        self.organizer_away = True
        self.organizer.kill()
        await self.organizer.wait()
        await asyncio.sleep(ORGANIZER_AWAY_S)
        await self._start_organizer("--resume")
        self.organizer_away = False

    def _tell(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}, {sum(self.dealt.values())} so far", file=sys.stderr)

    # watching

    def _serving(self) -> list[Child]:
        peers = [child for child in self.local.children if child.kind == "peer" and child.running]
        return [c for c in peers if c.name not in self.away and SERVES in c.log.read_text()]

    async def _watch(self) -> None:
        assert self.config.local is not None
        wanted = self.config.local.peers(self.config.model.stages)
        first = {child.name for child in self.local.children}
        began, own_began_s = core_seconds(), time.process_time()
        while True:
            pools = Counter(child.stage for child in self._serving())
            self.shares.append(min(pools[stage] / count for stage, count in enumerate(wanted)))
            starting = {
                child.name: child.process.pid
                for child in self.local.children
                if child.name not in first and child.running and SERVES not in child.log.read_text()
            }
            if self.dealt["organizer"] and LEADS not in self.organizer_log.read_text():
                starting[self.organizer_log.stem] = self.organizer.pid
            for name, process in starting.items():  # one that has been killed meanwhile shows nothing
                self.starting_s[name] = max(cpu_s(process), self.starting_s.get(name, 0.0))
            await asyncio.sleep(LOOK_S)
            busy_s, all_s = (now - then for now, then in zip(core_seconds(), began, strict=True))
            own_s = time.process_time() - own_began_s
            self.busy, self.watching = (busy_s - own_s) / all_s, own_s / all_s
            self.replaced = sum(self.starting_s.values()) / all_s

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The summary's."""
        found: list[dict[str, float]] = self.summary["evaluations"]
        return found

    @property
    def tokens_per_s(self) -> float:
        """From the first evaluation, of the initial weights, to the last."""
        first, last = self.evaluations[0], self.evaluations[-1]
        return (last["tokens"] - first["tokens"]) / (last["time_s"] - first["time_s"])

    def could(self, calm: "Minutes") -> float:
        """What part of the calm run's speed this one could have had, by who lived."""
        if self.options.device_share < 1:
            return sum(self.shares) / len(self.shares)
        return min(1.0, (1 - self.watching - self.replaced) / calm.busy)

    async def _until(self, condition: Callable[[], object], limit_s: float, what: str) -> None:
        end_s = time.monotonic() + limit_s
        while not condition():
            ended = self.organizer.returncode is not None and not self.organizer_away
            if time.monotonic() > end_s or ended:
                logs = sorted(self.folder.glob("organizer-*.log"))
                raise SystemExit(f"{what}: not within {limit_s:.0f} s; organizer: {last_line(logs[-1])}")
            await asyncio.sleep(LOOK_S)


def core_seconds() -> tuple[float, float]:
    """Of all cores since the machine started: busy, and altogether."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / ticks, sum(fields) / ticks


def cpu_s(process: int) -> float:
    """Seconds for which it and its living children have computed: each has a daemon."""
    ticks = 0
    with contextlib.suppress(OSError):  # it has just ended
        threads = Path(f"/proc/{process}/task").glob("*/children")
        for each in (process, *(int(child) for path in threads for child in path.read_text().split())):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def compare(before: Minutes, faults: Minutes, after: Minutes) -> dict[str, float]:
    """Minutes with faults against those left alone right before and after: at least one has the same seed."""
    mean = statistics.geometric_mean
    could = mean(faults.could(calm) for calm in (before, after))
    speed = mean(faults.tokens_per_s / calm.tokens_per_s for calm in (before, after))
    same = [calm for calm in (before, after) if calm.seed == faults.seed]
    losses = [_losses(calm.evaluations, faults.evaluations) for calm in same]
    return {
        "living_peers_could": could,
        "tokens_per_s": speed,
        "of_what_living_peers_could": speed / could,
        "loss": mean(mean(ratios) for ratios in losses),
        "loss_at_the_end": mean(ratios[-1] for ratios in losses),
    }


def _losses(calm: list[dict[str, float]], faults: list[dict[str, float]]) -> list[float]:
    """How many times the calm run's loss at equal tokens, at each evaluation of the second half."""
    last = min(calm[-1]["tokens"], faults[-1]["tokens"])
    second_half = sorted({e["tokens"] for e in (*calm, *faults) if last / 2 <= e["tokens"] <= last})
    return [loss_at(faults, at) / loss_at(calm, at) for at in second_half]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between faults")
    parser.add_argument("--device-share", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=1000, help="of the learning rate's schedule")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--only", choices=["calm", "faults"], help="runs of one kind, without a comparison")
    parser.add_argument("--folder", type=Path, default=None, help="keep all files there")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as of swarm run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kinds = [options.only] if options.only else ["calm", "faults"]
    order = [(seed, kind) for seed in options.seeds for kind in kinds]
    if not options.only:
        order.append((options.seeds[-1], "calm"))  # every run with faults between two without
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        runs = [
            _run(options, seed, kind, folder / f"{number}-{kind}-seed-{seed}")
            for number, (seed, kind) in enumerate(order)
        ]
    rows = [_row(kind, run) for (_, kind), run in zip(order, runs, strict=True)]
    means: dict[str, float] = {}
    if not options.only:
        compared = [compare(*runs[at : at + 3]) for at in range(0, len(runs) - 2, 2)]
        means = {name: statistics.geometric_mean(each[name] for each in compared) for name in compared[0]}
        for row, each in zip(rows[1::2], compared, strict=True):
            row |= each
    report("faults", rows, means, options.json)


def _run(options: argparse.Namespace, seed: int, kind: str, folder: Path) -> Minutes:
    """With the run's summary; its files in `folder`."""
    overrides = [
        f"training.steps={options.steps}",
        f"training.seed={seed}",
        "pipeline.in_flight=8",
        "archive.every_steps=40",
        "monitor.wandb=disabled",
        *options.sets,
    ]
    folder.mkdir(parents=True)
    config = load_run(RUN_FILE, [*overrides, f"local.device_share={options.device_share}"])
    run = Minutes(config, overrides, folder, options, seed)
    asyncio.run(run.carry_out(faults=kind == "faults"))
    return run


def _row(kind: str, run: Minutes) -> dict[str, Any]:
    microbatches = run.summary["microbatches"]
    return {
        "seed": run.seed,
        "run": kind,
        "tokens/s": run.tokens_per_s,
        "peers of the weakest": sum(run.shares) / len(run.shares),
        "cores busy": run.busy,
        "cores to watch": run.watching,
        "cores to replace": run.replaced,
        "loss in the end": run.evaluations[-1]["loss"],
        "tokens": run.evaluations[-1]["tokens"],
        "steps": run.summary["steps"],
        "staleness": run.summary["staleness_steps"],
        "rerouted": microbatches["rerouted_hops"],
        "lost": microbatches["lost"],
        "drifted": run.summary["drifted_states"],
        **{fault: run.dealt[fault] for fault in FAULTS},
    }


if __name__ == "__main__":
    main()
