"""Plain single-process PyTorch training of the same model on the same microbatches: the yardstick of
exactness. Nothing of the swarm's step is used: one module, one optimizer, one loop.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from swarm.config import OptimizerConfig, RunConfig
from swarm.model import build_stage
from swarm.optimizer import learning_rate


def train_plain(
    config: RunConfig, microbatches: Iterator[torch.Tensor], steps: int
) -> dict[str, torch.Tensor]:
    """Train `steps` steps; returns the parameters of the whole model by name."""
    whole = config.model.model_copy(update={"stages": 1})
    model = build_stage(whole, 0, seed=config.training.seed)
    training = config.training
    assert training.optimizer.clip_norm is None, "the swarm clips per stage, plain training cannot"
    optimizer = make_adamw(model.parameters(), training.optimizer)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training.optimizer, step, training.steps)
        optimizer.zero_grad()
        for _ in range(training.target_batch_tokens // training.microbatch_tokens):
            tokens = next(microbatches)
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            (loss / training.target_batch_tokens).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def make_adamw(parameters: Iterable[nn.Parameter], c: OptimizerConfig) -> torch.optim.AdamW:
    """Torch's own, which decays matrices only."""
    every = list(parameters)
    matrices, vectors = [p for p in every if p.ndim >= 2], [p for p in every if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)


def worst_difference(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference of any tensor, by norm, and its name."""
    assert ours.keys() == plain.keys()
    return max(((ours[n] - plain[n]).norm().item() / plain[n].norm().item(), n) for n in plain)
