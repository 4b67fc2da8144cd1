"""A user's own stage modules: a character-level GRU, cut into stages (see `custom_model.yaml`).

A factory gets the model's configuration and the number of a stage, and returns the module of that stage:
token ids [B, T] into the first, hidden [B, T, D] between, logits [B, T, V] out of the last.
"""

import torch
from torch import nn

from swarm.config import ModelConfig


class GruStage(nn.Module):
    """Some recurrent layers, with a residual connection around each."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        layers = range(stage, config.layers, config.stages)
        if stage == 0:
            self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleDict(
            {str(index): nn.GRU(config.width, config.width, batch_first=True) for index in layers}
        )
        if stage == config.stages - 1:
            self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "embedding"):
            x = self.embedding(x)
        for layer in self.layers.values():
            x = x + layer(x)[0]
        return self.head(x) if hasattr(self, "head") else x


def build(config: ModelConfig, stage: int) -> nn.Module:
    return GruStage(config, stage)
