"""Training losses on the raw output vector v: opening angle, and von Mises-Fisher negative log-likelihood.

Both work in float32 whatever comes in, give finite gradients everywhere (v = 0, parallel and opposite
included), and return the sum over valid events with their number, so that a mean over several processes can
be exact.
Shape suffix: E events. The reported metric is a separate function, `iceaggr.metrics.opening_angle_deg`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ANGLE_SOFTENING = 1e-5  # length of v below which the angle loss no longer grows steeper


def angle_loss(v_E3: Tensor, target_E3: Tensor, valid_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the angles between v and the unit target in radians (float32), and the number of valid events.

    angle = atan2(sqrt(|v x t|^2 + s^2), v.t) with s = 1e-5: the angle between (v, s) and (t, 0) in four
    dimensions. For |v| >> s that is the opening angle to s / |v|; its gradient never exceeds 1 / s, vanishes
    (to s / |v|^2) at 0 and pi, and at v = 0 pulls towards the target. Rows with valid_E False add nothing,
    not even a NaN gradient.
    """
    v_E3, target_E3 = _float32_where_valid(v_E3, target_E3, valid_E)
    cross_E3 = torch.linalg.cross(v_E3, target_E3)
    sine_E = (cross_E3.square().sum(-1) + ANGLE_SOFTENING**2).sqrt()
    return _sum_and_count(torch.atan2(sine_E, (v_E3 * target_E3).sum(-1)), valid_E)


def vmf_nll(v_E3: Tensor, target_E3: Tensor, valid_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) in nats per steradian (float32) with kappa = |v|, and the number of valid events.

    -log p = -log k + log 2pi + k + log1p(-exp(-2k)) - v.t (Mardia & Jupp, Directional Statistics, 9.3).
    Two rewritings keep float32 exact: k - v.t = |v x t|^2 / (k + v.t) for v.t > 0, where the difference of
    two large numbers would be lost, and the series of log(sinh k / k) in k^2 below k = 1/2, where logarithms
    cancel and |v| has no gradient at 0. valid_E as in `angle_loss`.
    """
    v_E3, target_E3 = _float32_where_valid(v_E3, target_E3, valid_E)
    dot_E = (v_E3 * target_E3).sum(-1)
    k2_E = v_E3.square().sum(-1)

    # each branch stays finite where the other is used, or its gradient would be 0 times infinity
    s_E = k2_E.clamp(max=0.25)
    series_E = s_E * (1 / 6 + s_E * (-1 / 180 + s_E * (1 / 2835 - s_E / 37800)))
    small_E = math.log(4 * math.pi) + series_E - dot_E

    k_E = k2_E.clamp(min=0.25).sqrt()
    cross2_E = torch.linalg.cross(v_E3, target_E3).square().sum(-1)
    behind_E = torch.where(dot_E > 0, cross2_E / (k_E + dot_E.abs()), k_E - dot_E)
    large_E = math.log(2 * math.pi) - k_E.log() + torch.log1p(-torch.exp(-2 * k_E)) + behind_E

    return _sum_and_count(torch.where(k2_E < 0.25, small_E, large_E), valid_E)


def _float32_where_valid(v_E3: Tensor, target_E3: Tensor, valid_E: Tensor | None) -> tuple[Tensor, Tensor]:
    v_E3, target_E3 = v_E3.float(), target_E3.float()
    if valid_E is None:
        return v_E3, target_E3
    # replaced before the arithmetic: 0 times the NaN gradient of a masked result would still be NaN
    return torch.where(valid_E[:, None], v_E3, 1.0), torch.where(valid_E[:, None], target_E3, 1.0)


def _sum_and_count(loss_E: Tensor, valid_E: Tensor | None) -> tuple[Tensor, Tensor]:
    if valid_E is None:
        return loss_E.sum(), torch.full((), loss_E.numel(), device=loss_E.device)
    return torch.where(valid_E, loss_E, 0.0).sum(), valid_E.sum()
