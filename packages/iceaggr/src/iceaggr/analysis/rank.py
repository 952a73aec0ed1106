"""How many dimensions a matrix really uses."""

from __future__ import annotations

import numpy as np

from iceaggr.summaries import Array


def singular_values(matrix: Array) -> Array:
    """Singular values, largest first; of a tall matrix from its Gram matrix, which is small."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    return np.sqrt(np.linalg.eigvalsh(matrix.T @ matrix)[::-1].clip(min=0))


def effective_rank(singular: Array) -> float:
    """exp of the entropy of s / sum(s): n for n equal values, 1 for a single one.

    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
    """
    p = singular / singular.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def participation_ratio(singular: Array) -> float:
    """(sum of s^2)^2 / sum of s^4: the same for variances, and less moved by many small ones."""
    variance = singular**2
    return float(variance.sum() ** 2 / (variance**2).sum())
