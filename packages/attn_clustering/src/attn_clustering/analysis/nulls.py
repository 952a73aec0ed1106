"""What within-topic attention would be if attention did not look at content.

Shape suffixes: N sequences, L layers, H heads, T query positions, S key positions, K topics.

Topics come in contiguous segments, so that a head which always looks 8 tokens back scores .97 "clustering". Both nulls
keep where a head looks and drop what it looks at; self and the previous token are left out of all shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_QUERY = 2
"""The first position with a key other than itself and the token before it."""


def far_keys(n_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """(T, S) bool: keys at least two positions back, neither self nor the previous token."""
    return torch.ones(n_positions, n_positions, dtype=torch.bool, device=device).tril(-2)


def same_topic(topics_NT: Tensor) -> Tensor:
    """(N, T, S) bool: whether query and key belong to the same topic."""
    return topics_NT[:, :, None] == topics_NT[:, None, :]


def same_topic_count(topics_NT: Tensor, gap: int) -> Tensor:
    """(N, T) number of keys at least `gap` positions before the query that have its topic; gap 0 counts the query."""
    member_NTK = torch.nn.functional.one_hot(topics_NT.long())
    count_NTK = member_NTK.cumsum(1).roll(gap, 1)
    count_NTK[:, :gap] = 0
    return (count_NTK * member_NTK).sum(-1)


def uniform_share(topics_NT: Tensor) -> Tensor:
    """(N, T) within-topic share of attention that is uniform over the far keys; NaN where there is none."""
    far_T = torch.arange(topics_NT.size(1), device=topics_NT.device) - FIRST_QUERY + 1
    return same_topic_count(topics_NT, FIRST_QUERY) / far_T.where(far_T > 0, torch.nan)


def lag_matched_share(mean_LHTS: Tensor, topics_NT: Tensor, chunk: int = 32) -> Tensor:
    """(N, L, H, T) within-topic share of a head that looks where it looks on average.

    mean_LHTS: the head's attention over far keys, normalised per query and averaged over sequences: at every query
    position its own mean attention by lag. Attention that depends on positions alone equals it, and scores excess 0.
    """
    n_layers, n_heads, n_positions, _ = mean_LHTS.shape
    mean_TXS = mean_LHTS.flatten(0, 1).transpose(0, 1)
    shares = []
    for topics in topics_NT.split(chunk):
        same_TSN = same_topic(topics).permute(1, 2, 0).to(mean_LHTS.dtype)
        share_TXN = mean_TXS @ same_TSN
        shares.append(share_TXN.permute(2, 1, 0).reshape(len(topics), n_layers, n_heads, n_positions))
    return torch.cat(shares)
