"""Root-mean-square norms (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32 or better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-6


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last dimension, without weights; same shape and dtype as x.

    float16 and bfloat16 are normalised in float32 and rounded once at the end. A row of zeros stays zero,
    with finite gradients. Differentiable once on CPUs, where memory traffic is what a norm costs: its own backward
    pass reads and writes half as much as autograd's. Elsewhere the formula is left to the compiler.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = _RMSNormOnCPU.apply(wide, eps)
    else:
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype)


class _RMSNormOnCPU(torch.autograd.Function):
    """y = r x with r = (mean(x^2) + eps)^(-1/2); dL/dx = r (g - x r^2 mean(g x)) for g = dL/dy."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r)
        return x * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, r = ctx.saved_tensors
        weight = torch.linalg.vecdot(g, x).unsqueeze(-1).mul_(r * r).div_(-x.shape[-1])
        return torch.addcmul(g, x, weight).mul_(r), None


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


def qk_norm(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., D) normalised per head, so that |score| <= scale * D (Henry et al. 2020,
    arXiv:2010.04245)."""
    return rms_norm(q), rms_norm(k)
