"""The run file: one strict tree, validated once. Every field says its unit and what it does.

`load_run` reads YAML plus `--set` overrides; a mistake raises `ConfigError` with one line: file, line, key,
what is wrong, and the nearest key that exists. What it returns is frozen.

Pure but for reading the file.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from averaging.network import MAX_HEADER_BYTES
from swarm.errors import ConfigError

ActivationCodec = Literal["float32", "float16", "bfloat16", "int8", "int4"]
AveragingCodec = Literal[ActivationCodec, "topk"]  # what has error feedback may leave out nearly all
FINE = {"float32", "float16", "bfloat16"}  # without error feedback; the codecs themselves would need torch

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Section):
    factory: str = Field("llama", description="`llama`, or package.module:function that builds one stage")
    width: Positive = Field(256, description="D, values per token between layers")
    layers: Positive = Field(6, description="transformer layers in the whole model")
    heads: Positive = Field(4, description="attention heads per layer")
    feed_forward: Positive | None = Field(None, description="inner width of SwiGLU; default 8/3 of width")
    vocabulary: Positive = Field(256, description="token ids; 256 for the byte tokenizer")
    stages: Positive = Field(3, description="consecutive parts that the model is cut into")
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary angles")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")

    @property
    def hidden_width(self) -> int:
        return self.feed_forward or -(-8 * self.width // 3 // 32) * 32

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} is not an even multiple of heads {self.heads}")
        if self.stages > self.layers:
            raise ValueError(f"{self.layers} layers cannot be cut into {self.stages} stages")
        return self


class DataConfig(_Section):
    source: Literal["stdlib", "text", "jsonl", "parquet", "hub"] = Field(
        "stdlib", description="stdlib: the sources of Python's own library, on every machine"
    )
    path: str | None = Field(None, description="file or glob for text, jsonl, parquet; dataset name for hub")
    validation_path: str | None = Field(None, description="held-out files; default: a part of the source")
    subset: str | None = Field(None, description="configuration of a hub dataset")
    field: str = Field("text", description="column that holds the text")
    tokenizer: str = Field("byte", description="`byte`, or a Hugging Face tokenizer.json file")
    validation_fraction: float = Field(0.05, gt=0, lt=0.5, description="documents held out without files")
    shuffle_documents: Positive = Field(1000, description="buffer of the seeded shuffle, documents")

    @model_validator(mode="after")
    def _has_path(self) -> "DataConfig":
        if self.source != "stdlib" and self.path is None:
            raise ValueError(f"source {self.source!r} needs `path`")
        return self


class OptimizerConfig(_Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="for matrices; vectors are not decayed")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm of a stage; null: none")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up")
    decay_steps: Positive | None = Field(None, description="step at which the decay ends; default: steps")
    final_lr: float = Field(0.1, ge=0, le=1, description="fraction of lr left at the end of the decay")


class TrainingConfig(_Section):
    sequence_tokens: Positive = Field(256, description="T, tokens per sequence")
    microbatch_sequences: Positive = Field(4, description="B, sequences per microbatch")
    target_batch_tokens: Positive = Field(4096, description="tokens that close a step")
    steps: Positive = Field(300, description="optimizer steps of the run")
    optimizer: OptimizerConfig = OptimizerConfig()
    delayed_updates: bool = Field(True, description="average and step behind the next batch's computation")
    strict: bool = Field(False, description="reproduce single-process training exactly, whoever dies")
    max_staleness: Positive = Field(4, description="versions after which a gradient is computed anew")
    eval_every: Positive = Field(25, description="steps between evaluations on held-out text")
    eval_microbatches: Positive = Field(8, description="microbatches per evaluation")
    seed: int = Field(0, ge=0, description="of initialisation, data order and wiring")

    @property
    def microbatch_tokens(self) -> int:
        return self.sequence_tokens * self.microbatch_sequences

    @model_validator(mode="after")
    def _fits_into_a_header(self) -> "TrainingConfig":
        bytes_of_ids = 4 * self.microbatch_sequences * (self.sequence_tokens + 1)
        if bytes_of_ids > MAX_HEADER_BYTES - (1 << 16):
            raise ValueError(
                f"a microbatch of {self.microbatch_sequences} x {self.sequence_tokens} tokens does not fit "
                "into one message: take fewer sequences per microbatch"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> "TrainingConfig":
        if self.strict and self.target_batch_tokens % self.microbatch_tokens:
            raise ValueError(
                f"strict training needs target_batch_tokens ({self.target_batch_tokens}) to be a multiple "
                f"of a microbatch ({self.microbatch_tokens} tokens)"
            )
        return self


class PipelineConfig(_Section):
    codec: ActivationCodec = Field("int8", description="of activations and their gradients between stages")
    in_flight: Positive = Field(16, description="most microbatches a trainer has under way")
    queue: Positive = Field(32, description="most microbatches a peer holds before it answers BUSY")
    hop_deadline_s: Seconds = Field(30.0, description="a hop that takes longer is given to another peer")
    retain_until: Literal["microbatch", "step"] = Field(
        "microbatch", description="when peers drop sent tensors; step: a SIGKILL loses no gradient"
    )
    keep_graphs: int = Field(16, ge=0, description="autograd graphs kept; others are recomputed")
    wiring_prior_s: Seconds = Field(0.5, description="seconds per microbatch assumed of an unknown peer")


class AveragingConfig(_Section):
    codec: AveragingCodec = Field(
        "int8", description="of gradients that the peers of a stage send each other"
    )
    mean_codec: AveragingCodec | None = Field(None, description="of what they get back; default: as `codec`")
    rank: Positive | None = Field(
        None, description="PowerSGD: matrices travel as so many columns and rows; null: whole"
    )
    rank_from: int | None = Field(
        None, ge=0, description="first step with `rank`; default: four warm-ups of the learning rate"
    )
    group_size: int = Field(16, ge=2, description="about how many average at once; more sit on a grid")
    progress_deadline_s: Seconds = Field(5.0, description="silence after which a groupmate counts as lost")
    round_deadline_s: Seconds = Field(300.0, description="most that the averaging of one step may take")
    grace_s: Seconds = Field(1.0, description="wait for live peers that have not reported when a step closes")

    @model_validator(mode="after")
    def _rank_has_a_memory_of_its_own(self) -> "AveragingConfig":
        lossy = [name for name in (self.codec, self.mean_codec) if name and name not in FINE]
        if self.rank and lossy:
            raise ValueError(f"rank {self.rank} needs codec float16, bfloat16 or float32, not {lossy[0]}")
        return self


class NetworkConfig(_Section):
    announce_s: Seconds = Field(4.0, description="period of a peer's record in the DHT")
    expire_s: Seconds = Field(16.0, description="age at which an unrenewed record is gone")
    heartbeat_s: Seconds = Field(0.5, description="period of heartbeats between trainer and peer")
    lease_s: Seconds = Field(8.0, description="silence after which a peer may no longer accumulate")
    leave_s: Seconds = Field(20.0, description="most that a peer asked to stop takes to finish")
    upload_share: float = Field(
        0.5, gt=0, le=1, description="of a peer's measured uplink, for newcomers that load its state"
    )


class RebalancingConfig(_Section):
    """Peers that may serve any stage move to where the run needs them most."""

    rule: Literal["best", "paper", "none"] = Field(
        "best", description="best: whoever makes the weakest stage strongest; paper: SWARM's own rule"
    )
    period_s: Seconds = Field(10.0, description="about how often a peer looks at all stages")
    worth: float = Field(
        0.5, ge=0, description="what the run must gain for a move, as a part of what the mover computes"
    )


class ArchiveConfig(_Section):
    """Checkpoints, which the organizer's process writes into the run's folder."""

    every_steps: int = Field(100, ge=0, description="about so many steps from one to the next; 0: none")
    keep: Positive = Field(3, description="the newest so many stay")


class MonitorConfig(_Section):
    wandb: Literal["offline", "online", "disabled"] = Field("offline", description="mode of Weights & Biases")
    project: str = Field("swarm", description="W&B project")
    period_s: Seconds = Field(1.0, description="period of metrics and of the live table")


class LocalConfig(_Section):
    """Processes that `swarm run` itself starts, for runs on one machine."""

    peers_per_stage: int | tuple[int, ...] = Field(2, description="one number, or one per stage")
    trainers: int = Field(1, ge=0, description="trainer processes")
    threads: Positive = Field(1, description="compute threads per peer")
    device_share: float = Field(1.0, ge=0.01, le=1, description="part of the time for which a peer computes")

    def peers(self, stages: int) -> tuple[int, ...]:
        counts = self.peers_per_stage
        return (counts,) * stages if isinstance(counts, int) else counts


class RunConfig(_Section):
    name: str = Field(
        description="of the run and of its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    pipeline: PipelineConfig = PipelineConfig()
    averaging: AveragingConfig = AveragingConfig()
    network: NetworkConfig = NetworkConfig()
    rebalancing: RebalancingConfig = RebalancingConfig()
    archive: ArchiveConfig = ArchiveConfig()
    monitor: MonitorConfig = MonitorConfig()
    local: LocalConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.local is not None:
            counts = self.local.peers(self.model.stages)
            if len(counts) != self.model.stages or min(counts) < 1:
                raise ValueError(f"local.peers_per_stage {counts} needs one positive number per stage")
        if self.training.strict and self.training.delayed_updates:
            raise ValueError("training.strict needs training.delayed_updates: false")
        return self

    @property
    def retains_until_step(self) -> bool:
        return self.training.strict or self.pipeline.retain_until == "step"


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate the run file with `a.b=value` overrides. Raises ConfigError."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_run(text, source=str(path), overrides=overrides)


def parse_run(text: str, *, source: str, overrides: list[str] | None = None) -> RunConfig:
    """Validate the text of a run file; `source` names it in errors. Raises ConfigError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a run file is a mapping of sections, this is {type(data).__name__}")
    lines: dict[tuple[str, ...], str] = {}
    _collect_lines(node, (), source, lines)
    for override in overrides or []:
        _apply(data, override, lines)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source, lines)) from None


