"""The terms of the training loss: likelihood, orthogonal slots, rollouts. (The auxiliary targets are in q3.py.)

Shapes: B windows, W spacings of a window, L spacings of a rollout, M slots, D channels, K components.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rh_memory.data.windows import WindowBatch
from rh_memory.mdn import Kind, Mixture
from rh_memory.models import Context, Model


def mean_nll(mixture: tuple[Tensor, Tensor, Tensor], kind: Kind, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean -log p(target) in nats per spacing, and mean entropy of the mixture weights; both 0-d."""
    log_weights, loc, scale = mixture
    density = Mixture(log_weights, loc, scale, kind)
    return -density.log_prob(target).mean(), density.entropy_of_weights().mean()


def orthogonality(content_MD: Tensor) -> Tensor:
    """||G - I||^2 for the cosines G between slot contents, 0-d."""
    unit = F.normalize(content_MD, dim=-1)
    return (unit @ unit.T - torch.eye(len(unit), device=unit.device)).square().sum()


def drift_loss(model: Model, batch: WindowBatch, *, context: int, horizon: int) -> Tensor:
    """Rollout of mean predictions from `context` true spacings: mean over B and h of |cumulated error| h / horizon.

    Predictions are fed back without gradient, as in the seed; heights go on at the local density of the last true
    spacing, never at the true future's. Every pass has the full length L, whose tail a causal model does not see.
    """
    length = context + horizon
    s_BL = batch.s_BW[:, :length].clone()
    s_BL[:, context:] = 1.0
    log_height_BL = batch.log_height_BW[:, :length].clone()
    log_height_BL[:, context:] = log_height_BL[:, context - 1 : context]
    gamma_BL = batch.gamma_BW[:, :length].clone()
    gap_per_spacing_B = 2 * math.pi / log_height_BL[:, context - 1].double()
    mask = model.training_mask(length, s_BL.device)
    means = []
    for i in range(context, length):
        gamma_BL[:, i:] = gamma_BL[:, i - 1 : i]  # not seen yet, but finite
        output = model(Context(s_BL, log_height_BL, gamma_BL), mask)
        log_weights, loc, scale = output.mixture
        mean_B = Mixture(log_weights, loc, scale, model.config.mixture)[:, i - 1].mean()
        means.append(mean_B)
        s_BL, gamma_BL = s_BL.clone(), gamma_BL.clone()
        s_BL[:, i] = mean_B.detach()
        gamma_BL[:, i] = gamma_BL[:, i - 1] + s_BL[:, i] * gap_per_spacing_B
    drift_BH = (torch.stack(means, 1) - batch.s_BW[:, context:length]).cumsum(1).abs()
    weight_H = torch.arange(1, horizon + 1, device=drift_BH.device) / horizon
    return (drift_BH * weight_H).mean()
