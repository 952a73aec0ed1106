"""Mini-Qwen3: a pre-norm transformer with QK-Norm, removable rotary positions, SwiGLU and tied embeddings.

Shape suffixes: B batch, T tokens, D model width, H query heads, G key and value heads (G divides H), C head width,
M MLP width, V vocabulary.

    x = E[token];  x += Attention(norm(x));  x += SwiGLU(norm(x)) in every block;  logits = norm(x) E^T

Equal to Hugging Face's Qwen3ForCausalLM with the same weights (see `hf`). There are no biases, and the parameters are

    L (C D (2H + 2G) + 3 D M + 2D + 2C) + D + V D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lab_shared.attention import Mask, attend
from lab_shared.norms import RMSNorm
from torch import Tensor, nn

from attn_clustering import hooks
from attn_clustering.config import ModelConfig
from attn_clustering.hooks import FINAL_HOOK, Cache, Hook, at

IGNORE = -1
"""A target that counts in no loss."""
CAUSAL = Mask.causal()
Rotation = tuple[Tensor, Tensor]


def next_token_targets(tokens_BT: Tensor) -> Tensor:
    """Targets (B, T), int64: the next token of each position; the last position has none and is ignored.

    Keeping all T positions (rather than T - 1) keeps the length a power of two, and causal attention makes the loss
    the same.
    """
    return F.pad(tokens_BT[:, 1:].long(), (0, 1), value=IGNORE)


def rotation(n_tokens: int, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """(cos, sin) of the angles t theta^(-2i / C), both (T, 1, C) float32, the frequencies listed twice (rotate-half).

    Source: Su et al. 2021, arXiv:2104.09864, in the layout of GPT-NeoX and Qwen.
    """
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angle = torch.arange(n_tokens, device=device, dtype=torch.float32)[:, None] * theta**-exponent
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x_BTHC: Tensor, cos_sin: Rotation) -> Tensor:
    """Rotary positions applied to queries or keys, in float32, rounded once to their own type."""
    cos, sin = cos_sin
    low, high = x_BTHC.chunk(2, -1)
    return (x_BTHC * cos + torch.cat([-high, low], -1) * sin).type_as(x_BTHC)


class Attention(nn.Module):
    """Causal grouped-query attention with one RMSNorm gain of width C for all query heads and one for all key heads.

    Query head h uses key head h // (H / G). Scale 1 / sqrt(C).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, inner_kv = config.d_model, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.sizes = (inner, inner_kv, inner_kv)
        # Three matrices, multiplied as one: the optimiser orthogonalises each of them by itself.
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner_kv, bias=False)
        self.v_proj = nn.Linear(width, inner_kv, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, cos_sin: Rotation | None, hook: Hook | None = None) -> Tensor:
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        parts = F.linear(x_BTD, weight).split(self.sizes, dim=-1)
        q_BTHC, k_BTGC, v_BTGC = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        q_BTHC = at(hook, "attn.hook_q", self.q_norm(q_BTHC))
        k_BTGC = at(hook, "attn.hook_k", self.k_norm(k_BTGC))
        v_BTGC = at(hook, "attn.hook_v", v_BTGC)
        if cos_sin is not None:
            q_BTHC, k_BTGC = rotate(q_BTHC, cos_sin), rotate(k_BTGC, cos_sin)
        q_BTHC, k_BTGC = at(hook, "attn.hook_rot_q", q_BTHC), at(hook, "attn.hook_rot_k", k_BTGC)
        qkv = (q_BTHC.transpose(1, 2), k_BTGC.transpose(1, 2), v_BTGC.transpose(1, 2))
        z_BHTC = attend(*qkv, CAUSAL) if hook is None else hooks.observed_attention(*qkv, CAUSAL, hook)
        z_BTHC = at(hook, "attn.hook_z", z_BHTC.transpose(1, 2))
        return self.o_proj(z_BTHC.flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, hook: Hook | None = None) -> Tensor:
        gate_BTM, up_BTM = F.linear(x_BTD, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, -1)
        gate_BTM, up_BTM = at(hook, "mlp.hook_pre", gate_BTM), at(hook, "mlp.hook_pre_linear", up_BTM)
        return self.down_proj(at(hook, "mlp.hook_post", F.silu(gate_BTM) * up_BTM))


