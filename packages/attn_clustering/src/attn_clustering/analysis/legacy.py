"""The metrics of the original experiment as it defined them, to reproduce its tables and to show what they measured.

Shape suffixes: B sequences, H heads, T query positions, S key positions, K topics.

Its analysis computed attention without the causal mask, so that about half of the mass lay on tokens the model never
saw in training: pass `noncausal_pattern` to these functions for its numbers, causal patterns for what they would have
been. Self-attention counts as "within topic", and later queries weigh more.
"""

from __future__ import annotations

import math

import torch
from lab_shared.attention import Mask, attend
from torch import Tensor

from attn_clustering.analysis.nulls import same_topic, same_topic_count


def noncausal_pattern(q_BHTD: Tensor, k_BGTD: Tensor) -> Tensor:
    """(B, H, T, S) attention with the mask left out. q and k as the model compares them (normalised, rotated)."""
    _, pattern = attend(q_BHTD, k_BGTD, k_BGTD, Mask.full(), backend="reference", return_weights=True)
    return pattern


def legacy_metrics(pattern_BHTS: Tensor, topics_BT: Tensor, n_topics: int) -> dict[str, Tensor]:
    """legacy_entropy, legacy_within, legacy_specialization, each (H,).

    entropy: -sum a ln max(a, 1e-10), mean over queries and sequences. within: with a restricted to keys not after the
    query, mean over queries of the same-topic mass over mean over queries of all mass, a ratio of means per sequence.
    specialization: variance over topics of that ratio among queries of one topic, where a topic absent from the
    sequence counts as 0; mean over sequences.
    """
    pattern = pattern_BHTS.float()
    nats_BHT = -(pattern * pattern.clamp_min(1e-10).log()).sum(-1)
    past = pattern.tril()
    within_BHT = (past * same_topic(topics_BT)[:, None]).sum(-1)
    mass_BHT = past.sum(-1)
    member_BTK = torch.nn.functional.one_hot(topics_BT.long(), n_topics).to(pattern.dtype)
    within_BHK, mass_BHK = within_BHT @ member_BTK, mass_BHT @ member_BTK
    by_topic_BHK = within_BHK / mass_BHK.clamp_min(1e-10)
    return {
        "legacy_entropy": nats_BHT.mean((0, 2)),
        "legacy_within": (within_BHT.sum(-1) / mass_BHT.sum(-1)).mean(0),
        "legacy_specialization": by_topic_BHK.var(-1).mean(0),
    }


def legacy_chance(topics_NT: Tensor) -> dict[str, float]:
    """within: what attention uniform over all T keys scores. entropy_bound_*: the largest mean entropy there can be.

    With the causal mask that is (ln T!) / T, without it ln T.
    """
    n_positions = topics_NT.size(1)
    within_NT = same_topic_count(topics_NT, 0)
    return {
        "within": float(within_NT.double().mean() / ((n_positions + 1) / 2)),
        "entropy_bound_causal": math.lgamma(n_positions + 1) / n_positions,
        "entropy_bound_noncausal": math.log(n_positions),
    }
