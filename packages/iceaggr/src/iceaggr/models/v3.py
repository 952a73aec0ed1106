"""The space-time interval between two DOMs as a part of their attention score.

Light from one point of a track reaches DOM j after DOM i only if the interval c_ice^2 dt^2 - dx^2 between the two first
pulses is not too negative, and pairs that saw the same light lie near the light cone, where it is 0.

Shape suffixes: T tokens, F features, H heads.
"""

from __future__ import annotations

import torch
from lab_shared.attention import ScoreMod
from torch import Tensor

from iceaggr.config import ModelConfig
from iceaggr.data.features import LIGHT_SPEED
from iceaggr.data.features_v3 import ICE_SPEED

SCALE = 100.0
"""Metres; intervals are counted in this length, a few scattering lengths of the ice."""


def places(features_TF: Tensor, is_cls_T: Tensor, config: ModelConfig) -> Tensor:
    """(T, 5) float32 [x, y, z, c_ice t, 1] of each DOM token in units of `SCALE`; 0 for CLS tokens.

    Position and time of the first pulse are read back from the features: x, y, z / 500 m in the first columns, and
    t' = (t - 1e4 ns) / 3e4 (seed) or the time from the event's reference in light travel of 200 m (summary). Only
    differences of times matter.
    """
    if config.features == "seed":
        time_T = features_TF[:, 4] * (3e4 * ICE_SPEED / SCALE)
    else:
        time_T = features_TF[:, 6] * (200 / LIGHT_SPEED * ICE_SPEED / SCALE)
    there_T = (~is_cls_T).to(features_TF.dtype)
    columns = torch.cat([features_TF[:, :3] * (500 / SCALE), time_T[:, None], torch.ones_like(time_T)[:, None]], 1)
    return columns * there_T[:, None]


def interval_scores(place_T5: Tensor, side_H: Tensor, cone_H: Tensor) -> ScoreMod:
    """score + side_h u + cone_h (1 - |u|) with u = s / (1 + |s|), s = (c_ice dt)^2 - dx^2 in units of SCALE^2.

    u goes from -1 (no signal connects the two) through 0 (light does) to 1. Pairs with a CLS token keep their score.
    place_T5: as `places` makes it. For `lab_shared.attention.attend`; elementwise, as FlexAttention asks.
    """
    # A weight per token and head, of which all are equal: FlexAttention adds up a captured tensor's gradient one pair
    # at a time, and only H addresses for all pairs of a batch would stand in each other's way.
    n_tokens = place_T5.shape[0]
    side_TH = side_H.float().expand(n_tokens, -1).contiguous()
    cone_TH = cone_H.float().expand(n_tokens, -1).contiguous()

    def modify(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dx = place_T5[q, 0] - place_T5[k, 0]
        dy = place_T5[q, 1] - place_T5[k, 1]
        dz = place_T5[q, 2] - place_T5[k, 2]
        dt = place_T5[q, 3] - place_T5[k, 3]
        s = dt * dt - dx * dx - dy * dy - dz * dz
        u = s / (1 + s.abs())
        both = place_T5[q, 4] * place_T5[k, 4]
        return score + both * (side_TH[q, h] * u + cone_TH[q, h] * (1 - u.abs()))

    return modify
