"""The terms of the training loss: likelihood, orthogonal slots, rollouts. (The auxiliary targets are in q3.py.)

Shapes: B windows, W spacings of a window, L spacings of a rollout, H steps of it, M slots, D channels,
K components.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lab_shared.attention import Mask
from torch import Tensor

from rh_memory.data.windows import WindowBatch
from rh_memory.mdn import Kind, Mixture
from rh_memory.models import Context, Output

Forward = Callable[[Context, Mask], Output]
"""A model, or what compiles or wraps one."""


def likelihood(
    mixture: tuple[Tensor, Tensor, Tensor], kind: Kind, target: Tensor, entropy_weight: float
) -> tuple[Tensor, Tensor]:
    """(mean -log p(target) - entropy_weight x mean entropy of the mixture weights, the first term alone), 0-d, nats."""
    density = Mixture(*mixture, kind)
    nll = -density.log_prob(target).mean()
    if not entropy_weight:
        return nll, nll
    return nll - entropy_weight * density.entropy_of_weights().mean(), nll


def orthogonality(content_MD: Tensor) -> Tensor:
    """||G - I||^2 for the cosines G between slot contents, 0-d."""
    unit = F.normalize(content_MD, dim=-1)
    return (unit @ unit.T - torch.eye(len(unit), device=unit.device)).square().sum()


@torch.no_grad()
def rollout(forward: Forward, batch: WindowBatch, mask: Mask, kind: Kind, *, context: int, horizon: int) -> Context:
    """The first `context` spacings of each window and horizon - 1 predicted means behind them, each fed back.

    forward: of a causal model; mask: its own for context + horizon - 1 spacings. Heights go on at the local density of
    the last true spacing, never at the true future's. Every pass has the full length, whose tail is not seen yet.
    """
    length = context + horizon - 1
    s_BL, log_height_BL, gamma_BL = (x[:, :length].clone() for x in (batch.s_BW, batch.log_height_BW, batch.gamma_BW))
    s_BL[:, context:] = 1.0
    log_height_BL[:, context:] = log_height_BL[:, context - 1 : context]
    gamma_BL[:, context:] = gamma_BL[:, context - 1 : context]  # not seen, but finite
    gap_per_spacing_B = 2 * math.pi / log_height_BL[:, context - 1].double()
    for i in range(context, length):
        mixture = forward(Context(s_BL, log_height_BL, gamma_BL), mask).mixture
        s_BL[:, i] = Mixture(*mixture, kind)[:, i - 1].mean()
        gamma_BL[:, i] = gamma_BL[:, i - 1] + s_BL[:, i] * gap_per_spacing_B
    return Context(s_BL, log_height_BL, gamma_BL)


def drift_loss(forward: Forward, rolled: Context, true_BH: Tensor, mask: Mask, kind: Kind) -> Tensor:
    """Mean over B and h of |cumulated error of the first h predicted means| h / H, 0-d.

    rolled: what `rollout` returned; true_BH: the H true spacings behind its context. Means are fed back without
    gradient, as in the seed, so one pass over the finished rollout has the means and gradients of all its steps.
    (Dropout is drawn once for that pass, and anew for each pass of the rollout; the seed's steps each had their own.)
    """
    horizon = true_BH.size(1)
    mean_BH = Mixture(*forward(rolled, mask).mixture, kind)[:, -horizon:].mean()
    weight_H = torch.arange(1, horizon + 1, device=true_BH.device) / horizon
    return ((mean_BH - true_BH).cumsum(1).abs() * weight_H).mean()
