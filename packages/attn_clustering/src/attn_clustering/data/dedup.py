"""Held-out text without any long run of tokens that training text has too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attn_clustering.data import counter


def concatenate(encoded: Sequence[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """The chosen paragraphs one after the other."""
    return np.concatenate([encoded[i] for i in chosen]) if len(chosen) else np.empty(0, dtype=np.uint16)


def drop_shared(encoded: Sequence[np.ndarray], chosen: np.ndarray, train_pool: np.ndarray, n: int) -> np.ndarray:
    """The paragraphs of `chosen` that remain when no run of n tokens of their concatenation occurs in `train_pool`."""
    known = np.unique(ngram_hashes(train_pool, n))
    while len(chosen):
        pool = concatenate(encoded, chosen)
        hits = np.flatnonzero(np.isin(ngram_hashes(pool, n), known))
        if not len(hits):
            break
        ends = np.cumsum([len(encoded[i]) for i in chosen])
        # A run may lie in several paragraphs; dropping the first of them breaks it.
        chosen = np.delete(chosen, np.unique(np.searchsorted(ends, hits, side="right")))
    return chosen


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit polynomial hash of every run of n tokens, by doubling: h_{a+b}(i) = h_a(i) B^b + h_b(i + a)."""
    base = 0x9E3779B97F4A7C15
    mixed = counter.bits(counter.key(n), torch.from_numpy(tokens.astype(np.int64))).numpy().view(np.uint64)
    power, length, result = mixed, 1, np.zeros(len(mixed) + 1, dtype=np.uint64)
    covered = 0
    while True:
        if n & length:
            size = max(len(tokens) - covered - length + 1, 0)
            result = result[:size] * np.uint64(pow(base, length, 1 << 64)) + power[covered : covered + size]
            covered += length
        if covered == n:
            return result
        size = max(len(power) - length, 0)
        power = power[:size] * np.uint64(pow(base, length, 1 << 64)) + power[length : length + size]
        length *= 2
