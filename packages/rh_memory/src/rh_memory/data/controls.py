"""Spacings without arithmetic: what a model gains here over the known limits would be leakage.

GUE: eigenvalues of random Hermitian matrices, whose local statistics the zeros share but whose primes they lack
(conditional entropy about 0.425 nats). Shuffled: the zeros' own spacings in random order (their marginal, 0.502 nats).
"""

from __future__ import annotations

import numpy as np
from lab_shared.progress import Counter

from rh_memory.data.unfold import Spacings

LOG_HEIGHT = 11.5
"""log(gamma / 2 pi) given to a model with every control spacing: about the mean over the first 2 million zeros."""


def gue_spacings(n: int, seed: int, *, size: int = 2048) -> Spacings:
    """n unfolded bulk spacings of GUE matrices of `size` rows; simulated.

    Eigenvalues come from the tridiagonal model (Dumitriu and Edelman, 2002): diagonal N(0, 1), off-diagonal
    chi_{2k} / sqrt 2 for k = size-1 .. 1, with spectrum on +-2 sqrt(size). Each matrix gives the size/2 spacings in
    the middle, unfolded by the semicircle law; matrices are independent, so `segment` = size // 2.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    rng = np.random.default_rng(seed)
    segment = size // 2
    middle = slice((size - segment) // 2, (size - segment) // 2 + segment + 1)
    degrees = 2 * np.arange(size - 1, 0, -1)
    matrices = -(-n // segment)
    s = np.empty((matrices, segment), np.float32)
    with Counter("GUE matrices", matrices, "matrices") as counter:
        for i in range(matrices):
            off_diagonal = np.sqrt(rng.chisquare(degrees) / 2)
            x = eigvalsh_tridiagonal(rng.standard_normal(size), off_diagonal)[middle] / (2 * np.sqrt(size))
            # size times the semicircle's distribution function, up to a constant.
            s[i] = np.diff(size / np.pi * (x * np.sqrt(1 - x * x) + np.arcsin(x)))
            counter.show(i + 1)
    return _without_height(s.reshape(-1)[:n], segment)


def shuffled(spacings: Spacings, seed: int) -> Spacings:
    """The same spacings in random order, without their heights (which would tell where each came from)."""
    return _without_height(np.random.default_rng(seed).permutation(spacings.s), 0)


def _without_height(s: np.ndarray, segment: int) -> Spacings:
    """Constant log_height; the position of a gap's end is the sum of the spacings up to it."""
    position = np.cumsum(s, dtype=np.float64)
    centre = np.floor(position)
    return Spacings(s, centre, position - centre, np.full(len(s), LOG_HEIGHT, np.float32), segment)
