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
    return _sum_and_count(_vmf_nll(v_E3, target_E3), valid_E)


def mixture_nll(out_EC: Tensor, target_E3: Tensor, valid_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) in nats per steradian (float32) of a mixture, and the number of valid events.

    out_EC: (E, 4 K) as `mixture_parts` reads it. -log sum_k w_k p_k(target) with the densities of `vmf_nll`, added as
    logarithms: finite, with finite gradients, at every kappa and weight. valid_E as in `angle_loss`.
    """
    out_EC, target_E3 = _float32_where_valid(out_EC, target_E3, valid_E)
    v_EK3, log_weight_EK = mixture_parts(out_EC)
    nll_EK = _vmf_nll(v_EK3, target_E3[:, None, :].expand_as(v_EK3))
    return _sum_and_count(-torch.logsumexp(log_weight_EK - nll_EK, -1), valid_E)


def mixture_parts(out_EC: Tensor) -> tuple[Tensor, Tensor]:
    """A head's output (E, 4 K) as K von Mises-Fisher components: v_EK3 with kappa = |v|, and log weights (E, K).

    Component k has columns 4k to 4k + 3: three of its vector and the logit of its weight. An output of three columns
    is one component of weight 1.
    """
    if out_EC.shape[-1] == 3:
        return out_EC[:, None, :], torch.zeros_like(out_EC[:, :1])
    parts_EK4 = out_EC.unflatten(-1, (-1, 4))
    return parts_EK4[..., :3], parts_EK4[..., 3].log_softmax(-1)


def pointing(out_EC: Tensor) -> Tensor:
    """A vector in the direction an answer stands for, (E, 3) float32: v_E3 itself, or the mean vector of a mixture.

    A vMF has the mean A(|v|) v / |v| with A(k) = coth k - 1 / k, a mixture the weighted sum of those. Gradients are
    finite for all kappa, 0 included. Source: Mardia & Jupp, Directional Statistics, 9.3.
    """
    if out_EC.shape[-1] == 3:
        return out_EC.float()
    v_EK3, log_weight_EK = mixture_parts(out_EC.float())
    return (log_weight_EK.exp()[..., None] * _langevin_ratio(v_EK3.square().sum(-1))[..., None] * v_EK3).sum(1)


def mean_vector(out_EC: Tensor) -> Tensor:
    """The one vector v_E3 an answer stands for, float32: v itself, or for a mixture that of the vMF of the same mean.

    It points where `pointing` does, and kappa = |v| solves A(|v|) = |mean|; for a mixture kappa ends at about 2e6,
    where float32 ends.
    """
    mean_E3 = pointing(out_EC)
    if out_EC.shape[-1] == 3:
        return mean_E3
    return mean_E3 * _inverse_langevin_ratio(mean_E3.square().sum(-1))[..., None]


def _langevin_ratio(k2: Tensor) -> Tensor:
    """A(k) / k of k^2, by its series below k = 1/2."""
    s = k2.clamp(max=0.25)
    small = 1 / 3 + s * (-1 / 45 + s * (2 / 945 + s * (-1 / 4725 + s * (2 / 93555))))
    k = k2.clamp(min=0.25).sqrt()
    return torch.where(k2 < 0.25, small, (1 / torch.tanh(k) - 1 / k) / k)


def _inverse_langevin_ratio(r2: Tensor) -> Tensor:
    """k / A(k) of r^2 = A(k)^2 < 1: exactly 1 / (r (1 - r)) from k = 10 on, where coth k is 1; below a rational guess
    and Newton's method on A(k) = r."""
    low2 = r2.clamp(max=0.81)
    ratio = (3 - low2) / (1 - low2)
    for _ in range(3):
        k2 = ratio.square() * low2
        a = _langevin_ratio(k2)
        # dA/dk = 1 - 2 A / k - A^2; with k = ratio r the step (A - r) / (dA/dk) loses its r.
        ratio = ratio - (a * ratio - 1) / (1 - a * (2 + a * k2))
    high = r2.clamp(0.81, 1 - 1e-6).sqrt()
    return torch.where(r2 < 0.81, ratio, 1 / (high * (1 - high)))


def _vmf_nll(v_E3: Tensor, target_E3: Tensor) -> Tensor:
    """`vmf_nll` per event, (..., 3) -> (...)."""
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

    return torch.where(k2_E < 0.25, small_E, large_E)


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
