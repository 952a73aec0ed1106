"""Statistics of causal attention per layer and head, streamed: one layer's pattern of one batch at a time.

Shape suffixes: N sequences, B sequences of one batch, L layers, H heads, T query positions, S key positions, K topics.

    stats = AttentionStats(topics_NT, n_layers, n_heads)
    stats.add(layer, rows, pattern_BHTS)      # for every layer and batch, in any order
    arrays = stats.result()
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_clustering.analysis.nulls import FIRST_QUERY, far_keys, lag_matched_share, same_topic, uniform_share

MIN_FAR_MASS = 1e-6
"""Queries with less attention than this on far keys say nothing about where among them it goes."""


def entropy(pattern_BHTS: Tensor) -> Tensor:
    """(B, H, T) -sum a ln a in nats. Causal attention of query t (counted from 1) has at most ln t."""
    return -torch.special.xlogy(pattern_BHTS, pattern_BHTS).sum(-1)


def entropy_bound(n_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """(T,) ln t, the entropy of uniform causal attention."""
    return torch.arange(1, n_positions + 1, device=device, dtype=torch.float32).log()


class AttentionStats:
    """Accumulates over layers and batches; the memory it keeps is L H T (S + 2 N) floats."""

    def __init__(self, topics_NT: Tensor, n_layers: int, n_heads: int) -> None:
        """topics_NT: integers, on the device where the patterns will be."""
        n, t = topics_NT.shape
        self._topics_NT = topics_NT
        self._far_TS = far_keys(t, topics_NT.device)
        zeros = torch.zeros(n_layers, n_heads, t, device=topics_NT.device)
        self._entropy_LHT, self._self_LHT, self._lag1_LHT, self._far_LHT = (zeros.clone() for _ in range(4))
        self._mean_LHTS = zeros[..., None].repeat(1, 1, 1, t)
        self._valid_LHT = zeros.clone()
        self._share_NLHT = torch.full((n, n_layers, n_heads, t), torch.nan, device=topics_NT.device)
        self._above_diagonal = torch.zeros((), device=topics_NT.device)
        self._over_bound = torch.full((), -torch.inf, device=topics_NT.device)
        self._seen = torch.zeros(n_layers, n, dtype=torch.bool)

    def add(self, layer: int, rows: slice, pattern_BHTS: Tensor) -> None:
        """Count one layer's attention weights for the sequences `rows`. No host synchronisation."""
        pattern = pattern_BHTS.float()
        self._seen[layer, rows] = True
        self._above_diagonal = torch.maximum(self._above_diagonal, pattern.triu(1).amax())
        nats_BHT = entropy(pattern)
        bound_T = entropy_bound(pattern.size(-1), pattern.device)
        self._over_bound = torch.maximum(self._over_bound, (nats_BHT - bound_T).amax())
        self._entropy_LHT[layer] += nats_BHT.sum(0)
        self._self_LHT[layer] += pattern.diagonal(dim1=-2, dim2=-1).sum(0)
        self._lag1_LHT[layer, :, 1:] += pattern.diagonal(-1, dim1=-2, dim2=-1).sum(0)

        far = pattern * self._far_TS
        mass_BHT = far.sum(-1)
        valid_BHT = mass_BHT > MIN_FAR_MASS
        far = torch.where(valid_BHT[..., None], far / mass_BHT[..., None].clamp_min(MIN_FAR_MASS), 0)
        same_BTS = same_topic(self._topics_NT[rows])[:, None]
        self._far_LHT[layer] += mass_BHT.sum(0)
        self._mean_LHTS[layer] += far.sum(0)
        self._valid_LHT[layer] += valid_BHT.sum(0)
        self._share_NLHT[rows, layer] = torch.where(valid_BHT, (far * same_BTS).sum(-1), torch.nan)

    def result(self) -> dict[str, Tensor]:
        """The statistics, on the CPU, as float32. (L, H) unless said otherwise; means over queries, then sequences.

        entropy, entropy_ratio     nats, and as a fraction of ln t (from the second query on)
        entropy_by_position        (L, H, T)
        self_mass, lag1_mass, far_mass   where attention goes: the query itself, the token before, all others
        within                     within-topic share among the far keys, per query
        excess_uniform             within minus that of uniform attention over the same keys
        excess_lag                 within minus that of the head's own mean attention, at every position and lag, on the
                                   other sequences: 0 for attention by position
        excess_lag_by_sequence     (N, L, H): for intervals that resample sequences
        excess_lag_by_topic        (L, H, K), mean over queries of that topic
        specialisation             spread of the last over topics: signed root of its covariance between odd and even
                                   sequences, so that noise scatters around 0 instead of adding up
        chance_uniform             scalar
        mass_above_diagonal        scalar, the largest weight on a later token: 0

        Raises AssertionError when attention looked ahead or exceeds the entropy bound (a bug, not a result), and
        ValueError when a layer has not been seen on every sequence.
        """
        if not bool(self._seen.all()):
            raise ValueError(
                f"{int((~self._seen).sum())} of {self._seen.numel()} (layer, sequence) pairs were not added"
            )
        assert self._above_diagonal.item() == 0, f"attention looks ahead: weight {self._above_diagonal.item():.3g}"
        assert self._over_bound.item() <= 1e-4, f"entropy exceeds ln t by {self._over_bound.item():.3g} nats"
        n, _, _, t = self._share_NLHT.shape
        within_NLHT = self._share_NLHT
        mean_LHTS = self._mean_LHTS / self._valid_LHT[..., None].clamp_min(1)
        # A sequence's own share in the mean is taken out by n / (n - 1): shares are linear in the mean.
        others_LHT = (self._valid_LHT / (self._valid_LHT - 1)).where(self._valid_LHT > 1, torch.nan)
        chance_NT = uniform_share(self._topics_NT)
        uniform_NLHT = within_NLHT - chance_NT[:, None, None]
        lag_NLHT = (within_NLHT - lag_matched_share(mean_LHTS, self._topics_NT)) * others_LHT

        bound_T = entropy_bound(t, mean_LHTS.device)
        by_topic_LHK, specialisation_LH = _by_topic(lag_NLHT, self._topics_NT)
        result = {
            "entropy": self._entropy_LHT.mean(-1) / n,
            "entropy_ratio": (self._entropy_LHT[..., 1:] / bound_T[1:]).mean(-1) / n,
            "entropy_by_position": self._entropy_LHT / n,
            "self_mass": self._self_LHT.mean(-1) / n,
            "lag1_mass": self._lag1_LHT[..., 1:].mean(-1) / n,
            "far_mass": self._far_LHT[..., FIRST_QUERY:].mean(-1) / n,
            "within": within_NLHT.nanmean((0, 3)),
            "excess_uniform": uniform_NLHT.nanmean((0, 3)),
            "excess_lag": lag_NLHT.nanmean((0, 3)),
            "excess_lag_by_sequence": lag_NLHT.nanmean(3),
            "excess_lag_by_topic": by_topic_LHK,
            "specialisation": specialisation_LH,
            "chance_uniform": chance_NT.nanmean(),
            "mass_above_diagonal": self._above_diagonal,
        }
        return {name: x.float().cpu() for name, x in result.items()}


