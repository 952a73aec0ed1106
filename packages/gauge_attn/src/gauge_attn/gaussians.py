"""Gaussian beliefs as an exponential family: the features that turn KL divergences into dot products.

For one exponential family KL(q_i || q_j) = <E_i[t], eta_i - eta_j> - A(eta_i) + A(eta_j): up to a term of i alone it
is linear in i's mean parameters E_i[t] and in j's natural parameters and log-partition (eta_j, A(eta_j)). So a query
feature (mean parameters and a 1) times a key feature (natural parameters and the log-partition) is all of the
divergence that a softmax over j sees.

    Gaussian N(m, T), P = T^-1:      u = [svec(T + m m^T), m, 1]   k = [svec(P), -2 P m, m^T P m + log|T|]
    isotropic N(m, s I) in d dims:   u = [d s + |m|^2, m, 1]       k = [1/s, -2 m/s, |m|^2/s + d log s]

svec stacks the upper triangle with off-diagonal elements times sqrt(2), so that svec(A).svec(B) = tr(A B).
Widths for d = 1, 3, 5, 7, 9: 3, 10, 21, 36, 55, and d + 2.

Both are written relative to a reference belief r = N(c, s I), which is exact algebra and keeps digits when the beliefs
cluster around it: u' = u - u_r but for the 1, k' = k - k_r with the rest folded into its last slot. Then

    KL(q_i || q_j) = u'_i . k'_j / 2 + KL(q_i || r).

Shape suffixes: B batch, H heads, N tokens, d = 2l+1 components, F features.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gauge_attn import tables
from gauge_attn.tables import apply_table, matmul


class Centre(NamedTuple):
    """The reference belief N(mean, variance * I) in the token's own frame, a constant of the model.

    variance: a number or (H,); mean: None (zero), (d,) or (H, d). Never make it from the sequence at hand: a mean
    over tokens would let the last bits of the past depend on the future, and cached decoding would differ.
    """

    variance: float | Tensor = 1.0
    mean: Tensor | None = None


class Features(NamedTuple):
    """KL(i || j) = query_i . key_j / 2 + to_reference_i. The last slot of query is 1."""

    query_BHNF: Tensor
    key_BHNF: Tensor
    to_reference_BHN: Tensor


def svec(a: Tensor) -> Tensor:
    """(..., d, d) symmetric to (..., d(d+1)/2), row by row of the upper triangle, off-diagonal times sqrt(2)."""
    d = a.size(-1)
    return a[..., 0] if d == 1 else apply_table(a.flatten(-2), "svec", _svec_columns, d)


def svec_outer(x: Tensor) -> Tensor:
    """svec(x x^T): (..., d) to (..., d(d+1)/2)."""
    if x.size(-1) == 1:
        return x.square()
    if tables.could_be_tf32(x):  # compiled, the outer products are never stored
        return svec(x.unsqueeze(-1) * x.unsqueeze(-2))
    left, right = apply_table(x, "pairs", _pair_columns, x.size(-1)).chunk(2, -1)
    return left * right


def unsvec(v: Tensor, d: int) -> Tensor:
    """The inverse of `svec`: (..., d(d+1)/2) to symmetric (..., d, d)."""
    return v[..., None] if d == 1 else apply_table(v, "unsvec", _unsvec_columns, d).unflatten(-1, (d, d))


def kl_divergence(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    """KL(N(mean_p, cov_p) || N(mean_q, cov_q)) in nats, (..., d) and (..., d, d) to (...), by Cholesky factors.

    1/2 [tr(Q^-1 P) + (m_q - m_p)^T Q^-1 (m_q - m_p) - d + log|Q| - log|P|]
    """
    factor_p, factor_q = torch.linalg.cholesky(cov_p), torch.linalg.cholesky(cov_q)
    whitened = torch.linalg.solve_triangular(factor_q, factor_p, upper=False)
    shift = torch.linalg.solve_triangular(factor_q, (mean_q - mean_p).unsqueeze(-1), upper=False)
    log_ratio = (factor_q.diagonal(dim1=-2, dim2=-1).log() - factor_p.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    return 0.5 * (whitened.square().sum((-2, -1)) + shift.square().sum((-2, -1)) - mean_p.size(-1)) + log_ratio


def rotate(x: Tensor, frames: Tensor | None) -> Tensor:
    """x^T A per token: x (B, H, N, d) with A (B, N, d, e) shared by the heads or (B, H, N, d, e); None is the identity.

    With A = Omega it pulls back (Omega^T x), with A = Omega^T it pushes forward.
    """
    if frames is None:
        return x
    if frames.dim() == 4:
        return matmul(x.transpose(1, 2), frames).transpose(1, 2)
    return matmul(x.unsqueeze(-2), frames).squeeze(-2)


def _rotate_both(x: Tensor, y: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of two tensors by one batched product: small ones cost by their number. Tokens lie before heads."""
    if frames.dim() == 4:
        both = matmul(torch.cat([x.transpose(1, 2), y.transpose(1, 2)], 2), frames)
        first, second = both.split(x.size(1), 2)
        return first.transpose(1, 2), second.transpose(1, 2)
    first, second = matmul(torch.stack([x, y], -2), frames).unbind(-2)
    return first, second


