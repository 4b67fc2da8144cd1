"""A decoder-only transformer in stages: RMSNorm, RoPE, SwiGLU, scaled-dot-product attention.

Parameter names are those of Hugging Face's Llama (`model.layers.3.self_attn.q_proj.weight`), so the state
of all stages together is a Llama checkpoint and the other way round.

B batch, T tokens, D width, H heads, K width of a head, V vocabulary
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from swarm.config import ModelConfig
from swarm.partition import partition


def layer_costs(config: ModelConfig) -> list[float]:
    """Multiply-adds per token of every layer; the head is counted with the last one."""
    attention = 4 * config.width**2
    feed_forward = 3 * config.width * config.hidden_width
    costs = [float(attention + feed_forward)] * config.layers
    costs[-1] += config.width * config.vocabulary
    return costs


@functools.cache  # the cut takes a second for 80 layers, and is asked for once per stage
def _cut(config: ModelConfig) -> list[range]:
    return partition(layer_costs(config), config.stages)


class RotaryEmbedding(nn.Module):
    """Rotate pairs (i, i + K/2) of every head by an angle that grows with the position."""

    def __init__(self, head_width: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
        self.register_buffer("frequency", frequency, persistent=False)
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        cos_TK, sin_TK = self._table(x_BHTK.shape[2], x_BHTK.device)
        low, high = x_BHTK.chunk(2, dim=-1)
        return x_BHTK * cos_TK + torch.cat((-high, low), dim=-1) * sin_TK

    def _table(self, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._tables.get((tokens, device))
        if table is None:
            frequency = self.get_buffer("frequency").cpu()
            angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency)
            angles = torch.cat((angles, angles), dim=-1)
            table = angles.cos().float().to(device), angles.sin().float().to(device)
            self._tables = {(tokens, device): table}  # one length at a time is in use
        return table


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.rotary = RotaryEmbedding(config.width // config.heads, config.rope_theta)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape

        def split(y_BTD: torch.Tensor) -> torch.Tensor:
            return y_BTD.view(B, T, self.heads, D // self.heads).transpose(1, 2)

        q, k, v = split(self.q_proj(x_BTD)), split(self.k_proj(x_BTD)), split(self.v_proj(x_BTD))
        out_BHTK = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        return self.o_proj(out_BHTK.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden_width, bias=False)
        self.down_proj = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class _Body(nn.Module):
    """What Hugging Face calls `model`: the part of it that this stage holds."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        layers = _cut(config)[stage]
        if stage == 0:
            self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleDict({str(index): Layer(config) for index in layers})
        if stage == config.stages - 1:
            self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)


class LlamaStage(nn.Module):
    """One stage of the transformer."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        self.model = _Body(config, stage)
        if stage == config.stages - 1:
            self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] or hidden [B, T, D] -> hidden [B, T, D] or logits [B, T, V]."""
        body = self.model
        if hasattr(body, "embed_tokens"):
            x = body.embed_tokens(x)
        for layer in body.layers.values():
            x = layer(x)
        if hasattr(body, "norm"):
            x = self.lm_head(body.norm(x))
        return x
