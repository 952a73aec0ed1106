"""What an ideal reader knows about the topic: Bayes filters over the exact law of the segments.

The state of a sequence at position t is (topic, start s of the current segment, segments left m): with it the length of
the segment has a known distribution, whatever came before. Slots are the reachable pairs (s, m); a batch of N sequences
advances through all of them together.

Suffix legend: N sequences, T positions, K topics, S slots, M largest number of segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attn_clustering.data.languages import emissions, unigrams
from attn_clustering.data.segments import SCALE, length_cdf
from attn_clustering.data.settings import SPECIALS, LanguageConfig, SegmentLaw

_CHUNK = {"cpu": 128, "cuda": 2_048}


@dataclass(frozen=True)
class Filtered:
    """Beliefs and losses of a filter; float64."""

    posterior_NTK: Tensor
    """P(topic of position t | tokens 0..t)."""
    loss_NT: Tensor
    """-ln P(token t | tokens 0..t-1), nats."""


def bayes_filter(config: LanguageConfig, tokens_NT: Tensor) -> Filtered:
    """The ideal reader: knows every transition matrix and the law of the segments. Its mean loss is the Bayes floor."""
    return filter_topics(config.law, emissions(config, tokens_NT))


def unigram_filter(config: LanguageConfig, tokens_NT: Tensor) -> Filtered:
    """The ideal reader of a bag of words: knows each topic's unigram and the law of the segments, no transitions."""
    table_KR = unigrams(config).to(tokens_NT.device)
    return filter_topics(config.law, table_KR[:, tokens_NT.long() - SPECIALS].permute(1, 2, 0))


def filter_topics(law: SegmentLaw, emission_NTK: Tensor) -> Filtered:
    """Exact forward pass for emissions that depend on the topic (and on observed tokens).

    emission_NTK: P(token t | topic k, tokens before t), float64. Cost: N T K S multiply-adds; S is 1,160 for 512
    positions of 2-5 segments of at least 64.
    """
    chunk = _CHUNK.get(emission_NTK.device.type, _CHUNK["cpu"])
    parts = [_forward(law, e_NTK) for e_NTK in emission_NTK.double().split(chunk)]
    return Filtered(
        torch.cat([posterior for posterior, _ in parts]),
        torch.cat([loss for _, loss in parts]),
    )


@dataclass(frozen=True)
class _Slots:
    """The reachable (start, left) pairs ordered by start, and what each does at every position."""

    prior_S: Tensor  # P(the first segment has `left` segments); 0 for later slots
    first_T: list[int]  # slots first_T[t] .. opened_T[t] - 1 may hold position t
    opened_T: list[int]
    entry_T: list[list[tuple[int, int]]]  # (slot, left) of the slots that start at t
    flow_TSM: list[Tensor]
    """For the slots of position t: column 0 P(length > t - s), columns m P(length = t + 1 - s) of slots with m + 1
    segments left, which is the flow into the slots (t + 1, m)."""


def _forward(law: SegmentLaw, e_NTK: Tensor) -> tuple[Tensor, Tensor]:
    n, seq_len, topics = e_NTK.shape
    slots = _slots(law, str(e_NTK.device))
    # Weight of "topic k since slot s" without the probability that the segment lasts, which `flow` brings in: it is
    # at least 1 / SCALE where it is not zero, so float64 has room. Divided by the likelihood of the tokens so far.
    weight_NKS = torch.zeros(n, topics, len(slots.prior_S), dtype=torch.float64, device=e_NTK.device)
    weight_NKS += slots.prior_S / topics
    prior_NK = torch.full((n, topics), 1.0 / topics, dtype=torch.float64, device=e_NTK.device)
    posterior_NTK, loss_NT = torch.empty_like(e_NTK), torch.empty_like(e_NTK[..., 0])
    for t in range(seq_len):
        likelihood_N = (prior_NK * e_NTK[:, t]).sum(dim=1)
        loss_NT[:, t] = -likelihood_N.log()
        active_NKS = weight_NKS[:, :, slots.first_T[t] : slots.opened_T[t]]
        active_NKS *= (e_NTK[:, t] / likelihood_N[:, None])[:, :, None]
        flow_NKM = active_NKS @ slots.flow_TSM[t]
        posterior_NTK[:, t] = flow_NKM[..., 0]
        new_NM = flow_NKM.sum(dim=1) / topics
        prior_NK = posterior_NTK[:, t] - flow_NKM[..., 1:].sum(dim=2) + new_NM[:, 1:].sum(dim=1, keepdim=True)
        prior_NK.clamp_(min=0)  # the difference rounds
        if t + 1 < seq_len:
            for slot, left in slots.entry_T[t + 1]:
                weight_NKS[:, :, slot] = new_NM[:, left, None]
    return posterior_NTK, loss_NT


@lru_cache(maxsize=4)
def _slots(law: SegmentLaw, device: str) -> _Slots:
    low, most, least, seq_len = law.segments[0], law.max_segments, law.min_segment, law.seq_len
    pairs = [(0, m) for m in range(low, most + 1)]
    for s in range(1, seq_len):
        # Before s lie at least as many segments as are missing from the smallest possible number, and at least one.
        pairs += [(s, m) for m in range(1, most) if s >= max(1, low - m) * least and seq_len - s >= m * least]
    start_S = torch.tensor([s for s, _ in pairs])
    left_S = torch.tensor([m for _, m in pairs])
    prior_S = (start_S == 0).double() / (most - low + 1)
    cdf = length_cdf(law).double() / SCALE
    cdf = torch.nn.functional.pad(cdf, (1, 0))  # at x + 1: P(extra <= x), 0 for x = -1
    spare_S = seq_len - start_S - left_S * least
    longest_S = start_S + least + spare_S
    first, opened, entries, flows = [], [], [], []
    for t in range(seq_len):
        lo, hi = int((longest_S > t).nonzero()[0]), int((start_S <= t).sum())
        s_S, m_S, r_S = start_S[lo:hi], left_S[lo:hi], spare_S[lo:hi]

        def shorter(than: int, s_S: Tensor = s_S, m_S: Tensor = m_S, r_S: Tensor = r_S) -> Tensor:
            """P(the segment ends at or before position `than`)."""
            extra_S = (than - s_S - least).clamp(min=-1, max=cdf.shape[2] - 2)
            return cdf[m_S, r_S, extra_S + 1]

        flow = torch.zeros(hi - lo, most, dtype=torch.float64)
        flow[torch.arange(hi - lo), m_S - 1] = shorter(t + 1) - shorter(t)
        flow[:, 0] = 1.0 - shorter(t)  # in place of the end of the sequence, the only end of last segments
        first.append(lo)
        opened.append(hi)
        entries.append([(i, pairs[i][1]) for i in range(lo, hi) if pairs[i][0] == t])
        flows.append(flow.to(device))
    return _Slots(prior_S.to(device), first, opened, entries, flows)
