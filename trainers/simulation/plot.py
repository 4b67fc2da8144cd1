"""A picture of a simulated run: what its peers computed over time, what they could have, and their number."""

from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from trainers.simulation.run import Result


def draw(result: Result, path: Path, *, title: str) -> None:
    """Write the picture to `path`; its suffix names the format. Raises OSError, ValueError."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    hours = [moment.at_s / 3600 for moment in result.moments] + [result.end_s / 3600]
    optimum = [moment.optimum for moment in result.moments]
    capacity = [moment.capacity for moment in result.moments]
    above.stairs(optimum, hours, label="best assignment of the peers alive", color="tab:gray")
    above.stairs(capacity, hours, label="weakest stage", color="tab:blue")
    if result.tokens:
        spans = list(pairwise([(0.0, 0), *result.tokens]))
        rates = [(tokens - before) / (at_s - since_s) for (since_s, before), (at_s, tokens) in spans]
        edges = [0.0, *(at_s / 3600 for at_s, _ in result.tokens)]
        above.stairs(rates, edges, label="completed", color="tab:orange")
    above.set_ylabel("tokens per second")
    above.set_title(title)
    above.legend(loc="lower right")
    below.stairs([moment.peers for moment in result.moments], hours, color="tab:gray")
    below.set_ylabel("peers alive")
    below.set_xlabel("hours")
    figure.savefig(path)
