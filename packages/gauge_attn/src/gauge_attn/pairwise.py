"""Dense attention between Gaussians of diagonal covariance, fast enough to train with: no factorisation per pair.

What `reference.dense_kl_attention` defines, for the connections and approximations that no features exist for. In the
transport Omega_ij = F_i M_ij F_j^T the tokens' matrices F need an inverse, one per token, and M is orthogonal. With
W = Omega^-1 = F_j^-T M^T F_i^-1, and as KL does not change when both its arguments are moved by W,

    2 KL(q_i || Omega q_j) = sum_l [(W^2 sigma_i)_l + (W mu_i - mu_j)_l^2] / sigma_jl - d
                             + sum_l log sigma_jl - sum_k log sigma_ik + 2 log|det F_i| + 2 log|det F_j|,

W^2 element by element. The diagonal approximation keeps of Omega Sigma_j Omega^T the diagonal Omega^2 sigma_j only.

Shape suffixes: B batch, H heads, N tokens, d = 2l+1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gauge_attn.reference import DenseAttended


def pairwise_kl_attention(
    mu: Tensor,
    sigma: Tensor,
    matrices: Tensor,
    kappa_H: Tensor,
    *,
    between: Tensor | None = None,
    self_mask: bool = False,
    covariance: Literal["full", "diag_approx"] = "full",
) -> DenseAttended:
    """Causal attention; `covariance` of the result is None.

    mu, sigma (variances): (B, H, N, d). matrices: F (B, N, d, d), shared by the heads, not necessarily orthogonal.
    between: orthogonal M (B, N, N, d, d); None is the identity. kappa_H: (H,).
    """
    n = mu.size(2)
    omega = _product(matrices, matrices, between)
    mu_j = torch.einsum("bijkl,bhjl->bhijk", omega, mu)
    if covariance == "diag_approx":
        divergence = _diagonal(mu, sigma, omega, mu_j)
    else:
        divergence = _full(mu, sigma, matrices, between)
    i = torch.arange(n, device=mu.device)
    allowed = i <= i[:, None] - int(self_mask)
    allowed[0, 0] = True
    logits = (-divergence / kappa_H[:, None, None]).masked_fill(~allowed, -torch.inf)
    beta = logits.softmax(-1)
    mean = (beta.unsqueeze(-2) @ mu_j).squeeze(-2)
    return DenseAttended(mean, None, logits.logsumexp(-1), (beta * divergence).sum(-1), beta, divergence)


def _product(left: Tensor, right: Tensor, between: Tensor | None) -> Tensor:
    """left_i M_ij right_j^T, (B, N, N, d, d)."""
    if between is None:
        return torch.einsum("bikm,bjlm->bijkl", left, right)
    return left.unsqueeze(2) @ between @ right.unsqueeze(1).mT


def _diagonal(mu: Tensor, sigma: Tensor, omega: Tensor, mu_j: Tensor) -> Tensor:
    var_j = torch.einsum("bijkl,bhjl->bhijk", omega.square(), sigma)
    ratio = sigma.unsqueeze(3) / var_j
    return 0.5 * (ratio - 1 - ratio.log() + (mu_j - mu.unsqueeze(3)).square() / var_j).sum(-1)


def _full(mu: Tensor, sigma: Tensor, matrices: Tensor, between: Tensor | None) -> Tensor:
    inverse = torch.linalg.inv_ex(matrices).inverse
    back = _product(inverse.mT, inverse.mT, between)  # W^T, as (F_j^-T M^T F_i^-1)^T = F_i^-T M F_j^-1
    mean = torch.einsum("bijkl,bhik->bhijl", back, mu)
    spread = torch.einsum("bijkl,bhik->bhijl", back.square(), sigma) + (mean - mu.unsqueeze(2)).square()
    log_det_BHN = 0.5 * sigma.log().sum(-1) - torch.linalg.slogdet(inverse).logabsdet.unsqueeze(1)
    log_det_j = log_det_BHN.unsqueeze(2)
    log_det_i = (log_det_BHN - sigma.log().sum(-1)).unsqueeze(3)
    return 0.5 * ((spread / sigma.unsqueeze(2)).sum(-1) - mu.size(-1)) + log_det_i + log_det_j
