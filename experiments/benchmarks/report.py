"""The shape that every benchmark reports in: a table for people, one line of JSON for programs."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def machine() -> str:
    """This machine in one line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123
            model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{os.cpu_count()} cores, {model}{gpu}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def report(
    benchmark: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], as_json: bool
) -> None:
    """Print the rows as a table and the ratios; with `as_json` end in one line of JSON.

    What is too wide for the terminal has one line per figure instead.
    """
    console = Console()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    table = _table(columns, cells)
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        lines = [[column, *values] for column, values in zip(columns, zip(*cells, strict=True), strict=True)]
        table = _table(["", *map(str, range(1, len(rows) + 1))], lines)
    console.print(f"{benchmark}, {time.strftime('%Y-%m-%d')}, {machine()}", highlight=False)
    console.print(table)
    report_ratios(benchmark, rows, ratios, as_json)


def report_ratios(
    benchmark: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], as_json: bool
) -> None:
    """Print the ratios, and with `as_json` everything in one line of JSON."""
    for name, value in ratios.items():
        Console().print(f"{name} = {value:.3f}")
    if as_json:
        rounded = {name: round(value, 4) for name, value in ratios.items()}
        line = {"benchmark": benchmark, "machine": machine(), "rows": list(rows), "ratios": rounded}
        print(json.dumps(line))


def median_s(work: Callable[[], object], runs: int, warm_up: int = 2) -> float:
    """Median wall seconds of `work`."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return str(value)
