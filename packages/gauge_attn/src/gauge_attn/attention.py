"""Attention softmax_j(-KL(q_i || Omega_ij q_j) / kappa) between Gaussian beliefs, exact, at the cost of dot products.

Transport is flat, Omega_ij = Omega_i Omega_j^T with one rotation per token, and KL does not change when both its
arguments are moved by Omega_i^T: KL(q_i || Omega_ij q_j) = KL(q~_i || q~_j) with q~ = N(Omega^T mu, Omega^T Sigma
Omega). With the features of `gaussians` that is a dot product plus a term of i alone, so any fused attention kernel
computes it, and with the query features as values the same call averages the moments. Nothing of size N x N exists.

    self-mask     keys and values shifted by one token under the causal mask; token 0 keeps itself
    ALiBi         slope * j in the last slot of the key, whose partner in the query is 1
    gauge RoPE    frames Omega_i R(i): the divergences depend on i - j

Gauge invariance: q_i -> g_i q_i, Omega_i -> g_i Omega_i with any rotations g_i leaves the weights as they are and
turns the outputs by g_i.

Shape suffixes: B batch, H heads, N tokens, d = 2l+1, F features, K all components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from gauge_attn.gaussians import Centre, features, mixture_covariance, mixture_mean
from gauge_attn.irreps import Irreps
from gauge_attn.kernel import FeatureCache, Precision, mix
from gauge_attn.tables import matmul


class Attended(NamedTuple):
    """What each query receives, in its own frame. What was not asked for is None."""

    mean: Tensor
    """(B, H, N, d)"""
    covariance: Tensor | None
    """(B, H, N, d, d), that of the mixture; (B, H, N) for isotropic beliefs, the mean of its diagonal."""
    lse: Tensor | None = None
    """(B, H, N): log sum_j exp(-KL_ij/kappa + ALiBi); carries no gradient."""
    kl: Tensor | None = None
    """(B, H, N): sum_j beta_ij KL_ij in nats."""


class IrrepsAttended(NamedTuple):
    """The same for a whole layout of irreps, heads in the order of the layout."""

    mean: Tensor
    """(B, N, K)"""
    variance: Tensor | None
    """(B, N, K): the diagonals of the covariances"""
    lse: Tensor | None
    """(B, H, N)"""
    kl: Tensor | None
    """(B, H, N)"""
    parts: dict[int, Attended]
    """By l, with full covariances."""


def kl_attention(
    mu: Tensor,
    sigma: Tensor,
    frames: Tensor | None,
    kappa: float | Tensor,
    *,
    causal: bool = True,
    self_mask: bool = False,
    alibi: float | Tensor | None = None,
    rope: Tensor | None = None,
    precision: Precision = "fp32",
    centre: Centre | None = None,
    cache: FeatureCache | None = None,
    mean_only: bool = False,
    return_lse: bool = False,
    return_kl: bool = False,
) -> Attended:
    """beta_ij = softmax_j(-KL(q_i || Omega_i Omega_j^T q_j)/kappa - alibi (i - j)), and the mixture of the transported
    beliefs by moments: mean' = sum_j beta_ij Omega_ij mu_j, covariance' that of the mixture.

    mu (B, H, N, d). sigma: variances (B, H, N, d), covariances (B, H, N, d, d), or one variance per belief (B, H, N).
    frames: orthogonal Omega, (B, N, d, d) for all heads or (B, H, N, d, d); None is the identity (l = 0).
    kappa: temperature in nats > 0, a number or (H,); it may require grad.
    causal: query i sees keys j <= i. self_mask: but not itself, save token 0, which has nothing else; causal only.
    alibi: slope per token >= 0, a number or (H,); causal only. rope: R(i) from `so3.rope_frames`, broadcastable to
    (B, H, N, d, d), multiplied to the frames from the right.
    precision: "fp32" computes in the inputs' type, at least float32, and never in TF32. "fp16" rounds the centred
    features to half precision (the last slot as two halves), "bf16x3" splits them into bf16 head and tail at three
    times the width. Both kernels also round the weights, to 1e-4 (fp16) and 1e-3 (bf16) of total variation, whatever
    the logits' errors are, and average the moments at that precision: `rounding.precision_table` measures it.
    centre: the reference belief, see `gaussians.Centre`. cache: the tokens given follow those in the cache.
    mean_only: leave the covariance out. return_lse, return_kl: fill these fields.

    Raises ValueError for shapes that do not fit, kappa <= 0 (numbers), and options that exclude each other.
    """
    _check(mu, sigma, frames, kappa, causal, self_mask, alibi, precision)
    with torch.autocast(mu.device.type, enabled=False):
        start = 0 if cache is None else cache.length
        p = prepare(mu, sigma, frames, kappa, alibi=alibi, rope=rope, centre=centre, start=start)
        d = mu.size(-1)
        # Where the kernel takes narrow values, the mean alone needs no second moments.
        narrow = mean_only and precision == "fp32" and mu.is_cuda
        carried = p.query[..., -1 - d :] if narrow else p.query
        width = carried.size(-1)
        value = torch.cat([carried, p.key], -1) if return_kl else carried
        one = None if narrow else p.query.size(-1) - 1
        mixed, lse = mix(p.query, p.biased_key, value, p.kappa_H1, causal, self_mask, precision, cache, return_lse, one)
        moments = mixed[..., :width]
        isotropic = sigma.dim() == 3
        return Attended(
            mixture_mean(moments, d, p.frames, p.centre),
            None if mean_only else mixture_covariance(moments, d, p.frames, p.centre, isotropic=isotropic),
            None if lse is None else lse - p.row_term_BHN.detach(),
            p.divergence(mixed[..., width:]) if return_kl else None,
        )


def kl_attention_irreps(
    irreps: Irreps,
    mu_BNK: Tensor,
    sigma: Tensor | Mapping[int, Tensor],
    frames: Mapping[int, Tensor],
    kappa: float | Tensor,
    *,
    causal: bool = True,
    self_mask: bool = False,
    alibi: float | Tensor | None = None,
    rope: Mapping[int, Tensor] | None = None,
    precision: Precision = "fp32",
    centre: Mapping[int, Centre] | None = None,
    caches: Mapping[int, FeatureCache] | None = None,
    mean_only: bool = False,
    return_lse: bool = False,
    return_kl: bool = False,
) -> IrrepsAttended:
    """`kl_attention` for every head of a layout, one call per distinct l.

    mu_BNK (B, N, K). sigma: variances (B, N, K), or {l: what kl_attention takes}. frames {l: (B, N, d, d)} as from
    `so3.frames_for`; l = 0 is not looked at. kappa and alibi: numbers or (n_heads,) in the order of irreps.labels.
    rope, centre, caches: by l, missing l have none.
    """
    mus = irreps.split(mu_BNK)
    sigmas = irreps.split(sigma) if isinstance(sigma, Tensor) else sigma
    parts = {}
    for l, group in irreps.by_l().items():
        parts[l] = kl_attention(
            mus[l],
            sigmas[l],
            None if l == 0 else frames[l],
            heads_of(kappa, group.heads),
            causal=causal,
            self_mask=self_mask,
            alibi=None if alibi is None else heads_of(alibi, group.heads),
            rope=None if rope is None or l == 0 else rope.get(l),
            precision=precision,
            centre=None if centre is None else centre.get(l),
            cache=None if caches is None else caches[l],
            mean_only=mean_only,
            return_lse=return_lse,
            return_kl=return_kl,
        )
    order = [h for group in irreps.by_l().values() for h in group.heads]
    variance = None
    if not mean_only:
        variance = irreps.join({l: _diagonal(part, mus[l]) for l, part in parts.items()})
    return IrrepsAttended(
        irreps.join({l: part.mean for l, part in parts.items()}),
        variance,
        _in_order([part.lse for part in parts.values()], order),
        _in_order([part.kl for part in parts.values()], order),
        parts,
    )


class Prepared(NamedTuple):
    """Logits as dot products: log beta_ij = -query_i . biased_key_j / (2 kappa) - row_term_i - lse_i."""

    query: Tensor
    key: Tensor
    biased_key: Tensor
    """`key` with ALiBi in its last slot."""
    to_reference_BHN: Tensor
    row_term_BHN: Tensor
    kappa_H1: Tensor
    frames: Tensor | None
    """With RoPE."""
    centre: Centre

    def divergence(self, key: Tensor) -> Tensor:
        """(B, H, N): KL from each query to the belief with this key feature; linear, so averages may be given."""
        return 0.5 * (self.query * key).sum(-1) + self.to_reference_BHN


def prepare(
    mu: Tensor,
    sigma: Tensor,
    frames: Tensor | None,
    kappa: float | Tensor,
    *,
    alibi: float | Tensor | None = None,
    rope: Tensor | None = None,
    centre: Centre | None = None,
    start: int = 0,
) -> Prepared:
    """Features of `kl_attention`'s arguments for tokens at start, start + 1, ..., in float32 at least."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    mu, sigma = mu.to(dtype), sigma.to(dtype)
    centre = Centre() if centre is None else centre
    frames = with_rope(frames, rope, mu)
    query, key, to_reference = features(mu, sigma, frames, centre)
    kappa_H1 = column(kappa, mu)
    biased, row_term = key, to_reference / kappa_H1
    if alibi is not None:
        position_N = torch.arange(start, start + mu.size(2), dtype=dtype, device=mu.device)
        penalty_HN = column(alibi, mu) * position_N
        biased = torch.cat([key[..., :-1], (key[..., -1] - 2 * kappa_H1 * penalty_HN).unsqueeze(-1)], -1)
        row_term = row_term + penalty_HN
    return Prepared(query, key, biased, to_reference, row_term, kappa_H1, frames, centre)


