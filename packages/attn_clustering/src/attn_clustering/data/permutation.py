"""The permutation language: next = pi_tj(prev), j uniform on k permutations of topic t, some shared by all topics.

Every transition matrix is doubly stochastic, so the uniform distribution over the R regular tokens is stationary for
every topic: a single token says nothing about the topic. Within a topic the next token has entropy ln k, less where
two permutations of the topic agree.

Suffix legend: U distinct permutations, K topics, J = k permutations of a topic, R regular tokens, N sequences,
T positions. Tokens are counted from 0 here, without the reserved ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_clustering.data import counter
from attn_clustering.data.segments import FIRST_TOKEN_DRAW
from attn_clustering.data.settings import LanguageConfig


@dataclass(frozen=True)
class Tables:
    """The permutations of one language on one device."""

    successor_UR: Tensor  # int32
    members_KJ: Tensor  # int64, which permutations a topic mixes: the shared ones first


_PERMUTATION = 2  # word of the keys of this module


def build(config: LanguageConfig, device: torch.device | str) -> Tables:
    """The language's permutations, the same on every device."""
    shared, own, topics = config.shared_permutations, config.own_permutations, config.topics
    n = shared + own * topics
    successor = torch.stack(
        [counter.permutation(counter.key(config.seed, _PERMUTATION, i), config.regular) for i in range(n)]
    )
    members = torch.cat(
        [torch.arange(shared).expand(topics, -1), shared + torch.arange(own * topics).view(topics, own)], dim=1
    )
    return Tables(successor.int().to(device), members.to(device))


def walk(config: LanguageConfig, tables: Tables, draws_N: Tensor, labels_TN: Tensor) -> Tensor:
    """(T, N) int32 tokens from 0: the first uniform, then one random permutation of the position's topic at a time."""
    seq_len, n = labels_TN.shape
    pairs = (seq_len + 1) // 2
    counters = torch.arange(FIRST_TOKEN_DRAW, FIRST_TOKEN_DRAW + pairs, device=draws_N.device)
    draws_PN = counter.bits(draws_N, counters[:, None])
    regular, k = config.regular, config.permutations
    # Two positions per draw, the upper and the lower 32 bits.
    which_TN = torch.empty(2 * pairs, n, dtype=torch.int32, device=draws_N.device)
    which_TN[0::2], which_TN[1::2] = counter.high(draws_PN, k), counter.low(draws_PN, k)
    # Where in the flattened tables of the topic the successor's row begins; then the previous token is added.
    offset_TN = labels_TN.to(torch.int32).mul_(k).add_(which_TN[:seq_len]).mul_(regular)
    flat = tables.successor_UR[tables.members_KJ].flatten()
    tokens_TN = torch.empty(seq_len, n, dtype=torch.int32, device=draws_N.device)
    tokens_TN[0] = counter.high(draws_PN[0], regular)
    for t in range(1, seq_len):
        torch.index_select(flat, 0, offset_TN[t].add_(tokens_TN[t - 1]), out=tokens_TN[t])
    return tokens_TN


def probabilities(config: LanguageConfig, tables: Tables, prev: Tensor, following: Tensor) -> Tensor:
    """P_k(following | prev) for every topic, float64 (..., K); both arguments int64 tokens from 0."""
    hits_U = [(row[prev] == following).to(torch.float64) for row in tables.successor_UR]
    shared, own = config.shared_permutations, config.own_permutations
    common = sum(hits_U[:shared], torch.zeros(prev.shape, dtype=torch.float64, device=prev.device))
    per_topic = [
        common + sum(hits_U[shared + k * own + 1 : shared + (k + 1) * own], hits_U[shared + k * own])
        for k in range(config.topics)
    ]
    return torch.stack(per_topic, dim=-1) / config.permutations


def row_entropies(config: LanguageConfig, tables: Tables) -> Tensor:
    """H(next | prev, topic) in nats, (K, R) float64: ln k - mean_j ln(how many of the k lead to the same token)."""
    rows = []
    for members_J in tables.members_KJ:
        successors_JR = tables.successor_UR[members_J]
        same_JR = torch.stack([(row == successors_JR).sum(dim=0) for row in successors_JR])
        rows.append(math.log(config.permutations) - same_JR.double().log().mean(dim=0))
    return torch.stack(rows)


def unigrams(config: LanguageConfig) -> Tensor:
    """The token distribution of each topic that a unigram model can learn, (K, R) float64: uniform for all."""
    return torch.full((config.topics, config.regular), 1.0 / config.regular, dtype=torch.float64)