def _by_topic(excess_NLHT: Tensor, topics_NT: Tensor) -> tuple[Tensor, Tensor]:
    """(L, H, K) mean excess by topic of the query, and (L, H) its spread over topics; absent topics are left out."""
    n_topics = int(topics_NT.max()) + 1
    filled = excess_NLHT.nan_to_num(0)
    valid = (~excess_NLHT.isnan()).to(filled.dtype)
    member_NTK = torch.nn.functional.one_hot(topics_NT.long(), n_topics).to(filled.dtype)
    sums, counts = [], []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        sums.append(torch.einsum("nlht,ntk->lhk", filled[part], member_NTK[part]))
        counts.append(torch.einsum("nlht,ntk->lhk", valid[part], member_NTK[part]))
    odd, even = (s / c.where(c > 0, torch.nan) for s, c in zip(sums, counts, strict=True))
    total = counts[0] + counts[1]
    mean = (sums[0] + sums[1]) / total.where(total > 0, torch.nan)
    both = ~(odd.isnan() | even.isnan())
    odd, even = (x.where(both, torch.nan) - x.where(both, torch.nan).nanmean(-1, keepdim=True) for x in (odd, even))
    covariance = (odd * even).nansum(-1) / (both.sum(-1) - 1).clamp_min(1)
    return mean, covariance.sign() * covariance.abs().sqrt()
