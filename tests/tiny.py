"""The least that is a stage: schedules are about protocols, and run thousands of them."""

import torch
from torch import nn

from swarm.config import ModelConfig


class TinyStage(nn.Module):
    """A matrix and a nonlinearity per layer, between an embedding and a head."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        if stage == 0:
            self.embedding = nn.Embedding(config.vocabulary, config.width)
        layers = range(stage, config.layers, config.stages)
        self.layers = nn.ModuleDict({str(n): nn.Linear(config.width, config.width) for n in layers})
        if stage == config.stages - 1:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "embedding"):
            x = self.embedding(x)
        for linear in self.layers.values():
            x = x + torch.tanh(linear(x))
        return self.head(x) if hasattr(self, "head") else x


def build(config: ModelConfig, stage: int) -> nn.Module:
    return TinyStage(config, stage)
