"""`swarm simulate`: read the trace, run it, print what came of it, draw it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from swarm.config import RunConfig
from swarm.errors import UserError
from swarm.files import read_text
from trainers.simulation.plot import draw
from trainers.simulation.run import Result, Simulation, Surroundings
from trainers.simulation.trace import Trace, parse_trace, synthetic_trace

MAX_TRACE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TraceOptions:
    file: Path | None
    unit: str
    hours: float  # of a synthetic one
    wanted: int
    seed: int


def read_trace(options: TraceOptions) -> Trace:
    """Raises UserError."""
    if options.file is None:
        return synthetic_trace(hours=options.hours, wanted=options.wanted, rng=random.Random(options.seed))
    text = read_text(options.file, most_bytes=MAX_TRACE_BYTES, what="a trace")
    return parse_trace(text, source=str(options.file), unit=options.unit)


def simulate_and_report(
    config: RunConfig, trace: Trace, around: Surroundings, *, title: str, plot: Path | None
) -> int:
    """Returns the exit code: 130 if the user stopped it, with what there is by then."""
    simulation, console, code = Simulation(config, trace, around), Console(), 0
    if plot is not None:
        _check_writable(plot)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=1.0, what="")

        def show(part: float) -> None:
            hours, peers = simulation.events.now_s / 3600, len(simulation.fleet.machines)
            progress.update(task, completed=part, what=f"{hours:.1f} h, {peers} peers")

        try:
            result = simulation.run(show)
        except KeyboardInterrupt:
            result, code = simulation.result(), 130
    console.print(_table(result, title, stages=config.model.stages))
    for hint in hints(result, config):
        console.print(hint)
    if plot is not None:
        draw(result, plot, title=title)
        console.print(f"drawn: {plot}")
    return code


def _check_writable(plot: Path) -> None:
    if plot.suffix.lstrip(".") not in ("png", "svg", "pdf"):
        raise UserError(f"--plot {plot}: the suffix says the format: .png, .svg or .pdf")
    if not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: there is no folder {plot.absolute().parent}")


def _table(result: Result, title: str, *, stages: int) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts(result, stages=stages):
        table.add_row(name, value)
    return table


def facts(result: Result, *, stages: int) -> Sequence[tuple[str, str]]:
    """What there is to say, in words and figures."""
    first_s, end_s = result.first_s, result.end_s
    most = max((moment.peers for moment in result.moments), default=0)
    mean = 3600 * result.peer_hours / end_s if end_s else 0.0
    found = [
        ("time", f"{end_s / 3600:.1f} h"),
        ("peers", f"{mean:.1f} on average, {most} at most, for {stages} stages"),
        ("of the best assignment", f"{result.kept():.1%}"),
        ("  in the first hour", f"{result.kept(first_s, first_s + 3600):.1%}"),
        ("  in the last hour", f"{result.kept(end_s - 3600):.1%}"),
        ("moves", f"{result.moves}, and {result.redirected} newcomers redirected"),
    ]
    if not result.tokens:
        return found
    tokens, optimum = result.tokens[-1][1], result.optimal_tokens
    counters = result.counters
    recoveries = sorted(result.recovery_s)
    median = f"; half of them within {recoveries[len(recoveries) // 2]:.1f} s" if recoveries else ""
    return [
        *found,
        ("tokens", f"{tokens:,}, {tokens / end_s:,.0f} per second"),
        ("  of what devices could do", f"{tokens / optimum:.1%}" if optimum else "there were none"),
        ("steps", f"{min(result.steps):,}, and {result.lost_steps:,} lost with whole stages"),
        ("sent", f"{result.sent_bytes / 1e9 / max(result.peer_hours, 1e-9):.2f} GB per peer and hour"),
        ("hops given to another peer", f"{counters['rerouted_hops']:,}{median}"),
        ("gradients handed over, lost", f"{counters['handed_over']:,}, {counters['lost']:,}"),
    ]


def hints(result: Result, config: RunConfig) -> list[str]:
    """What the user may want to change."""
    if result.in_flight_bound:
        return [
            f"what limits this run is how much trainers keep under way, pipeline.in_flight: "
            f"{config.pipeline.in_flight}; raise it, or add trainers with --trainers"
        ]
    return []
