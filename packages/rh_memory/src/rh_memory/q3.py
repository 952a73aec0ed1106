"""What memory slots can be asked to predict about the window in view: eight proxies, or four plain statistics.

Shapes: B windows, T spacings, A targets.

| | q3 | |
|---|---|---|
| M0 | mean(s) - 1 | departure from the mean density |
| M1 | log(std(s) sqrt(2 pi e)) | entropy of a Gaussian of that width |
| M2 | max abs(d) | d: differences of neighbours |
| M3 | 1 % quantile of s | |
| M4 | mean abs(d2) | d2: second differences |
| M5 | abs(mean of the first half - mean of the second) | |
| M6 | mean(d2^2) | |
| M7 | variance over 16-long blocks of their variances | |

stats: mean, standard deviation, autocorrelation at lags 1 and 5. Variances are unbiased.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

AuxTarget = Literal["q3", "stats"]
N_TARGETS: dict[AuxTarget, int] = {"q3": 8, "stats": 4}
BLOCK = 16
"""Length of the blocks of M7."""


def q3_targets(s_BT: Tensor) -> Tensor:
    """M0 to M7 of each window (B, 8), float32. Raises ValueError for windows shorter than two blocks."""
    n = s_BT.size(1)
    if n < 2 * BLOCK:
        raise ValueError(f"windows of {n} spacings are too short: M7 needs two blocks of {BLOCK}")
    s = s_BT.float()
    d, d2 = s.diff(dim=1), s.diff(n=2, dim=1)
    blocks = s[:, : n - n % BLOCK].unflatten(1, (-1, BLOCK))
    targets = [
        s.mean(1) - 1,
        (s.std(1) * math.sqrt(2 * math.pi * math.e)).log(),
        d.abs().amax(1),
        s.quantile(0.01, dim=1),
        d2.abs().mean(1),
        (s[:, : n // 2].mean(1) - s[:, n // 2 :].mean(1)).abs(),
        d2.square().mean(1),
        blocks.var(-1).var(-1),
    ]
    return torch.stack(targets, -1)


def stats_targets(s_BT: Tensor) -> Tensor:
    """Mean, standard deviation, autocorrelations 1 and 5 of each window (B, 4), float32."""
    s = s_BT.float()
    x = s - s.mean(1, keepdim=True)
    variance = x.square().mean(1)
    correlations = [(x[:, lag:] * x[:, :-lag]).mean(1) / variance for lag in (1, 5)]
    return torch.stack([s.mean(1), s.std(1), *correlations], -1)


def aux_targets(s_BT: Tensor, kind: AuxTarget) -> Tensor:
    """(B, A)."""
    return q3_targets(s_BT) if kind == "q3" else stats_targets(s_BT)


def constants(s_BT: Tensor, kind: AuxTarget) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (A,) of the targets over the given training windows, for z-scores.

    Constants of the training set, because z-scores over each batch would leak one window's statistics to the others.
    """
    targets = aux_targets(s_BT, kind)
    return targets.mean(0), targets.std(0) + 1e-8


def aux_loss(aux_BMA: Tensor, z_BA: Tensor, mode: Literal["mean", "diagonal"]) -> Tensor:
    """Mean squared error against z-scored targets, 0-d.

    mean: the average of all slots' predictions. diagonal: slot i's prediction of target i, nothing else.
    """
    if mode == "mean":
        return (aux_BMA.mean(1) - z_BA).square().mean()
    return (aux_BMA.diagonal(dim1=1, dim2=2) - z_BA[:, : min(aux_BMA.shape[1:])]).square().mean()


def ramp(step: int, ends: tuple[int, int], weights: tuple[float, float]) -> float:
    """0 at step 0, linear to weights[0] at ends[0], linear to weights[1] at ends[1], constant after that."""
    if step < ends[0]:
        return weights[0] * step / ends[0]
    if step < ends[1]:
        return weights[0] + (weights[1] - weights[0]) * (step - ends[0]) / (ends[1] - ends[0])
    return weights[1]
