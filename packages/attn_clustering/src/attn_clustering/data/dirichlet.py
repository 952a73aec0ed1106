"""The Dirichlet language of the first run: one dense random row of transitions per topic and previous token.

Row a of topic t is proportional to g * boost, g ~ Gamma(1/2) independent (hence Dirichlet(1/2, ..., 1/2)), boost =
`concentration` on the floor(R / K) tokens of the topic's own block, ten times more on a few signature pairs inside the
block. All weights are integers: g comes from 16 random bits through a table of the quantiles of z^2, z normal (twice a
Gamma(1/2); the scale cancels), so that rows, cumulative sums and samples are exact and equal on every device.

Suffix legend: K topics, R regular tokens, P = R rounded up to a power of two, C rows of a chunk, N sequences,
T positions. Tokens are counted from 0 here, without the reserved ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from attn_clustering.data import counter
from attn_clustering.data.segments import FIRST_TOKEN_DRAW
from attn_clustering.data.settings import LanguageConfig

SIGNATURE_FACTOR = 10
_WEIGHTS, _SIGNATURES = 3, 4  # words of the keys of this module
_LEVELS = 1 << 16


@dataclass(frozen=True)
class Tables:
    """What sampling and the reference levels need of the K matrices (R x R), on one device."""

    cdf_KRP: Tensor  # int32 cumulative weights of each row, filled up with its total; 335 MB for 5 x 4093 x 4096
    entropy_KR: Tensor  # float64, nats
    first_KR: Tensor  # float64, the mean row of each topic


def build(config: LanguageConfig, device: torch.device | str, rows_per_chunk: int = 256) -> Tables:
    """All tables, computed on `device`; the integer ones are the same on every device."""
    topics, regular = config.topics, config.regular
    cdf_KRP = torch.empty(topics, regular, _padded(config), dtype=torch.int32, device=device)
    entropy_KR = torch.empty(topics, regular, dtype=torch.float64, device=device)
    first_KR = torch.zeros(topics, regular, dtype=torch.float64, device=device)
    for k in range(topics):
        for start in range(0, regular, rows_per_chunk):
            stop = min(start + rows_per_chunk, regular)
            weight_CR = row_weights(config, k, start, stop, device)
            torch.cumsum(weight_CR, dim=1, dtype=torch.int32, out=cdf_KRP[k, start:stop, :regular])
            cdf_KRP[k, start:stop, regular:] = cdf_KRP[k, start:stop, regular - 1 : regular]
            weight_CR = weight_CR.double()
            total_C1 = weight_CR.sum(dim=1, keepdim=True)
            first_KR[k] += (1.0 / (regular * total_C1.T) @ weight_CR)[0]
            entropy_KR[k, start:stop] = (total_C1.log() - (weight_CR.log() * weight_CR).sum(1, True) / total_C1)[:, 0]
    return Tables(cdf_KRP, entropy_KR, first_KR)


def walk(config: LanguageConfig, tables: Tables, draws_N: Tensor, labels_TN: Tensor) -> Tensor:
    """(T, N) int32 tokens from 0: a hidden uniform previous token, then one transition per position.

    All sequences advance together. The next token is the number of cumulative weights <= r, r uniform on
    0..total-1, found by bisection with one gather per bit; it is below R because r is below the total.
    """
    seq_len, n = labels_TN.shape
    padded = _padded(config)
    counters = torch.arange(FIRST_TOKEN_DRAW, FIRST_TOKEN_DRAW + seq_len, device=draws_N.device)
    draws_TN = counter.bits(draws_N, counters[:, None])
    topic_row_TN = labels_TN.int() * config.regular
    tokens_TN = torch.empty(seq_len, n, dtype=torch.int32, device=draws_N.device)
    cdf = tables.cdf_KRP.flatten()
    token_N = counter.high(counter.bits(draws_N, counters[:1] - 1), config.regular).int()
    probe_N, found_N = torch.empty_like(token_N), torch.empty_like(token_N)
    for t in range(seq_len):
        row_N = (topic_row_TN[t] + token_N) * padded
        draw_N = counter.high(draws_TN[t], cdf[row_N + (padded - 1)]).int()
        at_N = row_N - 1  # the last cumulative weight known to be <= the draw
        step = padded >> 1
        while step:
            torch.add(at_N, step, out=probe_N)
            torch.index_select(cdf, 0, probe_N, out=found_N)
            at_N.add_(found_N <= draw_N, alpha=step)
            step >>= 1
        token_N = at_N + 1 - row_N
        tokens_TN[t] = token_N
    return tokens_TN


def probabilities(config: LanguageConfig, tables: Tables, prev: Tensor, following: Tensor) -> Tensor:
    """P_k(following | prev) for every topic, float64 (..., K); both arguments int64 tokens from 0."""
    rows = tables.cdf_KRP[:, :, -1].double()
    per_topic = [weights(config, k, prev, following) / rows[k][prev] for k in range(config.topics)]
    return torch.stack(per_topic, dim=-1)


def block_mass(config: LanguageConfig) -> float:
    """Expected share of a topic's tokens that fall into its own block: c b / (c b + R - b), signatures aside."""
    inside = config.concentration * config.block
    return inside / (inside + config.regular - config.block)


