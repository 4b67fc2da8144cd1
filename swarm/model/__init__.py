"""The model, cut into stages.

`build_stage(config, stage)` makes the module of one stage, initialised from the run's seed, the same bits
in every process and on every processor. A stage module maps what flows in to what flows out:

    first stage      token ids [B, T] int64   -> hidden [B, T, D]
    middle stages    hidden [B, T, D]         -> hidden [B, T, D]
    last stage       hidden [B, T, D]         -> logits [B, T, V]

(with one stage: token ids -> logits). The loss, cross-entropy against the next token, is the stage's
business, not the module's. A user's own model plugs in with `model.factory: package.module:function`;
see `experiments/custom_model.py`.
"""

import functools
import hashlib
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from swarm.config import ModelConfig
from swarm.errors import ConfigError

log = logging.getLogger(__name__)
StageFactory = Callable[[ModelConfig, int], nn.Module]


def build_stage(config: ModelConfig, stage: int, *, seed: int) -> nn.Module:
    """The module of `stage` with parameters drawn from `seed`. Raises ConfigError for a bad factory."""
    with _Uninitialised():
        module = _factory(config.factory)(config, stage)
    initialise(module, config, seed)
    return module


@functools.cache  # asked for by every peer that a process has been
def stage_costs(config: ModelConfig) -> tuple[float, ...]:
    """Multiply-adds per token of every stage, going forward: the values of its matrices.

    All equal for a model of the user's own whose modules cannot be built without memory.
    """
    try:
        with _Uninitialised(torch.device("meta")):
            factory = _factory(config.factory)
            return tuple(_multiply_adds(factory(config, stage)) for stage in range(config.stages))
    except (RuntimeError, NotImplementedError) as error:
        log.info("the costs of stages are unknown (%s): all count alike", error)
        return (1.0,) * config.stages


def _multiply_adds(module: nn.Module) -> float:
    own = (each.parameters(recurse=False) for each in module.modules() if not isinstance(each, nn.Embedding))
    return float(max(1, sum(p.numel() for parameters in own for p in parameters if p.ndim > 1)))


@functools.cache
def stage_shapes(config: ModelConfig, stage: int) -> Mapping[str, torch.Size]:
    """Of the trainable parameters of a stage, by name. Raises ConfigError for a bad factory."""
    factory = _factory(config.factory)
    try:
        with _Uninitialised(torch.device("meta")):
            module = factory(config, stage)
    except (RuntimeError, NotImplementedError):  # a user's own, which calculates with its parameters
        with _Uninitialised():
            module = factory(config, stage)
    return {name: p.shape for name, p in module.named_parameters() if p.requires_grad}


def stage_values(config: ModelConfig) -> list[int]:
    """How many trainable parameters every stage has. Raises ConfigError for a bad factory."""
    shapes = (stage_shapes(config, stage) for stage in range(config.stages))
    return [sum(shape.numel() for shape in each.values()) for each in shapes]


class _Uninitialised(TorchFunctionMode):
    """Modules are built without values of their own: `initialise` draws all of them.

    On `device` the parameters need no memory. Anything but `torch.empty` stays on the processor: for some
    operations on `meta` torch imports 800 modules of Python, which would stop the event loop of a newcomer,
    and with it all who call it, for seconds.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func is torch.empty and self._device is not None:
            kwargs["device"] = self._device
        return func(*args, **kwargs)


def initialise(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every parameter from a generator seeded by its name: independent of how the model is cut.

    Matrices: normal, 0.02, those that write into the residual stream narrower by sqrt(2 * layers);
    vectors named `bias` zero; other vectors (norms) one. Drawn in float64 and rounded to steps of 2^-10
    deviations, so that processors agree whose logarithms do not.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * config.layers) ** 0.5
            drawn = torch.empty(parameter.shape, dtype=torch.float64).normal_(generator=generator)
            parameter.copy_(drawn.mul_(1024).round_().mul_(std / 1024))


def _factory(name: str) -> StageFactory:
    if name == "llama":
        from swarm.model.llama import LlamaStage

        return LlamaStage
    module_name, _, function = name.partition(":")
    try:
        return cast(StageFactory, getattr(importlib.import_module(module_name), function))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.factory: cannot load {name!r} ({error}); it names a function as package.module:function"
        ) from None
