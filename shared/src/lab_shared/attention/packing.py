"""Packed segments as a few padded rectangles, so that plain SDPA can run them (the CPU training path).

Segments of similar length share a rectangle ("bucket") of (n, L) token places. L is a multiple of 16 (the CPU
kernels are up to twice as fast there: whole AVX-512 vectors) and at most RATIO times what a segment of the
bucket needs rounded up so. Hence a segment of length l occupies at most 1.2 * (l + 15) places.

Shape suffixes: T tokens, U used tokens (no padding), P bucket places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGN = 16
RATIO = 1.2


class Bucket(NamedTuple):
    """One rectangle of n segments times `length` places."""

    n: int
    length: int
    valid: Tensor | None
    """bool (n, 1, 1, length), False at places without a token; None when there are none."""


@dataclass
class Buckets:
    """The whole plan: places in bucket order. (Neither a tuple nor frozen: torch 2.11's compiler looks into
    those and would guard on every bucket.)"""

    token_P: Tensor
    """int64, the token at each place; spare places repeat the first token of their segment."""
    spare_P: Tensor
    """int64, the places that hold no token."""
    place_U: Tensor
    """int64, where each used token went."""
    n_tokens: int
    buckets: list[Bucket]

    @property
    def sizes(self) -> list[int]:
        return [b.n * b.length for b in self.buckets]


def plan_buckets(offsets_S1: np.ndarray, total: int, device: torch.device) -> Buckets:
    """Places for the segments given by host offsets (int64, valid); empty segments take none."""
    length_S = np.diff(offsets_S1)
    order = np.argsort(-length_S, kind="stable")
    order = order[length_S[order] > 0]
    padded = -(-length_S[order] // ALIGN) * ALIGN
    token, spare, buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
    place_U = np.zeros(int(offsets_S1[-1]), dtype=np.int64)
    begin, base = 0, 0
    while begin < len(order):
        longest = int(padded[begin])
        # padded falls along the order: all that are long enough to share this bucket come next.
        end = begin + int(np.searchsorted(-padded[begin:], -longest / RATIO, side="right"))
        members = order[begin:end]
        column = np.arange(longest)
        valid = column < length_S[members, None]
        tokens = np.where(valid, offsets_S1[members, None] + column, offsets_S1[members, None])
        place_U[tokens[valid]] = base + np.flatnonzero(valid)
        token.append(tokens.ravel())
        spare.append(base + np.flatnonzero(~valid))
        mask = None if valid.all() else torch.from_numpy(valid[:, None, None, :]).to(device)
        buckets.append(Bucket(end - begin, longest, mask))
        begin, base = end, base + valid.size
    token_P, spare_P = (torch.from_numpy(np.concatenate(x)).to(device) for x in (token, spare))
    return Buckets(token_P, spare_P, torch.from_numpy(place_U).to(device), total, buckets)


class _ToBuckets(torch.autograd.Function):
    """(T, ...) to (P, ...), zeros at spare places. A linear map whose transpose is _ToTokens, so that both
    directions are row copies (autograd's own index_add backward runs row by row on CPU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Buckets) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token_P).index_fill_(0, plan.spare_P, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToTokens.apply(grad, ctx.plan), None


class _ToTokens(torch.autograd.Function):
    """(P, ...) to (T, ...), zeros at padding tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Buckets) -> Tensor:
        ctx.plan = plan
        out = x.new_empty((plan.n_tokens, *x.shape[1:]))
        n_used = plan.place_U.numel()
        torch.index_select(x, 0, plan.place_U, out=out[:n_used])
        out[n_used:] = 0
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToBuckets.apply(grad, ctx.plan), None


def to_buckets(x: Tensor, plan: Buckets) -> list[Tensor]:
    """Token rows (T, H, D) as one (n, H, L, D) view per bucket; spare places are zero. Differentiable."""
    parts = _ToBuckets.apply(x, plan).split(plan.sizes)
    return [p.unflatten(0, (b.n, b.length)).transpose(1, 2) for p, b in zip(parts, plan.buckets, strict=True)]


def to_tokens(parts: list[Tensor], plan: Buckets) -> Tensor:
    """The inverse of to_buckets: (n, H, L, ...) per bucket to (T, H, ...); padding tokens are zero."""
    return _ToTokens.apply(torch.cat([p.transpose(1, 2).flatten(0, 1) for p in parts]), plan)
