"""The dot-product baseline: a pre-norm GPT with RoPE and an untied readout.

Shapes: B windows, N tokens, M cached tokens, D width, H heads, E = D / H, V symbols.
"""

from __future__ import annotations

import torch
from lab_shared.attention import Mask, attend
from lab_shared.errors import UserError
from lab_shared.norms import rms_norm
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_attn.config import ModelConfig
from gauge_attn.models.layers import Output, constant, matrix, normal

_MLP = 4
Cache = list[tuple[Tensor, Tensor]]
"""Per layer the keys and values (B, H, M, E) so far."""


class GPT(nn.Module):
    """Logits of the next token. window: the longest sequence.

    Raises UserError when the heads do not divide the width evenly.
    """

    def __init__(self, config: ModelConfig, vocab: int, window: int) -> None:
        super().__init__()
        width, heads = config.d_model, config.heads
        if width % (2 * heads):
            raise UserError(f"d_model={width} is no multiple of 2 heads = {2 * heads}, which RoPE needs: change one")
        self.window, self.heads, self.head_width = window, heads, width // heads
        self.embedding_VD = normal(vocab, width, std=1.0, role="embedding")
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(config.layers))
        self.gain_D = constant(width, value=1.0, role="vector")
        self.readout_VD = matrix(vocab, width, role="readout", gain=0.1)

    def forward(self, tokens_BN: Tensor, *, cache: Cache | None = None, record: list | None = None) -> Output:
        """tokens_BN: int64; with a cache, the tokens after those it holds (it grows by them).

        record: a list that gets, per layer, the queries and keys (B, H, N, E). Raises ValueError beyond the window.
        """
        past = cache[0][0].size(2) if cache else 0
        if past + tokens_BN.size(1) > self.window:
            raise ValueError(f"{past + tokens_BN.size(1)} tokens do not fit the model's window of {self.window}")
        angles = _rope_angles(past, tokens_BN.size(1), self.head_width, tokens_BN.device)
        x_BND = F.embedding(tokens_BN, self.embedding_VD)
        pasts = cache if cache else [None] * len(self.blocks)
        grown = []
        for block, past_kv in zip(self.blocks, pasts, strict=True):
            x_BND, kv = block(x_BND, angles, past_kv, record)
            grown.append(kv)
        if cache is not None:
            cache[:] = grown
        logits_BNV = F.linear(rms_norm(x_BND) * self.gain_D, self.readout_VD)
        return Output(logits_BNV, None)

    def new_cache(self) -> Cache:
        return []


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_gain_D = constant(width, value=1.0, role="vector")
        self.query_DD = matrix(width, width)
        self.key_DD = matrix(width, width)
        self.value_DD = matrix(width, width)
        self.mix_DD = matrix(width, width, gain=0.1)
        self.mlp_gain_D = constant(width, value=1.0, role="vector")
        self.up = matrix(_MLP * width, width)
        self.down = matrix(width, _MLP * width, gain=0.1)

    def forward(
        self,
        x_BND: Tensor,
        angles: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        record: list[tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h_BND = rms_norm(x_BND) * self.attention_gain_D
        q, k, v = (
            F.linear(h_BND, w).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for w in (self.query_DD, self.key_DD, self.value_DD)
        )
        q, k = _rotate(q, *angles).to(v.dtype), _rotate(k, *angles).to(v.dtype)
        if record is not None:
            record.append((q, k))
        mask = Mask.causal()
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            n, m = q.size(2), k.size(2)
            allowed = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            mask = Mask.dense(allowed)
        x_BND = x_BND + F.linear(attend(q, k, v, mask).transpose(1, 2).flatten(2), self.mix_DD)
        h_BND = rms_norm(x_BND) * self.mlp_gain_D
        return x_BND + F.linear(F.gelu(F.linear(h_BND, self.up)), self.down), (k, v)


def parameter_count(width: int, layers: int, vocab: int) -> int:
    """Parameters of a GPT: 2 V D + layers (12 D^2 + 2 D) + D."""
    return 2 * vocab * width + layers * ((4 + 2 * _MLP) * width**2 + 2 * width) + width


def matched_width(parameters: int, layers: int, vocab: int, heads: int) -> int:
    """The width, a multiple of 2 heads, whose GPT comes nearest to a number of parameters."""
    widths = range(2 * heads, 8193, 2 * heads)
    return min(widths, key=lambda width: abs(parameter_count(width, layers, vocab) - parameters))


def _rope_angles(start: int, n: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (N, E / 2) of position times 10000^(-2 i / E). Source: Su et al. 2021, arXiv:2104.09864."""
    rate = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(start, start + n, device=device)[:, None] * rate
    return angle.cos(), angle.sin()


def _rotate(x_BHNE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BHNE.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