def rotate_covariance(a: Tensor, frames: Tensor | None, *, back: bool = False) -> Tensor:
    """Omega A Omega^T, or Omega^T A Omega with `back`, of A (B, H, N, d, d)."""
    if frames is None:
        return a
    omega = frames.unsqueeze(1) if frames.dim() == 4 else frames
    return matmul(matmul(omega.mT, a), omega) if back else matmul(matmul(omega, a), omega.mT)


def features(mu: Tensor, sigma: Tensor, frames: Tensor | None, centre: Centre) -> Features:
    """Features of the beliefs pulled back into their own frames, N(Omega^T mu, Omega^T Sigma Omega).

    mu (B, H, N, d); sigma: variances (B, H, N, d), covariances (B, H, N, d, d) or one variance (B, H, N). frames
    (B, N, d, d) or (B, H, N, d, d), orthogonal. Nothing is inverted for variances: P = Omega^T diag(1/sigma) Omega.
    Covariances must be positive definite, which is not checked (it would wait for the device).
    """
    s = _per_head(centre.variance, mu)
    if centre.mean is not None:
        c = centre.mean if centre.mean.dim() == 1 else centre.mean[:, None]
        mu = mu - rotate(c.to(mu).expand_as(mu), _transpose(frames))
    if sigma.dim() == 3:
        return _isotropic_features(mu, sigma, frames, s)
    if sigma.dim() == 4:
        return _diagonal_features(mu, sigma, frames, s)
    m = rotate(mu, frames)
    t = rotate_covariance(sigma, frames, back=True)
    identity = torch.eye(t.size(-1), dtype=t.dtype, device=t.device)
    excess = (t - s[..., None] * identity) / s[..., None]
    inverse, log_det = _inverse_and_log_det(excess + identity)
    shrink = matmul(inverse, excess)
    shrink = (shrink + shrink.mT) / 2
    precision_mean = matmul(inverse, m.unsqueeze(-1)).squeeze(-1) / s
    log_term = log_det - _trace(shrink, identity)
    last = (m * precision_mean).sum(-1) + log_term
    one = torch.ones_like(m[..., :1])
    query = torch.cat([svec(excess * s[..., None]) + svec_outer(m), m, one], -1)
    key = torch.cat([svec(-shrink / s[..., None]), -2 * precision_mean, last.unsqueeze(-1)], -1)
    return Features(query, key, 0.5 * (_trace(excess, identity) - log_det + (m.square() / s).sum(-1)))


class _InverseAndLogDet(torch.autograd.Function):
    """A^-1 (..., d, d) and log|A| (...) of symmetric positive definite A, by its Cholesky factor.

    d A^-1 = -A^-1 dA A^-1 and d log|A| = tr(A^-1 dA), so that the derivatives are products, where those of the
    factorisation would be triangular solves. The gradient is that of a symmetric matrix.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        factor, _ = torch.linalg.cholesky_ex(a)
        # Not cholesky_inverse, which waits for the device and so cannot stand in a CUDA graph.
        identity = torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
        root = torch.linalg.solve_triangular(factor, identity, upper=False)
        inverse = matmul(root.mT, root)
        ctx.save_for_backward(inverse)
        return inverse, 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_inverse: Tensor, grad_log_det: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        grad = grad_log_det[..., None, None] * inverse - matmul(matmul(inverse, grad_inverse), inverse)
        return (grad + grad.mT) / 2


# Compiled on CUDA (torch 2.11), a model with whole covariances got NaN gradients. Why is not known; with the
# factorisation outside they are right there (tests/test_compiled.py).
@torch._disable_dynamo
def _inverse_and_log_det(a: Tensor) -> tuple[Tensor, Tensor]:
    return _InverseAndLogDet.apply(a)


def _diagonal_features(mu: Tensor, sigma: Tensor, frames: Tensor | None, s: Tensor) -> Features:
    # excess = sigma/s - 1 is exact near the reference, where 1/sigma - 1/s and the log term would cancel.
    excess = (sigma - s) / s
    shrink = excess / (1 + excess)
    log = excess.log1p()
    precision_mu = mu / sigma
    if frames is None:
        m, precision_mean = mu, precision_mu
        second, precision = _svec_diagonal(sigma - s), _svec_diagonal(-shrink / s)
    else:
        m, precision_mean = _rotate_both(mu, precision_mu, frames)
        # sigma . outer = svec(Omega^T diag(sigma) Omega), of the outer products of the rows of Omega.
        second, precision = _rotate_both(sigma - s, -shrink / s, svec_outer(frames))
    last = (mu * precision_mu + log - shrink).sum(-1, keepdim=True)
    one = torch.ones_like(m[..., :1])
    query = _cat([second + svec_outer(m), m, one])
    key = _cat([precision, -2 * precision_mean, last])
    return Features(query, key, 0.5 * (excess - log + m.square() / s).sum(-1))


def _isotropic_features(mu: Tensor, sigma: Tensor, frames: Tensor | None, s: Tensor) -> Features:
    d = mu.size(-1)
    m = rotate(mu, frames)
    s = s[..., 0]
    excess = (sigma - s) / s
    shrink = excess / (1 + excess)
    square = m.square().sum(-1)
    one = torch.ones_like(m[..., :1])
    query = torch.cat([(square + d * (sigma - s)).unsqueeze(-1), m, one], -1)
    scalar = square / sigma + d * (excess.log1p() - shrink)
    key = torch.cat([(-shrink / s).unsqueeze(-1), -2 * m / sigma.unsqueeze(-1), scalar.unsqueeze(-1)], -1)
    return Features(query, key, 0.5 * (d * (excess - excess.log1p()) + square / s))


def mixture_mean(moments_BHNF: Tensor, d: int, frames: Tensor | None, centre: Centre) -> Tensor:
    """(B, H, N, d): the mean in the query's own frame, from averaged query features."""
    mean = moments_BHNF[..., -1 - d : -1]
    if centre.mean is not None:
        mean = mean + (centre.mean if centre.mean.dim() == 1 else centre.mean[:, None]).to(mean)
    return rotate(mean, _transpose(frames))