class Block(nn.Module):
    """x += Attention(norm(x)); x += SwiGLU(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, cos_sin: Rotation | None, hook: Hook | None = None) -> Tensor:
        x_BTD = at(hook, "hook_resid_pre", x_BTD)
        x_BTD = x_BTD + at(hook, "hook_attn_out", self.attn(self.attn_norm(x_BTD), cos_sin, hook))
        x_BTD = at(hook, "hook_resid_mid", x_BTD)
        x_BTD = x_BTD + at(hook, "hook_mlp_out", self.mlp(self.mlp_norm(x_BTD), hook))
        return at(hook, "hook_resid_post", x_BTD)


class Transformer(nn.Module):
    """The model. Make it with `build_model`, which sets the weights from a seed.

    config: what it was built from. rope_on: whether rotary positions are applied; `drope.remove_rope` turns them off.
    residual_dtype: type of the residual stream; None keeps the embedding's (float32).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_on = config.rope
        self.residual_dtype: torch.dtype | None = None
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, hooks: Hook | None = None) -> Tensor:
        """Logits (B, T, V), or with targets their mean cross-entropy in nats, 0-d float32.

        tokens_BT: integers below V. targets_BT: int64, IGNORE where no loss is due. hooks: see `run_with_hooks`.
        """
        return self.head(self.residual(tokens_BT, hooks), targets_BT, hooks)

    def residual(self, tokens_BT: Tensor, hooks: Hook | None = None) -> Tensor:
        """The residual stream (B, T, D) after the last block."""
        x_BTD = at(hooks, "hook_embed", self.embed(tokens_BT))
        if self.residual_dtype is not None:
            x_BTD = x_BTD.to(self.residual_dtype)
        config, cos_sin = self.config, None
        if self.rope_on:
            cos_sin = rotation(tokens_BT.size(1), config.head_dim, config.rope_theta, tokens_BT.device)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, cos_sin, None if hooks is None else hooks.of_layer(i))
        return x_BTD

    def head(self, x_BTD: Tensor, targets_BT: Tensor | None = None, hooks: Hook | None = None) -> Tensor:
        """From the last residual stream to logits, or to the loss."""
        x_BTD = at(hooks, FINAL_HOOK, self.norm(x_BTD))
        logits_BTV = F.linear(x_BTD, self.embed.weight)
        if targets_BT is None:
            return logits_BTV
        wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE)

    def run_with_cache(
        self,
        tokens_BT: Tensor,
        names: Sequence[str] | Callable[[str], bool] | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits and the named activations; see `hooks.run_with_cache`."""
        return hooks.run_with_cache(self, tokens_BT, names, device)

    def run_with_hooks(
        self, tokens_BT: Tensor, fwd_hooks: Sequence[tuple[str, Any]] = (), targets_BT: Tensor | None = None
    ) -> Tensor:
        """Logits (or the loss, with targets) with activations replaced; see `hooks.run_with_hooks`."""
        return hooks.run_with_hooks(self, tokens_BT, fwd_hooks, targets_BT)

    def watch(self, tokens_BT: Tensor, fwd_hooks: Sequence[tuple[str, Any]]) -> None:
        """The same up to the last block, without logits; see `hooks.watch`."""
        hooks.watch(self, tokens_BT, fwd_hooks)


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """A model on the CPU with weights N(0, init_std^2) and gains 1, the same for the same (config, seed) everywhere.

    Conditions that differ in nothing but the data's order thus start from the same weights.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, config.init_std, generator=generator)
    return model


def n_parameters(config: ModelConfig) -> int:
    """The number of parameters, tied embedding once, by the formula at the top."""
    c = config
    attention = c.head_dim * c.d_model * (2 * c.heads + 2 * c.kv_heads)
    block = attention + 3 * c.d_model * c.mlp + 2 * c.d_model + 2 * c.head_dim
    return c.layers * block + c.d_model + c.vocab * c.d_model