def unigrams(config: LanguageConfig) -> Tensor:
    """The token distribution of each topic that a unigram model can learn, (K, R) float64: flat inside and outside
    the topic's block."""
    mass, block = block_mass(config), config.block
    own_KR = own_block(config, torch.arange(config.regular))
    return torch.where(own_KR, mass / block, (1.0 - mass) / (config.regular - block)).double()


def own_block(config: LanguageConfig, token: Tensor) -> Tensor:
    """(K, ...) bool: is the token in topic k's own block?"""
    topic = torch.arange(config.topics, device=token.device).view(-1, *[1] * token.dim())
    return token // config.block == topic


# --- integer weights ---


def row_weights(config: LanguageConfig, topic: int, start: int, stop: int, device: torch.device | str) -> Tensor:
    """Weights of the rows start..stop-1 of one topic, (stop - start, R) int32."""
    regular, groups = config.regular, -(-config.regular // 4)
    draws = counter.bits(_weight_key(config, topic), torch.arange(start * groups, stop * groups, device=device))
    # Four 16-bit levels per draw; lane i of a draw is its bits 16 i .. 16 i + 15.
    lanes = torch.stack([((draws >> 16 * i) & 0xFFFF).int() for i in range(4)], dim=1)
    level_CR = lanes.view(stop - start, 4 * groups)[:, :regular]
    weight_CR = _quantiles(config).to(device)[level_CR]
    inside, outside = _boost(config)
    own_R = own_block(config, torch.arange(regular, device=device))[topic]
    weight_CR *= torch.where(own_R, inside, outside).int()
    for a, b in _signature_pairs(config, topic):
        if start <= a < stop:
            weight_CR[a - start, b] *= SIGNATURE_FACTOR
    return weight_CR


def weights(config: LanguageConfig, topic: int, prev: Tensor, following: Tensor) -> Tensor:
    """Single entries of the same matrices, int64, computed without the table."""
    groups = -(-config.regular // 4)
    draw = counter.bits(_weight_key(config, topic), prev * groups + (following >> 2))
    level = (draw >> 16 * (following & 3)) & 0xFFFF
    inside, outside = _boost(config)
    weight = _quantiles(config).to(prev.device)[level].long()
    weight *= torch.where(following // config.block == topic, inside, outside)
    pairs = [a * config.regular + b for a, b in _signature_pairs(config, topic)]
    marked = torch.isin(prev * config.regular + following, torch.tensor(pairs, dtype=torch.int64, device=prev.device))
    return torch.where(marked, weight * SIGNATURE_FACTOR, weight)


def _padded(config: LanguageConfig) -> int:
    return 1 << (config.regular - 1).bit_length()


def _weight_key(config: LanguageConfig, topic: int) -> int:
    return counter.key(config.seed, _WEIGHTS, topic)


def _boost(config: LanguageConfig) -> tuple[int, int]:
    """Integer factors inside and outside the own block, in the ratio `concentration` (to 1 / 16)."""
    ratio = Fraction(config.concentration).limit_denominator(16)
    return ratio.numerator, ratio.denominator


def _quantiles(config: LanguageConfig) -> Tensor:
    inside, outside = _boost(config)
    expected = inside * config.block + outside * (config.regular - config.block)
    # A row's total must stay below 2^31. With blocks of 8 and more a mean of z^2 above 6 has odds below 1e-7, and no
    # weight is above 19 units, so an expected total of 2^28 leaves room.
    return _quantile_table(min(1 << 16, (1 << 28) // expected))


@lru_cache(maxsize=4)
def _quantile_table(unit: int) -> Tensor:
    """Quantiles of z^2 at the middles of 65,536 equal parts, in integer units, at least 1; int32."""
    normal = NormalDist()
    z = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * _LEVELS)) for i in range(_LEVELS)]
    return torch.tensor([max(1, round(unit * x * x)) for x in z], dtype=torch.int32)


def _signature_pairs(config: LanguageConfig, topic: int) -> list[tuple[int, int]]:
    """Different pairs (previous, next) inside the topic's block, fewer than asked for when draws coincide."""
    n, block = min(config.signatures, config.block // 2), config.block
    draw = counter.bits(counter.key(config.seed, _SIGNATURES, topic), torch.arange(n))
    first = topic * block
    pairs = zip((first + counter.high(draw, block)).tolist(), (first + counter.low(draw, block)).tolist(), strict=True)
    return sorted(set(pairs))