def mixture_covariance(
    moments_BHNF: Tensor, d: int, frames: Tensor | None, centre: Centre, *, isotropic: bool
) -> Tensor:
    """(B, H, N, d, d) from averaged query features, in the query's own frame: exact moment matching. For isotropic
    beliefs (B, H, N), the mean of its diagonal.

    The difference M2 - mean mean^T keeps only rounding errors where all beliefs averaged are sharp; a floor of the
    size of these errors, 2 eps tr(M2), keeps the covariance positive definite.
    """
    mean = moments_BHNF[..., -1 - d : -1]
    s = _per_head(centre.variance, mean)
    eps = 2 * torch.finfo(moments_BHNF.dtype).eps
    if isotropic:
        second = moments_BHNF[..., 0] + d * s[..., 0]
        return ((second - mean.square().sum(-1)) / d).clamp_min(0) + eps * second.abs()
    identity = torch.eye(d, dtype=mean.dtype, device=mean.device)
    second = unsvec(moments_BHNF[..., : -1 - d], d) + s[..., None] * identity
    floor = eps * _trace(second, identity).abs()
    covariance = second - mean.unsqueeze(-1) * mean.unsqueeze(-2) + floor[..., None, None] * identity
    return rotate_covariance(covariance, frames)


def _transpose(frames: Tensor | None) -> Tensor | None:
    return None if frames is None else frames.mT


def _trace(a: Tensor, identity: Tensor) -> Tensor:
    """(..., d, d) to (...); as a masked sum, whose gradient is a product where that of a diagonal is a scatter."""
    return (a * identity).sum((-2, -1))


def _svec_diagonal(x: Tensor) -> Tensor:
    """svec(diag(x)): (..., d) to (..., d(d+1)/2)."""
    return x if x.size(-1) == 1 else svec(torch.diag_embed(x))


def _cat(parts: list[Tensor]) -> Tensor:
    """(B, H, N, ...) joined in the last dimension, tokens before heads in memory as rotations leave them."""
    return torch.cat([x.transpose(1, 2) for x in parts], -1).transpose(1, 2)


def _per_head(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or (H,) as (H or 1, 1, 1), to broadcast over (B, H, N, d)."""
    if isinstance(value, Tensor):
        return value.to(like).reshape(-1, 1, 1)
    return torch.full((1, 1, 1), value, dtype=like.dtype, device=like.device)


@cache
def _svec_columns(d: int) -> np.ndarray:
    """(d^2, d(d+1)/2): orthonormal columns, each a symmetric matrix flattened."""
    rows, columns = np.triu_indices(d)
    basis = np.zeros((len(rows), d, d))
    k = np.arange(len(rows))
    off = np.where(rows == columns, 1.0, 0.5**0.5)
    basis[k, rows, columns] = off
    basis[k, columns, rows] = off
    return basis.reshape(len(rows), d * d).T


def _pair_columns(d: int) -> np.ndarray:
    """(d, d(d+1)): the columns that pick x_i, then those that pick x_j, of every pair i <= j; sqrt(2) x_j for i < j."""
    rows, columns = np.triu_indices(d)
    identity = np.eye(d)
    return np.concatenate([identity[:, rows], identity[:, columns] * np.where(rows == columns, 1.0, 2**0.5)], 1)


def _unsvec_columns(d: int) -> np.ndarray:
    return _svec_columns(d).T
