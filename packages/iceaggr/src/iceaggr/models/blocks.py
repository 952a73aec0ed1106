"""The transformer blocks of the flat models, on packed tokens.

Shape suffixes: T tokens of all events in a row, D model width, H heads, K width of one head, R rows read out.
"""

from __future__ import annotations

import math

import torch
from lab_shared.attention import Mask, ScoreMod, attend
from lab_shared.norms import qk_norm, rms_norm
from torch import Tensor, nn
from torch.nn import functional as F

from iceaggr.models.v3 import interval_scores


class SelfAttention(nn.Module):
    """Multi-head self-attention inside the segments of a mask.

    The query, key and value matrices are separate parameters (Muon orthogonalises each on its own, and a
    head's share is easy to find) but are multiplied as one. interval: scores also learn from the space-time interval
    between tokens, with two weights per head that start at 0 (`iceaggr.models.v3`).
    """

    def __init__(
        self, d_model: int, heads: int, *, bias: bool, normalize_qk: bool, dropout: float, interval: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.normalize_qk, self.dropout = heads, normalize_qk, dropout
        self.q = nn.Linear(d_model, d_model, bias=bias)
        self.k = nn.Linear(d_model, d_model, bias=bias)
        self.v = nn.Linear(d_model, d_model, bias=bias)
        self.c_proj = nn.Linear(d_model, d_model, bias=bias)
        self.side_H = nn.Parameter(torch.zeros(heads)) if interval else None
        self.cone_H = nn.Parameter(torch.zeros(heads)) if interval else None

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as they enter the attention, each (T, H, K)."""
        layers = (self.q, self.k, self.v)
        bias = None if self.q.bias is None else torch.cat([layer.bias for layer in layers])
        qkv = F.linear(x_TD, torch.cat([layer.weight for layer in layers]), bias)
        q_THK, k_THK, v_THK = qkv.view(x_TD.shape[0], 3, self.heads, -1).unbind(1)
        if self.normalize_qk:
            q_THK, k_THK = qk_norm(q_THK, k_THK)
        return q_THK, k_THK, v_THK

    def score_mod(self, place_T5: Tensor | None) -> ScoreMod | None:
        """What turns scores q.k / sqrt(K) into those the softmax sees; None if nothing does.

        Raises ValueError when the weights are there and the places are not.
        """
        if self.side_H is None or self.cone_H is None:
            return None
        if place_T5 is None:
            raise ValueError("this model's attention needs place_T5 = model.place(features_TF, mask) beside the tokens")
        return interval_scores(place_T5, self.side_H, self.cone_H)

    def forward(self, x_TD: Tensor, mask: Mask, rows_R: Tensor | None = None, place_T5: Tensor | None = None) -> Tensor:
        y_TD = attend(*self.project(x_TD), mask, score_mod=self.score_mod(place_T5)).flatten(1)
        if rows_R is not None:
            y_TD = y_TD.index_select(0, rows_R)
        return F.dropout(self.c_proj(y_TD), self.dropout, self.training)


class BlockV2(nn.Module):
    """x = a x + b x0; x += attention(rms(x)); x += ffn(rms(x)), with QK norm, ReLU^2 and no biases.

    a (`scale_x`) starts at 1 and b (`scale_x0`) at 0.1. Both output projections start at zero, the other
    matrices uniform within +-sqrt(3 / d_model), so that a fresh block only mixes x with x0.
    """

    def __init__(self, d_model: int, d_hidden: int, heads: int, dropout: float, interval: bool = False) -> None:
        super().__init__()
        self.scale_x = nn.Parameter(torch.tensor(1.0))
        self.scale_x0 = nn.Parameter(torch.tensor(0.1))
        self.attention = SelfAttention(
            d_model, heads, bias=False, normalize_qk=True, dropout=dropout, interval=interval
        )
        self.c_fc = nn.Linear(d_model, d_hidden, bias=False)
        self.c_proj = nn.Linear(d_hidden, d_model, bias=False)
        bound = math.sqrt(3 / d_model)
        for layer in (self.attention.q, self.attention.k, self.attention.v, self.c_fc):
            nn.init.uniform_(layer.weight, -bound, bound)
        for layer in (self.attention.c_proj, self.c_proj):
            nn.init.zeros_(layer.weight)

    def forward(
        self, x_TD: Tensor, x0_TD: Tensor, mask: Mask, rows_R: Tensor | None = None, place_T5: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (R, D) when only these rows of the result are wanted."""
        x_TD = self.scale_x * x_TD + self.scale_x0 * x0_TD
        y_TD = self.attention(rms_norm(x_TD), mask, rows_R, place_T5)
        x_TD = (x_TD if rows_R is None else x_TD.index_select(0, rows_R)) + y_TD
        return x_TD + self.c_proj(F.relu(self.c_fc(rms_norm(x_TD))).square())


class BlockV1(nn.Module):
    """Pre-norm encoder block: LayerNorm, biases, GELU; torch's default initialisation. x0 is not used."""

    def __init__(self, d_model: int, d_hidden: int, heads: int, dropout: float, interval: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = SelfAttention(
            d_model, heads, bias=True, normalize_qk=False, dropout=dropout, interval=interval
        )
        self.norm2 = nn.LayerNorm(d_model)
        self.c_fc = nn.Linear(d_model, d_hidden)
        self.c_proj = nn.Linear(d_hidden, d_model)

    def forward(
        self, x_TD: Tensor, x0_TD: Tensor, mask: Mask, rows_R: Tensor | None = None, place_T5: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (R, D) when only these rows of the result are wanted."""
        y_TD = self.attention(self.norm1(x_TD), mask, rows_R, place_T5)
        x_TD = (x_TD if rows_R is None else x_TD.index_select(0, rows_R)) + y_TD
        return x_TD + self.c_proj(F.gelu(self.c_fc(self.norm2(x_TD))))