def with_rope(frames: Tensor | None, rope: Tensor | None, mu: Tensor) -> Tensor | None:
    """Omega_i R(i) in mu's type; None where both are."""
    if rope is None:
        return None if frames is None else frames.to(mu.dtype)
    rope = rope.to(mu.dtype)
    if frames is None:
        return rope.expand(mu.size(0), mu.size(1), *rope.shape[-3:])
    frames = frames.to(mu.dtype)
    if rope.dim() == 3 or frames.dim() == 5:
        return matmul(frames, rope)
    return matmul(frames.unsqueeze(1), rope)


def column(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or (H,) as (1 or H, 1), in like's type, to broadcast over (B, H, N)."""
    if isinstance(value, Tensor):
        return value.to(like).reshape(-1, 1)
    return torch.full((1, 1), value, dtype=like.dtype, device=like.device)


def heads_of(value: float | Tensor, heads: tuple[int, ...]) -> float | Tensor:
    """Per-head values of some heads; numbers and scalar tensors are for all."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if heads == tuple(range(heads[0], heads[-1] + 1)):  # a slice: an index list would be copied to the device
        return value[heads[0] : heads[-1] + 1]
    return torch.stack([value[h] for h in heads])


def _diagonal(part: Attended, mu: Tensor) -> Tensor:
    assert part.covariance is not None
    if part.covariance.dim() == 3:
        return part.covariance.unsqueeze(-1).expand_as(mu)
    return part.covariance.diagonal(dim1=-2, dim2=-1)


def _in_order(parts: list[Tensor | None], order: list[int]) -> Tensor | None:
    """Per-head results of the l one after the other, in the layout's order of heads."""
    if parts[0] is None:
        return None
    together = torch.cat([part for part in parts if part is not None], 1)
    if order == sorted(order):
        return together
    return torch.stack([together[:, order.index(h)] for h in range(len(order))], 1)


def _check(
    mu: Tensor,
    sigma: Tensor,
    frames: Tensor | None,
    kappa: float | Tensor,
    causal: bool,
    self_mask: bool,
    alibi: float | Tensor | None,
    precision: str,
) -> None:
    if mu.dim() != 4:
        raise ValueError(f"mu is (batch, heads, tokens, d), got shape {tuple(mu.shape)}")
    n_batch, n_heads, n_tokens, d = mu.shape
    shapes = [(n_batch, n_heads, n_tokens), (n_batch, n_heads, n_tokens, d), (n_batch, n_heads, n_tokens, d, d)]
    if tuple(sigma.shape) not in shapes:
        raise ValueError(
            f"sigma of shape {tuple(sigma.shape)} does not fit mu {tuple(mu.shape)}; give variances {shapes[1]}, "
            f"covariances {shapes[2]} or one variance per belief {shapes[0]}"
        )
    shared, own = (n_batch, n_tokens, d, d), (n_batch, n_heads, n_tokens, d, d)
    if frames is not None and tuple(frames.shape) not in (shared, own):
        raise ValueError(
            f"frames of shape {tuple(frames.shape)} do not fit mu {tuple(mu.shape)}; give {shared}, "
            f"as so3.frames(phi, l) makes them, or {own}"
        )
    for name, value in (("kappa", kappa), ("alibi", alibi)):
        if isinstance(value, Tensor) and value.numel() not in (1, n_heads):
            raise ValueError(f"{name} has {value.numel()} values for {n_heads} heads; give one or one per head")
    if not isinstance(kappa, Tensor) and not kappa > 0:
        raise ValueError(f"kappa={kappa}: a temperature is greater than 0")
    if not causal and (self_mask or alibi is not None):
        raise ValueError("self_mask and alibi are defined for causal attention; use causal=True or leave them out")
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: use {', '.join(get_args(Precision))}")
