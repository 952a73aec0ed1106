"""How sharp attention is, without its matrix: features and log-sum-exps, in float64, memory linear in N.

With F_i(kappa) = log sum_j exp(-KL_ij/kappa) and <KL>_i = sum_j beta_ij KL_ij (the key features averaged):

    entropy           H_i = F_i(kappa) + <KL>_i / kappa
    participation     sum_j beta_ij^2 = exp(F_i(kappa/2) - 2 F_i(kappa)); effective keys are its inverse
    weight on itself  beta_ii = exp(-KL_ii/kappa - F_i(kappa)), KL_ii = 0; beta_ii = 0 where it is masked
    row_std           sqrt((sum_j beta_ij^2 - beta_ii^2)/(N-1) - ((1 - beta_ii)/(N-1))^2)

row_std is the population standard deviation of row i over all keys but i, future keys (weight 0) included, averaged
over rows. It depends on N: `row_std_uniform` and `row_std_onehot` are its values for attention that spreads evenly
over the past and for attention that sees one key; from N = 99 on not even the latter exceeds the 0.10 that
`printed.verdict` calls sharp. ALiBi is an additional energy kappa * slope * (i - j).

Shape suffixes: B batch, H heads, N tokens, d = 2l+1, F features, K all components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from gauge_attn.attention import Prepared, prepare
from gauge_attn.gaussians import Centre
from gauge_attn.kernel import mix

_CHUNK = 256


@dataclass(frozen=True)
class Sharpness:
    """Averages over batch and queries, (H,) float64, of one head each."""

    row_std: Tensor
    """The standard deviation of a row of weights, see the module."""
    row_std_rescaled: Tensor
    """(row_std - uniform) / (onehot - uniform): 0 for uniform and 1 for one-hot attention at any N."""
    entropy_ratio: Tensor
    """H_i / ln n_i over the queries with n_i >= 2 keys: 1 is uniform, 0 one-hot."""
    effective_keys: Tensor
    """1 / sum_j beta_ij^2"""
    participation: Tensor
    """sum_j beta_ij^2"""
    relative_participation: Tensor
    """n_i sum_j beta_ij^2 over the queries with n_i >= 2 keys: 1 is uniform, n_i one-hot."""
    attended_kl: Tensor
    """sum_j beta_ij KL_ij in nats"""


@dataclass(frozen=True)
class KLStatistics:
    """Over the pairs i != j of one sequence, in nats; std is the unbiased one."""

    mean: float
    std: float
    smallest: float
    largest: float


@torch.no_grad()
def sharpness(
    mu: Tensor,
    sigma: Tensor,
    frames: Tensor | None,
    kappa: float | Tensor,
    *,
    self_mask: bool = False,
    alibi: float | Tensor | None = None,
    rope: Tensor | None = None,
    centre: Centre | None = None,
) -> Sharpness:
    """The figures of causal `kl_attention` with these arguments. Raises ValueError for fewer than two tokens."""
    p = prepare(mu.double(), sigma.double(), frames, kappa, alibi=alibi, rope=rope, centre=centre)
    return sharpness_of(p, self_mask=self_mask)


@torch.no_grad()
def sharpness_of(p: Prepared, *, self_mask: bool = False) -> Sharpness:
    """The figures of any features, also of queries and keys that are beliefs of their own (then KL_ii is not 0).

    Both calls mask the query itself, whose weight is then added: subtracting it would cancel where it is near 1.
    """
    n, width = p.key.size(2), p.key.size(-1)
    n_keys_N = _n_keys(n, self_mask).to(p.key.device)
    query, biased_key, kappa_H1 = p.query.double(), p.biased_key.double(), p.kappa_H1.double()
    keys = torch.cat([biased_key, p.key.double()], -1)
    averaged, lse_others = mix(query, biased_key, keys, kappa_H1, True, True, "fp32", None, True)
    _, lse_others_half = mix(query, biased_key, query, kappa_H1 / 2, True, True, "fp32", None, True)
    assert lse_others is not None
    assert lse_others_half is not None
    own = -0.5 * (query * biased_key).sum(-1) / kappa_H1
    first_N = torch.arange(n, device=own.device) == 0
    lse_others, lse_others_half = (x.masked_fill(first_N, -inf) for x in (lse_others, lse_others_half))
    own = own.masked_fill(~first_N, -inf) if self_mask else own
    lse = torch.logaddexp(lse_others, own)
    others, itself = (lse_others - lse).exp(), (own - lse).exp()
    # Bounds that hold of themselves but for rounding, which logits of 1e15 and more leave nothing else of.
    square_others = torch.minimum((lse_others_half - 2 * lse).exp(), others.square())
    participation = square_others + itself.square()
    averaged = others.unsqueeze(-1) * averaged + itself.unsqueeze(-1) * keys
    entropy = (lse + 0.5 * (query * averaged[..., :width]).sum(-1) / kappa_H1).clamp_min(0)
    entropy = torch.minimum(entropy, n_keys_N.log())
    variance = square_others / (n - 1) - (others / (n - 1)).square()
    row_std = variance.clamp_min(0).sqrt().mean((0, 2))

    several = n_keys_N >= 2
    uniform, onehot = row_std_uniform(n, self_mask), row_std_onehot(n)
    return Sharpness(
        row_std=row_std,
        row_std_rescaled=(row_std - uniform) / (onehot - uniform),
        entropy_ratio=(entropy[..., several] / n_keys_N[several].log()).mean((0, 2)),
        effective_keys=(1 / participation).mean((0, 2)),
        participation=participation.mean((0, 2)),
        relative_participation=(participation * n_keys_N)[..., several].mean((0, 2)),
        attended_kl=(0.5 * (query * averaged[..., width:]).sum(-1) + p.to_reference_BHN).mean((0, 2)),
    )


@torch.no_grad()
def kl_statistics(parts: Sequence[Prepared]) -> KLStatistics:
    """Of the matrix of divergences averaged over all heads, of the first batch element, without its diagonal.

    Future pairs are included. The averaged matrix is one product of the heads' features side by side and is visited
    in rows of 256.
    """
    n_heads = sum(p.query.size(1) for p in parts)
    query = torch.cat([p.query[0].transpose(0, 1).flatten(1) for p in parts], -1) / (2 * n_heads)
    key = torch.cat([p.key[0].transpose(0, 1).flatten(1) for p in parts], -1)
    rest = torch.stack([p.to_reference_BHN[0].sum(0) for p in parts]).sum(0) / n_heads
    n = query.size(0)
    if n < 2:
        raise ValueError(f"divergences between tokens need at least two of them, got {n}")
    column = torch.arange(n, device=query.device)
    count = n * (n - 1)
    total, square = query.new_zeros(()), query.new_zeros(())
    smallest, largest = query.new_tensor(inf), query.new_tensor(-inf)
    # Sums of squares about a value inside the range, so that the variance does not cancel.
    about = query[0] @ key[1] + rest[0]
    for begin in range(0, n, _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        kl = query[rows] @ key.mT + rest[rows, None]
        counted = column != column[rows, None]
        offset = (kl - about).masked_fill(~counted, 0)
        total, square = total + offset.sum(), square + offset.square().sum()
        smallest = torch.minimum(smallest, kl.masked_fill(~counted, inf).amin())
        largest = torch.maximum(largest, kl.masked_fill(~counted, -inf).amax())
    variance = (square - total.square() / count) / max(count - 1, 1)
    return KLStatistics(
        float(about + total / count), float(variance.clamp_min(0).sqrt()), float(smallest), float(largest)
    )


def row_std_uniform(n: int, self_mask: bool = True) -> float:
    """row_std of causal attention that weighs all keys it may see equally: 0.0217 at N = 64, self-masked."""
    n_keys = _n_keys(n, self_mask)
    own = torch.zeros_like(n_keys) if self_mask else 1 / n_keys
    own[0] = 1 if self_mask else own[0]
    square = (1 / n_keys - own.square()) / (n - 1)
    return float((square - ((1 - own) / (n - 1)).square()).clamp_min(0).sqrt().mean())


def row_std_onehot(n: int) -> float:
    """row_std of causal attention where each query sees one other key: 0.1230 at N = 64. (The first has none: it sees
    itself. Queries that see only themselves score 0, as if they were uniform.)"""
    return (n - 1) / n * sqrt(1 / (n - 1) - 1 / (n - 1) ** 2)


@torch.no_grad()
def diversity(mu_NK: Tensor, sigma_NK: Tensor, phi_N3: Tensor, kl: KLStatistics) -> dict[str, float]:
    """The numbers of `printed.diversity_line` for one sequence of embeddings, before any attention.

    mu_dist: mean |mu_i - mu_j| over i != j and all K components. phi_std: unbiased standard deviation over positions,
    mean of the three components. sigma: smallest, largest and mean of all variances. kl: of the last block.
    """
    n = mu_NK.size(0)
    mu_NK = mu_NK.double()
    distance = sum(
        torch.cdist(rows, mu_NK, compute_mode="donot_use_mm_for_euclid_dist").sum() for rows in mu_NK.split(_CHUNK)
    )
    return {
        "n": n,
        "mu_dist": float(distance / (n * (n - 1))),
        "phi_std": float(phi_N3.double().std(0).mean()),
        "kl_std": kl.std,
        "kl_min": kl.smallest,
        "kl_max": kl.largest,
        "kl_mean": kl.mean,
        "sigma_min": float(sigma_NK.min()),
        "sigma_max": float(sigma_NK.max()),
        "sigma_mean": float(sigma_NK.double().mean()),
    }


def _n_keys(n: int, self_mask: bool) -> Tensor:
    """(N,) float64: how many keys each query may see: those before it, and without self_mask itself."""
    if n < 2:
        raise ValueError(f"row_std compares the keys other than the query's own: it needs at least two tokens, got {n}")
    position = torch.arange(n, dtype=torch.float64)
    return position.clamp_min(1) if self_mask else position + 1
