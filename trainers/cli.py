"""The command `swarm`, complete: what `swarm.cli` has, and `swarm trainer`."""

from typing import Annotated

import typer

from swarm.cli import Join, Listen, Port, Verbose, app, exit_with


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


def main() -> None:
    """Entry point of `swarm`."""
    app()


if __name__ == "__main__":
    main()
