"""Does the difficulty change along the data? Differences between long blocks, tested instead of divided by a mean.

(The seed divided the standard deviation of block NLLs by their mean, which has no meaning for a quantity that may be 0,
and compared it with a fixed threshold below the sampling noise.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rh_memory.scores import BLOCK, block_estimate

Floats = NDArray[np.float64]
FEWEST = 4
"""Blocks without which there are no two stretches of two."""


def count(spacing_W: NDArray[np.int64]) -> int:
    """Blocks of 256 spacings that hold targets."""
    return len(np.unique(spacing_W // BLOCK))


def block_differences(
    nll_W: Floats, spacing_W: NDArray[np.int64], *, parts: int = 8, permutations: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """NLL of `parts` consecutive stretches, each less the overall mean, and a one-way permutation test.

    The test permutes the means of blocks of 256 spacings between the stretches. p = (1 + count) / (1 + permutations);
    its statistic is the variance between stretches of those means. Raises ValueError for fewer than FEWEST blocks.
    """
    block_W = spacing_W // BLOCK
    ids, member_W = np.unique(block_W, return_inverse=True)
    mean_B = np.bincount(member_W, weights=nll_W) / np.bincount(member_W)
    if len(ids) < FEWEST:
        raise ValueError(f"{len(ids)} blocks of {BLOCK} spacings: comparing stretches needs at least {FEWEST}")
    parts = min(parts, len(ids) // 2)
    stretch_B = np.arange(len(ids)) * parts // len(ids)
    counts = np.bincount(stretch_B)

    def between(values_B: Floats) -> float:
        return float(np.var(np.bincount(stretch_B, weights=values_B) / counts))

    rng = np.random.default_rng(seed)
    observed = between(mean_B)
    above = sum(between(rng.permutation(mean_B)) >= observed for _ in range(permutations))
    centred = nll_W - nll_W.mean()
    rows = [
        {"stretch": k, **block_estimate(centred[stretch_B[member_W] == k], spacing_W[stretch_B[member_W] == k]).json()}
        for k in range(parts)
    ]
    return {
        "difference_from_mean": rows,
        "std_between": observed**0.5,
        "std_expected_from_noise": float(np.sqrt(mean_B.var() / (len(mean_B) / parts))),
        "p": (1 + above) / (1 + permutations),
    }