def _collect_lines(
    node: yaml.Node | None, path: tuple[str, ...], source: str, lines: dict[tuple[str, ...], str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, str(key.value))
            lines[child] = f"{source}:{key.start_mark.line + 1}"
            _collect_lines(value, child, source, lines)


def _apply(data: dict[str, Any], override: str, lines: dict[tuple[str, ...], str]) -> None:
    key, equals, value = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    target: Any = data
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
    try:
        target[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is not a YAML value") from None
    for depth in range(1, len(path) + 1):
        lines.setdefault(path[:depth], f"--set {override}")
    lines[path] = f"--set {override}"


def _explain(error: ValidationError, source: str, lines: dict[tuple[str, ...], str]) -> str:
    """One line for the first mistake: where, which key, what is wrong, what exists."""
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"] if not re.fullmatch(r"(int|tuple\[.*\]|\d+)", str(part)))
    where = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), source)
    key = ".".join(path)
    more = len(error.errors()) - 1
    tail = f" (and {more} more)" if more and first["type"] == "extra_forbidden" else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{where}: unknown key {key!r}; {hint}{tail}"
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{where}: {key + ': ' if key else ''}{message[:1].lower() + message[1:]}{got}"


def _known_keys(path: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in path:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def dump_run(config: RunConfig) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
