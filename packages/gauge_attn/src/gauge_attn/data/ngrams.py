"""What counting alone reaches: unigram and interpolated bigram losses, the yardsticks beside every perplexity."""

from __future__ import annotations

import numpy as np


def unigram_loss(train_T: np.ndarray, test_T: np.ndarray, vocab: int) -> float:
    """Mean nats per token of `test_T` after the first, under add-one frequencies of `train_T`."""
    return float(-np.log(_unigram(train_T, vocab)[test_T[1:]]).mean())


def bigram_loss(train_T: np.ndarray, test_T: np.ndarray, vocab: int) -> float:
    """Mean nats per token of `test_T` after the first, under a bigram interpolated with the unigram.

    p(b | a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), with t(a) the number of distinct successors of a: Witten and Bell
    (1991), method C. A context never seen falls back to the unigram.
    """
    unigram_V = _unigram(train_T, vocab)
    pair, count = np.unique(_pairs(train_T, vocab), return_counts=True)
    first = pair // vocab
    follows_V = np.bincount(first, weights=count, minlength=vocab)
    distinct_V = np.bincount(first, minlength=vocab)
    asked = _pairs(test_T, vocab)
    place = np.minimum(np.searchsorted(pair, asked), pair.size - 1)
    seen = np.where(pair[place] == asked, count[place], 0)
    a, b = test_T[:-1], test_T[1:]
    weight = follows_V[a] + distinct_V[a]
    p = np.where(weight > 0, (seen + distinct_V[a] * unigram_V[b]) / np.maximum(weight, 1), unigram_V[b])
    return float(-np.log(p).mean())


def _unigram(train_T: np.ndarray, vocab: int) -> np.ndarray:
    count = np.bincount(train_T, minlength=vocab) + 1.0
    return count / count.sum()


def _pairs(tokens_T: np.ndarray, vocab: int) -> np.ndarray:
    return tokens_T[:-1].astype(np.int64) * vocab + tokens_T[1:]
