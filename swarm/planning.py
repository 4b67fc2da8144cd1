"""`swarm plan`: read who may come, predict the run, and say what limits it."""

import csv
from datetime import timedelta
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from swarm.config import RunConfig
from swarm.errors import UserError
from swarm.files import read_text
from swarm.model import stage_costs, stage_values
from swarm.prediction import Prediction, StageLoad, Volunteer, predict, stage_loads, utilisation

MAX_PEERS, MAX_BYTES = 100_000, 16 << 20
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
UPLINKS_MBIT = (10, 30, 100, 300, 1000)
MOST_WARNED = 8  # peers that are named


class _Row(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("", max_length=64)
    tflops: float = Field(gt=0, le=1e6, description="1e12 operations per second that it really reaches")
    memory_gb: float = Field(gt=0, le=1e6)
    up_mbit: float = Field(gt=0, le=1e7)
    down_mbit: float = Field(gt=0, le=1e7)
    availability: float = Field(1.0, gt=0, le=1)
    count: int = Field(1, ge=1, le=MAX_PEERS, description="so many peers like this one")


def read_volunteers(path: Path) -> list[Volunteer]:
    """Raises UserError with file, line and column."""
    text = read_text(path, most_bytes=MAX_BYTES, what="a list of peers")
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    found: list[Volunteer] = []
    for fields in reader:
        row = _row(fields, f"{path}:{reader.line_num}")
        if len(found) + row.count > MAX_PEERS:
            raise UserError(f"{path}:{reader.line_num}: more than {MAX_PEERS} peers")
        name = row.name or f"peer of line {reader.line_num}"
        for number in range(row.count):
            found.append(
                Volunteer(
                    name=f"{name} {number + 1}" if row.count > 1 else name,
                    operations_s=row.tflops * 1e12,
                    memory_bytes=row.memory_gb * 1e9,
                    up_bytes_s=row.up_mbit * 1e6 / 8,
                    down_bytes_s=row.down_mbit * 1e6 / 8,
                    availability=row.availability,
                )
            )
    if not found:
        raise UserError(f"{path}: no peers: it has a header {','.join(_Row.model_fields)} and a row for each")
    return found


def _row(fields: dict[str | None, str | None], where: str) -> _Row:
    if None in fields:
        raise UserError(f"{where}: more fields than the header has")
    given = {key: value for key, value in fields.items() if value not in (None, "")}
    try:
        return _Row.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        column = first["loc"][0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(_Row.model_fields)
            raise UserError(f"{where}: unknown column {column!r}; known are {known}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: column {column!r} is missing or empty") from None
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{where}: {column}: {message}, got {str(first['input'])[:40]!r}") from None


def loads_of(config: RunConfig) -> list[StageLoad]:
    """Raises ConfigError for a bad model factory."""
    return stage_loads(config, stage_costs(config.model), stage_values(config.model))


def plan_and_report(config: RunConfig, volunteers: list[Volunteer]) -> int:
    """Returns the exit code: 1 if the run cannot go with these peers."""
    console = Console()
    loads = loads_of(config)
    prediction = predict(config, loads, volunteers)
    console.print(_stages(config, prediction))
    for line in sentences(config, prediction, len(volunteers)):
        console.print(line)
    console.print(_other_cuts(config, volunteers))
    console.print(_square_cube(config, volunteers))
    return 0 if prediction.works else 1


def sentences(config: RunConfig, prediction: Prediction, peers: int) -> list[str]:
    """What comes of it, in words."""
    found = []
    if prediction.left_out:
        names = ", ".join(peer.name for peer in prediction.left_out[:MOST_WARNED])
        least = min(seat.load.memory_bytes for seat in prediction.seats) / 1e9
        found.append(
            f"{len(prediction.left_out)} of {peers} peers have no memory for any stage ({least:.1f} GB at "
            f"least): {names}{', ...' if len(prediction.left_out) > MOST_WARNED else ''}"
        )
    if not prediction.works:
        found.append(f"This run cannot go: stage {prediction.weakest}: {prediction.limits}.")
        return found
    tokens, steps = prediction.tokens_s, prediction.steps_s
    takes = timedelta(seconds=round(config.training.steps / steps))
    found.append(
        f"{tokens:,.0f} tokens per second, {3600 * steps:,.0f} steps per hour: {takes} (h:mm:ss) for the "
        f"{config.training.steps:,} steps of the run."
    )
    found.append(f"Limited by stage {prediction.weakest}: {prediction.limits}.")
    return found


def _stages(config: RunConfig, prediction: Prediction) -> Table:
    table = Table(title=f"{config.name}: who serves what", title_justify="left")
    for column in ("stage", "parameters", "memory", "peers", "tokens/s", "GB per peer and day"):
        table.add_column(column, justify="right")
    for stage, (seat, sent) in enumerate(zip(prediction.seats, prediction.gigabytes_day, strict=True)):
        load = seat.load
        table.add_row(
            str(stage),
            f"{load.values / 1e6:,.1f} M",
            f"{load.memory_bytes / 1e9:,.2f} GB",
            str(len(seat.peers)),
            f"{prediction.rates[stage]:,.0f}",
            f"{sent:,.1f}",
        )
    return table


def _other_cuts(config: RunConfig, volunteers: list[Volunteer]) -> Table:
    """The same model and peers with other numbers of stages."""
    table = Table(title="The same peers with other numbers of stages", title_justify="left")
    for column in ("stages", "largest stage", "tokens/s", "limited by"):
        table.add_column(column, justify="right" if column != "limited by" else "left")
    layers = config.model.layers
    for stages in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, config.model.stages}):
        if stages > layers or stages > len(volunteers):
            continue
        model = config.model.model_copy(update={"stages": stages})
        other = config.model_copy(update={"model": model})
        loads = loads_of(other)
        found = predict(other, loads, volunteers)
        largest = max(load.memory_bytes for load in loads) / 1e9
        mark = "*" if stages == config.model.stages else ""
        table.add_row(f"{mark}{stages}", f"{largest:,.2f} GB", f"{found.tokens_s:,.0f}", found.limits)
    return table


def _square_cube(config: RunConfig, volunteers: list[Volunteer]) -> Table:
    """Utilisation against width and bandwidth, of the peer in the middle."""
    model = config.model
    operations_s = median(peer.operations_s for peer in volunteers)
    layers = model.layers / model.stages
    title = (
        f"How busy a device of {operations_s / 1e12:g} TFLOP/s is, with {layers:g} layers per stage and "
        f"{config.pipeline.codec}, by width and uplink"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("width", justify="right")
    for mbit in UPLINKS_MBIT:
        table.add_column(f"{mbit} Mbit/s", justify="right")
    for width in sorted({*WIDTHS, model.width}):
        cells = [
            utilisation(
                width=width,
                operations_s=operations_s,
                bytes_s=mbit * 1e6 / 8,
                layers=layers,
                codec=config.pipeline.codec,
                feed_forward=model.hidden_width / model.width,
            )
            for mbit in UPLINKS_MBIT
        ]
        mark = "*" if width == model.width else ""
        table.add_row(f"{mark}{width}", *(f"{cell:.0%}" for cell in cells))
    return table
