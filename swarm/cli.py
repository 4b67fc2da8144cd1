"""The commands `swarm run` and `swarm-peer`: parse, build the parts, run, close.

A user's mistake ends with one line on stderr and exit code 2.
"""

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from swarm.config import load_run
from swarm.errors import UserError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Volunteers training one large model together."
)

RunFile = Annotated[Path, typer.Argument(help="The run file (YAML).", metavar="CONFIG.yaml")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, checked like the file.")]
Join = Annotated[
    list[str], typer.Option("--join", help="Address of any process of the run; may be repeated.")
]
Listen = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")]
Port = Annotated[
    int,
    typer.Option(help="Port to listen on, and 10000 more for direct links; 0: any.", min=0, max=65535),
]
Verbose = Annotated[bool, typer.Option(help="Log details.")]


@app.callback()
def _group() -> None:
    """Keeps `run` a subcommand however many there are."""


@app.command()
def run(
    file: RunFile,
    chaos: Annotated[
        float | None, typer.Option(help="SIGKILL a random peer every so many seconds.", min=1)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="End the run after so many minutes.", min=0.01)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="End the run after so many steps.", min=1)] = None,
    overrides: Overrides = [],  # noqa: B006
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines join.")
    ] = "127.0.0.1",
    port: Port = 0,
    folder: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Start a run, publish it for others to join, and watch it."""

    def start() -> int:
        config = load_run(file, overrides)
        if steps is not None:  # a bound, not another schedule
            end = config.training.optimizer.decay_steps or config.training.steps
            bounds = [f"training.optimizer.decay_steps={end}", f"training.steps={steps}"]
            config = load_run(file, [*overrides, *bounds])
        from swarm.organizer import RunOptions, organize
        from swarm.process import run_until_signal, set_up_logging

        set_up_logging("organizer", verbose=verbose)
        options = RunOptions(folder / config.name, host, port, minutes, chaos, resume)
        return run_until_signal(organize(config, options))

    exit_with(start)


@app.command()
def plan(
    file: RunFile,
    peers: Annotated[
        Path,
        typer.Option(
            help="Who may come: a CSV file with columns tflops, memory_gb, up_mbit, down_mbit, and if you "
            "like name, availability, count."
        ),
    ],
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Predict a run: who serves what, how fast it trains, what travels, what limits it."""

    def start() -> int:
        config = load_run(file, overrides)
        from swarm.planning import plan_and_report, read_volunteers

        return plan_and_report(config, read_volunteers(peers))

    exit_with(start)


def peer(
    join: Join,
    stage: Annotated[
        str, typer.Option(help="Stage to serve, or auto: the one that needs it most, whenever that changes.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto.")] = "auto",
    name: Annotated[str, typer.Option(help="Shown in the organizer's table.")] = "",
    listen: Listen = "0.0.0.0",
    port: Port = 0,
    identity: Annotated[Path | None, typer.Option(help="Keep this peer's identity in a file.")] = None,
    threads: Annotated[int, typer.Option(help="Compute threads; 0 for torch's default.", min=0)] = 0,
    device_share: Annotated[
        float,
        typer.Option(
            help="Compute for this part of the time only, to keep the machine cool or usable.",
            min=0.01,
            max=1.0,
        ),
    ] = 1.0,
    bandwidth: Annotated[
        float,
        typer.Option(help="Mbit/s of the uplink, until it has been measured; 0: unknown.", min=0, max=1e6),
    ] = 0.0,
    aggregate_only: Annotated[
        bool, typer.Option("--aggregate-only", help="No model, no device: only average for the others.")
    ] = False,
    state_folder: Annotated[
        Path | None,
        typer.Option(
            help="Keep the state here, for a restart. Default: ~/.cache/swarm, or $XDG_CACHE_HOME/swarm."
        ),
    ] = None,
    no_state: Annotated[bool, typer.Option("--no-state", help="Keep no state on disk.")] = False,
    verbose: Verbose = False,
) -> None:
    """Serve one stage of a run until Ctrl-C."""

    def start() -> int:
        if stage != "auto" and not stage.isdigit():
            raise UserError(f"--stage {stage!r} is neither a number nor auto")
        from swarm.peer_process import PeerOptions, serve
        from swarm.process import run_until_signal, set_up_logging

        set_up_logging(name or "peer", verbose=verbose)
        number = None if stage == "auto" else int(stage)
        options = PeerOptions(
            join=tuple(join),
            stage=number,
            device=device,
            name=name,
            listen=listen,
            port=port,
            identity=identity,
            threads=threads,
            device_share=device_share,
            bandwidth=bandwidth,
            aggregate_only=aggregate_only,
            state_folder=None if no_state else state_folder or _cache(),
        )
        return run_until_signal(serve(options))

    exit_with(start)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "swarm"


def exit_with(start: Callable[[], int]) -> None:
    """Run a command's body: exit code 2 and one line for what the user can mend."""
    try:
        code = start()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseExceptionGroup as errors:
        mistakes, others = errors.split(UserError)
        if others is not None or mistakes is None:
            raise
        print(f"error: {_first(mistakes)}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    gc.freeze()  # what is left ends with the process: to look for garbage in it takes half a second
    raise SystemExit(code)


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    return error


def peer_main() -> None:
    """Entry point of `swarm-peer`."""
    typer.run(peer)


if __name__ == "__main__":
    peer_main()
