"""The command `swarm`, complete: what `swarm.cli` has, `swarm trainer` and `swarm simulate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import Join, Listen, Overrides, Port, RunFile, Verbose, app, exit_with
from swarm.config import load_run
from swarm.errors import UserError


class TimeUnit(StrEnum):
    seconds = "seconds"
    hours = "hours"


@app.command()
def trainer(
    join: Join,
    number: Annotated[
        int, typer.Option(help="Trainers with different numbers read different text.", min=0)
    ] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="End after so many minutes, with an evaluation.")
    ] = None,
    listen: Listen = "0.0.0.0",
    port: Port = 0,
    verbose: Verbose = False,
) -> None:
    """Feed a run with text and route its microbatches."""

    def start() -> int:
        from swarm.process import run_until_signal, set_up_logging
        from trainers.process import TrainerOptions, train

        set_up_logging(f"trainer-{number}", verbose=verbose)
        return run_until_signal(train(TrainerOptions(tuple(join), number, minutes, listen, port)))

    exit_with(start)


@app.command()
def simulate(
    file: RunFile,
    trace: Annotated[
        Path | None, typer.Option(help="Machines over time: rows `time,instances`. Default: --synthetic.")
    ] = None,
    unit: Annotated[TimeUnit, typer.Option(help="Of the times in the trace.")] = TimeUnit.seconds,
    synthetic: Annotated[
        float,
        typer.Option(help="Hours of a trace drawn like real spot markets'.", min=0.01, max=8760),
    ] = 24.0,
    wanted: Annotated[int, typer.Option(help="Machines asked for in it.", min=1, max=4000)] = 12,
    per_instance: Annotated[int, typer.Option(help="Peers of every machine.", min=1, max=1000)] = 1,
    tflops: Annotated[
        float, typer.Option(help="What a usual peer reaches: 1e12 operations per second.", min=1e-6, max=1e6)
    ] = 4.0,
    speeds: Annotated[
        str, typer.Option(help="Peers are drawn from these multiples of it, with commas: 1,2,4.")
    ] = "1",
    up: Annotated[float, typer.Option(help="Mbit/s of every peer's uplink.", min=0.001, max=1e6)] = 100.0,
    down: Annotated[float, typer.Option(help="Mbit/s of its downlink.", min=0.001, max=1e6)] = 200.0,
    latency: Annotated[float, typer.Option(help="Milliseconds from peer to peer.", min=0, max=10_000)] = 50.0,
    join_seconds: Annotated[
        float | None, typer.Option(help="To load a state; default: what the links take.", min=0)
    ] = None,
    trainers: Annotated[
        int, typer.Option(help="Trainers; 0: only who serves what, which is much faster.", min=0, max=1000)
    ] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a .png, .svg or .pdf file.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other luck.", min=0)] = 0,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run the swarm's decisions on simulated machines that come and go as in a trace."""

    def start() -> int:
        config = load_run(file, overrides)
        from swarm.prediction import OPERATIONS
        from trainers.simulation.command import TraceOptions, read_trace, simulate_and_report
        from trainers.simulation.links import Link
        from trainers.simulation.run import Surroundings

        found = read_trace(TraceOptions(trace, unit.value, synthetic, wanted, seed))
        around = Surroundings(
            per_instance=per_instance,
            speeds=[factor * tflops * 1e12 / OPERATIONS for factor in _factors(speeds)],
            state_s=join_seconds,
            trainers=trainers,
            link=Link(up * 1e6 / 8, down * 1e6 / 8),
            latency_s=latency / 1000,
            seed=seed,
        )
        title = f"{config.name}: {trace.name if trace else f'a synthetic trace of {synthetic:g} h'}"
        return simulate_and_report(config, found, around, title=title, plot=plot)

    exit_with(start)


def _factors(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < factor < 1e6 for factor in found):
        raise UserError(f"--speeds {text!r}: give positive numbers with commas, like 1,2,4")
    return found


def main() -> None:
    """Entry point of `swarm`."""
    app()


if __name__ == "__main__":
    main()
