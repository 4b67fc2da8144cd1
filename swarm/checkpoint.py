"""Checkpoints on disk: all stages of a run, whole or not there at all.

    checkpoints/step-00000100/checkpoint.json          format, model, and every stage's file, version and hash
    checkpoints/step-00000100/stage-0.safetensors      as donors give it: parameters, optimizer, history

A checkpoint is written beside its place and moved there once every byte of it is on disk. What is read is
checked first; an error is one line that names the file and the field.

I/O: files.
"""

import contextlib
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from averaging.network import Buffer
from swarm.config import ModelConfig, RunConfig
from swarm.errors import UserError
from swarm.model import stage_shapes
from swarm.stage import HISTORY, state_kinds

FORMAT = 1
DESCRIPTION, PARTIAL = "checkpoint.json", ".partial"
NAME = re.compile(r"step-\d{8,}")
BLOCK_BYTES = 1 << 20


class CheckpointError(UserError):
    """A checkpoint that cannot be used; nothing of it was."""


class StateFile(BaseModel):
    """The state of one stage, as a file."""

    model_config = ConfigDict(frozen=True)
    name: str = Field(pattern=r"^[\w.-]+$")
    size_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    version: int = Field(ge=0, lt=2**53)


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True)
    format: int
    strict: bool
    model: dict[str, object]
    stages: tuple[StateFile, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is whole."""

    folder: Path
    versions: tuple[int, ...]  # by stage: all the same, or nearly where a run had ended
    files: tuple[Path, ...]

    @property
    def step(self) -> int:
        """That every stage has come to."""
        return min(self.versions)


class CheckpointWriter:
    """Puts one checkpoint together, a stage at a time."""

    def __init__(self, parent: Path, config: RunConfig, step: int) -> None:
        """Raises CheckpointError if nothing can be written there."""
        self._parent, self._config, self._step = parent, config, step
        self._folder = parent / (_name(step) + PARTIAL)
        self._files: dict[int, StateFile] = {}
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"{self._folder}: cannot be created: {error.strerror}") from None

    def add(self, stage: int, data: Buffer, version: int) -> None:
        """The state of one stage. Raises CheckpointError, also if it is none."""
        name = f"stage-{stage}.safetensors"
        write_durably(self._folder / name, data)
        _check_contents(self._folder / name, self._config, stage)
        digest = hashlib.sha256(data).hexdigest()
        self._files[stage] = StateFile(name=name, size_bytes=len(data), sha256=digest, version=version)

    def finish(self) -> Checkpoint:
        """Move it to its place. Raises CheckpointError."""
        description = _Description(
            format=FORMAT,
            strict=self._config.training.strict,
            model=self._config.model.model_dump(mode="json"),
            stages=tuple(self._files[stage] for stage in range(self._config.model.stages)),
        )
        write_durably(self._folder / DESCRIPTION, description.model_dump_json(indent=1).encode())
        place = self._parent / _name(self._step)
        try:
            shutil.rmtree(place, ignore_errors=True)  # of the same step: from before a resume
            _sync(self._folder)
            self._folder.rename(place)
            _sync(self._parent)
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be written: {error.strerror}") from None
        return _checkpoint(place, description)

    def drop(self) -> None:
        """It will not be whole."""
        shutil.rmtree(self._folder, ignore_errors=True)


def write_durably(path: Path, data: Buffer) -> None:
    """Every byte of it is on disk. Raises CheckpointError."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # half a file helps nobody, on a disk that is full
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def checkpoints_in(parent: Path) -> list[Path]:
    """The folders of all that are whole, the newest last."""
    return sorted(path for path in parent.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def keep_newest(parent: Path, count: int) -> None:
    """Delete the older ones."""
    for path in checkpoints_in(parent)[:-count]:
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path, config: RunConfig) -> Checkpoint:
    """Check every byte of it. Raises CheckpointError: one line that names the file and the field."""
    description = _described(folder / DESCRIPTION)
    path = folder / DESCRIPTION
    ours = config.model.model_dump(mode="json")
    for field in ModelConfig.model_fields:
        if description.model.get(field) != ours[field]:
            raise CheckpointError(
                f"{path}: model.{field} is {description.model.get(field)!r}, the run has {ours[field]!r}"
            )
    if description.strict != config.training.strict:
        raise CheckpointError(
            f"{path}: strict is {description.strict}, the run has training.strict {config.training.strict}"
        )
    if len(description.stages) != config.model.stages:
        raise CheckpointError(f"{path}: stages: {len(description.stages)} of {config.model.stages} are there")
    for stage, file in enumerate(description.stages):
        check_state_file(folder / file.name, file, config, stage)
    return _checkpoint(folder, description)


def _checkpoint(folder: Path, description: _Description) -> Checkpoint:
    versions = tuple(file.version for file in description.stages)
    return Checkpoint(folder, versions, tuple(folder / file.name for file in description.stages))


def _described(path: Path) -> _Description:
    try:
        text = path.read_text()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is no text: the file is damaged") from None
    try:
        description = _Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(f"{path}: {field}: {first['msg']}") from None
    if description.format != FORMAT:
        age = "older" if description.format < FORMAT else "newer"
        raise CheckpointError(
            f"{path}: format {description.format} is {age} than this program's {FORMAT}: "
            "resume with the version that wrote it"
        )
    return description


def check_state_file(path: Path, file: StateFile, config: RunConfig, stage: int) -> None:
    """Is it what `file` says, and a state of that stage? Raises CheckpointError."""
    _check_bytes(path, file)
    _check_contents(path, config, stage)


def _check_bytes(path: Path, file: StateFile) -> None:
    digest = hashlib.sha256()
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if size_bytes != file.size_bytes:
        raise CheckpointError(f"{path}: size_bytes: {size_bytes}, {DESCRIPTION} says {file.size_bytes}")
    if digest.hexdigest() != file.sha256:
        raise CheckpointError(f"{path}: sha256 is not the one in {DESCRIPTION}: the file is damaged")


def _check_contents(path: Path, config: RunConfig, stage: int) -> None:
    """Has it the tensors of a state of that stage?"""
    shapes = stage_shapes(config.model, stage)
    kinds = state_kinds(strict=config.training.strict)
    wanted = {f"{kind}/{name}": tuple(shape) for kind in kinds for name, shape in shapes.items()}
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: tuple(each.get_shape()) for name, each in slices.items()}
            types = {name: each.get_dtype() for name, each in slices.items()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is no safetensors file: {error}") from None
    if found.pop(HISTORY, None) is None or types.pop(HISTORY) != "U8":
        raise CheckpointError(f"{path}: {HISTORY} is not there")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            there, here = found.get(name, "not there"), wanted.get(name, "not there")
            raise CheckpointError(f"{path}: {name} is {there}, in the run's model it is {here}")
        if types[name] != "F32":
            raise CheckpointError(f"{path}: {name} is of type {types[name]}, not F32")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync(folder: Path) -> None:
    """A rename is on disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
