"""Dense, pairwise KL attention: the definition written out, O(N^2) memory. For tests, figures and reproductions.

`kl_attention` must match it wherever both apply. What only exists here: the attention matrix, transport that depends
on the pair (curvature), the approximation that keeps only the diagonal of transported covariances, and the rotation
matrices of a four-term Taylor series.

Shape suffixes: B batch, H heads, N tokens, d = 2l+1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gauge_attn.attention import column, with_rope
from gauge_attn.gaussians import kl_divergence
from gauge_attn.so3 import generators

_WITHOUT_EFFECT = {"precision", "centre", "cache", "return_lse", "return_kl"}


class DenseAttended(NamedTuple):
    """`attention.Attended`, all fields filled (the covariance unless mean_only), and the two matrices."""

    mean: Tensor
    covariance: Tensor | None
    lse: Tensor
    kl: Tensor
    beta: Tensor
    """(B, H, N, N): the attention weights"""
    divergence: Tensor
    """(B, H, N, N): KL_ij of every pair, future ones too"""


def dense_kl_attention(
    mu: Tensor,
    sigma: Tensor,
    frames: Tensor | None,
    kappa: float | Tensor,
    *,
    causal: bool = True,
    self_mask: bool = False,
    alibi: float | Tensor | None = None,
    rope: Tensor | None = None,
    covariance: Literal["full", "diag_approx"] = "full",
    transport: Tensor | None = None,
    mean_only: bool = False,
    **_options: Any,
) -> DenseAttended:
    """What `kl_attention` computes, pair by pair, with its arguments (those that choose precision, a reference belief
    or what to return change nothing here).

    Omega_ij = F_i F_j^T with F = frames, which need not be orthogonal (`taylor4_frames`); transport (B, N, N, d, d)
    or (B, H, N, N, d, d) gives Omega_ij itself, for connections with curvature.
    covariance "full": KL with Omega_ij Sigma_j Omega_ij^T by Cholesky factors. "diag_approx": of variances, with
    sigma'_k = sum_l Omega_kl^2 sigma_l and the off-diagonal elements dropped; not gauge invariant, not even under
    one rotation for all. Then the covariance returned is diagonal too.

    Raises ValueError for a cache and for diag_approx without variances, TypeError for an option that there is not.
    """
    if unknown := _options.keys() - _WITHOUT_EFFECT:
        raise TypeError(f"dense_kl_attention has no option {min(unknown)!r}")
    if _options.get("cache") is not None:
        raise ValueError("the dense reference takes no cache; give it all tokens")
    d, n = mu.size(-1), mu.size(2)
    isotropic = sigma.dim() == 3
    omega = _transport(with_rope(frames, rope, mu), mu) if transport is None else transport.to(mu)
    omega = omega.unsqueeze(1) if omega.dim() == 5 else omega
    mu_i = mu.unsqueeze(3).expand(-1, -1, n, n, d)
    mu_j = (omega @ mu[:, :, None, :, :, None]).squeeze(-1)
    if covariance == "diag_approx":
        if sigma.dim() != 4:
            raise ValueError(f"diag_approx needs variances {tuple(mu.shape)}, got sigma {tuple(sigma.shape)}")
        var_i = sigma.unsqueeze(3)
        var_j = (omega.square() @ sigma[:, :, None, :, :, None]).squeeze(-1)
        ratio = var_i / var_j
        divergence = 0.5 * (ratio + (mu_j - mu_i).square() / var_j - 1 - ratio.log()).sum(-1)
        cov_j = torch.diag_embed(var_j)
    else:
        sigma = _full(sigma, d)
        cov_j = omega @ sigma.unsqueeze(2) @ omega.mT
        divergence = kl_divergence(mu_i, sigma.unsqueeze(3).expand_as(cov_j), mu_j, cov_j)

    i = torch.arange(n, device=mu.device)
    logits = -divergence / column(kappa, mu).unsqueeze(-1)
    if alibi is not None:
        logits = logits - column(alibi, mu).unsqueeze(-1) * (i[:, None] - i).to(mu.dtype)
    if causal:
        allowed = i <= i[:, None] - int(self_mask)
        allowed[0, 0] = True
        logits = logits.masked_fill(~allowed, -torch.inf)
    beta = logits.softmax(-1)
    mean = (beta.unsqueeze(-1) * mu_j).sum(3)
    mixed = None if mean_only else _mixture_covariance(beta, mean, mu_j, cov_j)
    if mixed is not None and covariance == "diag_approx":
        mixed = torch.diag_embed(mixed.diagonal(dim1=-2, dim2=-1))
    elif mixed is not None and isotropic:
        mixed = mixed.diagonal(dim1=-2, dim2=-1).mean(-1)
    return DenseAttended(mean, mixed, logits.logsumexp(-1), (beta * divergence).sum(-1), beta, divergence)


def taylor4_frames(phi_3: Tensor, l: int) -> Tensor:
    """sum_{k<=4} (phi.X)^k / k!, (..., d, d): the truncated exponential, far from orthogonal for l >= 2 and |phi| ~ 1.

    The transpose is the series of -phi, as phi.X is skew, so F_i F_j^T is exp(phi_i.X) exp(-phi_j.X) truncated.
    """
    a = torch.einsum("...a,aij->...ij", phi_3, generators(l, phi_3.dtype, phi_3.device))
    identity = torch.eye(2 * l + 1, dtype=phi_3.dtype, device=phi_3.device)
    total = identity
    for k in (4, 3, 2, 1):
        total = identity + a @ total / k
    return total


def _transport(frames: Tensor | None, mu: Tensor) -> Tensor:
    """Omega_ij = F_i F_j^T, (B, 1 or H, N, N, d, d); without frames identities (1, 1, 1, 1, d, d)."""
    if frames is None:
        return torch.eye(mu.size(-1), dtype=mu.dtype, device=mu.device)[None, None, None, None]
    frames = frames.unsqueeze(1) if frames.dim() == 4 else frames
    return frames.unsqueeze(3) @ frames.unsqueeze(2).mT


def _mixture_covariance(beta: Tensor, mean: Tensor, mu_j: Tensor, cov_j: Tensor) -> Tensor:
    second = (beta[..., None, None] * (cov_j + mu_j.unsqueeze(-1) * mu_j.unsqueeze(-2))).sum(3)
    return second - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _full(sigma: Tensor, d: int) -> Tensor:
    if sigma.dim() == 5:
        return sigma
    if sigma.dim() == 4:
        return torch.diag_embed(sigma)
    return sigma[..., None, None] * torch.eye(d, dtype=sigma.dtype, device=sigma.device)
