"""The trainable parameters of a module, kept in one flat vector.

Gradients are averaged, steps taken and states hashed and sent in that vector's order: as the module names
them, the small tensors last. A step gives the module a new vector instead of writing into the old one.

Torch, no I/O.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from swarm.errors import ConfigError

SMALL_VALUES = 1 << 13  # of a tensor, a norm's for instance: it costs little to send it finely


@dataclass(frozen=True, slots=True)
class Weights:
    """Those of one version."""

    vector: torch.Tensor  # [values] float32
    parameters: list[nn.Parameter]  # in its memory


class Layout:
    """Where a module's parameters lie in the vector."""

    def __init__(self, module: nn.Module) -> None:
        """Raises ConfigError for a module that cannot be trained in float32."""
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        named.sort(key=lambda each: each[1].numel() > SMALL_VALUES, reverse=True)
        if not named:
            raise ConfigError("model.factory: a stage without trainable parameters")
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise ConfigError(
                    f"model.factory: parameter {name} is {parameter.dtype}, stages train in float32"
                )
        self._module = module
        self.shapes = {name: parameter.shape for name, parameter in named}
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        self.values = sum(self._sizes)
        self.small_values = sum(size for size in self._sizes if size <= SMALL_VALUES)

    def adopt(self) -> Weights:
        """The module's parameters, which from now on lie in a vector."""
        own = dict(self._module.named_parameters())
        weights = self.weights(self.joined({name: own[name].detach() for name in self.shapes}))
        self.give(weights)
        return weights

    def weights(self, vector: torch.Tensor) -> Weights:
        """Parameters in the memory of `vector` ([values] float32)."""
        return Weights(vector, [nn.Parameter(part) for part in self.parted(vector).values()])

    def give(self, weights: Weights) -> None:
        """Make them the module's; graphs under way keep the old ones."""
        own = dict(self._module.named_parameters())
        renewed = {own[name]: new for name, new in zip(self.shapes, weights.parameters, strict=True)}
        for owner in self._module.modules():
            for name, old in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
                if old in renewed:
                    setattr(owner, name, renewed[old])

    def parted(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a vector, by name, in its memory."""
        parts = zip(self.shapes.items(), vector.split(self._sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def joined(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A vector [values] of tensors by name: in place if one lies behind the other, else a new one."""
        parts = [tensors[name].contiguous().view(-1) for name in self.shapes]
        place, behind = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
        for part in parts:
            if (part.untyped_storage().data_ptr(), part.storage_offset()) != (place, behind):
                return torch.cat(parts)
            behind += part.numel()
        # `.data`: autograd counts writes by tensor. A step that writes into the moments of a state must not
        # spoil graphs with its parameters, which lie in the same memory.
        return parts[0].as_strided((self.values,), (1,)).data
