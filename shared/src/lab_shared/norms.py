"""Root-mean-square norms (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, without weights; same shape and dtype as x.

    float16 and bfloat16 are normalised in float32 and rounded once at the end. A row of zeros stays zero,
    with finite gradients. (Written out rather than F.rms_norm: as fast or faster on CPU, and equal once
    compiled.)
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm(x) * weight` over a last dimension of `dim`; weight starts at one. Same dtype as x."""

    def __init__(self, dim: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def qk_norm(q: Tensor, k: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., D) normalised per head, so that |score| <= scale * D (Henry et al. 2020,
    arXiv:2010.04245)."""
    return rms_norm(q, eps), rms_norm(k, eps)
