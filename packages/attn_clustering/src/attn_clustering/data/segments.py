"""Where topics change inside a sequence, and the exact distribution of it.

A sequence of T positions has n segments, n uniform on low..high. With m segments left and r = T - s - m * least tokens
to spare at position s, the next length is least + Binomial(r, 1 / m): the multinomial of equal shares, drawn one
segment at a time. One integer table serves the sampler and the Bayes filter, so that the filter's law is the sampler's.

Suffix legend: N sequences, M largest number of segments, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attn_clustering.data import counter
from attn_clustering.data.settings import SegmentLaw

SCALE = 1 << 31
"""Probabilities of lengths are integers in units of 1 / SCALE."""
FIRST_TOKEN_DRAW = 1 << 20
"""Draws of a sequence below this number are for its structure, those from here on for its tokens."""


@dataclass(frozen=True)
class Segments:
    """The structure of N sequences."""

    draws_N: Tensor  # int64 random bits, the stream of each sequence's further draws
    topics_NM: Tensor  # int64; entries beyond the sequence's number of segments are drawn but unused
    ends_NM: Tensor  # int64, end of each segment (exclusive); T for unused ones

    def lengths_NM(self) -> Tensor:
        """Length of each segment, int64; 0 for unused ones."""
        return self.ends_NM.diff(dim=1, prepend=torch.zeros_like(self.ends_NM[:, :1]))

    def labels_NT(self, seq_len: int) -> Tensor:
        """Topic of every position, uint8."""
        n = len(self.ends_NM)
        flat = self.topics_NM.to(torch.uint8).flatten()
        return flat.repeat_interleave(self.lengths_NM().flatten(), output_size=n * seq_len).view(n, seq_len)

    def dominant_N(self, topics: int) -> Tensor:
        """The topic with the most positions, ties to the lower, uint8."""
        lengths_NM = self.lengths_NM()
        counts_NK = torch.zeros(len(lengths_NM), topics, dtype=torch.int64, device=lengths_NM.device)
        counts_NK.scatter_add_(1, self.topics_NM, lengths_NM)
        # Distinct keys, because argmax does not promise the first of equal maxima.
        tie_break_K = torch.arange(topics - 1, -1, -1, device=lengths_NM.device)
        return (counts_NK * topics + tie_break_K).argmax(dim=1).to(torch.uint8)


def draw(law: SegmentLaw, stream: int, ids_N: Tensor) -> Segments:
    """The segments of the sequences `ids_N` (int64, on any device) of a stream, a pure function of both."""
    low, most, least = law.segments[0], law.max_segments, law.min_segment
    draws_N = counter.bits(stream, ids_N)
    draws_NC = counter.bits(draws_N[:, None], torch.arange(1, 2 + 2 * most, device=ids_N.device))
    left_N = low + counter.high(draws_NC[:, 0], most - low + 1)
    topics_NM = counter.high(draws_NC[:, 1 : 1 + most], law.topics)
    cdf = length_cdf(law).to(ids_N.device)
    end_N = torch.zeros_like(ids_N)
    ends = []
    for j in range(most):
        spare_N = (law.seq_len - end_N - left_N * least).clamp_(min=0)
        extra_N = _invert(cdf, left_N.clamp(min=1), spare_N, counter.low(draws_NC[:, 1 + most + j], SCALE))
        end_N = torch.where(left_N > 0, end_N + least + extra_N, law.seq_len)
        left_N = left_N - 1
        ends.append(end_N)
    return Segments(draws_N, topics_NM, torch.stack(ends, dim=1))


@lru_cache(maxsize=8)
def _binomial_cdf(most: int, spare: int) -> Tensor:
    pmf = np.zeros((most + 1, spare + 1, spare + 1))
    pmf[:, 0, 0] = 1.0
    for m in range(1, most + 1):
        p = 1.0 / m
        for r in range(1, spare + 1):  # Pascal's rule: multiplications and additions only, the same everywhere
            pmf[m, r] = pmf[m, r - 1] * (1.0 - p)
            pmf[m, r, 1:] += pmf[m, r - 1, :-1] * p
    return torch.from_numpy(np.rint(pmf.cumsum(axis=2) * SCALE).astype(np.int64).clip(max=SCALE))


def length_cdf(law: SegmentLaw) -> Tensor:
    """cdf[m, r, x] = SCALE * P(extra <= x), extra ~ Binomial(r, 1 / m) and length = least + extra; int64.

    Shape (M + 1, S, S), S = spare tokens of a sequence with the fewest segments, plus one; m = 0 is unused.
    """
    return _binomial_cdf(law.max_segments, law.seq_len - law.segments[0] * law.min_segment)


def _invert(cdf: Tensor, m_N: Tensor, spare_N: Tensor, u_N: Tensor) -> Tensor:
    """The smallest x with cdf[m, spare, x] > u, by bisection in lockstep."""
    size = cdf.shape[1]
    row_N = (m_N * size + spare_N) * size
    flat = cdf.flatten()
    low_N, high_N = torch.zeros_like(spare_N), spare_N.clone()
    for _ in range(size.bit_length()):
        middle_N = (low_N + high_N) >> 1
        above_N = flat[row_N + middle_N] > u_N
        high_N = torch.where(above_N, middle_N, high_N)
        low_N = torch.where(above_N, low_N, torch.minimum(middle_N + 1, high_N))
    return low_N
