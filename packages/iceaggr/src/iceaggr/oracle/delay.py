"""When a photo-electron is seen: the simulator's gamma law of delays, blurred by the photomultiplier.

The gamma density r^a s^(a-1) exp(-r s) / Gamma(a) convolved with a Gaussian of width sigma is, at delay t,

    r^a sigma^(a-1) exp(-r t + (r sigma)^2 / 2) h(a, (t - r sigma^2) / sigma),
    h(a, x) = integral over v > 0 of v^(a-1) / Gamma(a) phi(x - v),        phi: standard normal density,

(N. van Eijndhoven et al., Astropart. Phys. 28 (2007) 456). h is tabulated once and interpolated; it is what the blur
does to the edge at t = 0, where the gamma density of a near DOM is infinite.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_LOG_SHAPE = (math.log(0.02), math.log(90.0), 161)
_X = (-8.0, 12.0, 161)
_NODES = 400
_LOG_FIRST = -10.0
"""Quadrature over log v starts here; below it the integrand is phi(x) v^(a-1) / Gamma(a), integrated exactly."""


def blurred_delay_log_density(delay_Q: Tensor, shape_Q: Tensor, rate_Q: Tensor, sigma: float) -> Tensor:
    """Log density (1/ns) of the delay (ns) after straight light, gamma(shape, rate 1/ns) plus Gaussian(sigma ns).

    Differentiable; float64 advised. Shapes are clamped to 0.02..90. Far before the straight light (8 sigma) it is the
    constant tail of the table.
    """
    delay_Q = torch.maximum(delay_Q, (_X[0] + rate_Q * sigma) * sigma)  # exp(-r t) would grow without end
    x = delay_Q / sigma - rate_Q * sigma
    scale = shape_Q * rate_Q.log() + (shape_Q - 1) * math.log(sigma) - rate_Q * delay_Q + (rate_Q * sigma).square() / 2
    far = x.clamp(min=_X[1])
    bend = ((shape_Q - 1) * (shape_Q - 2) / (2 * far.square())).clamp(min=-0.5)
    tail = (shape_Q - 1) * far.log() - torch.lgamma(shape_Q) + bend.log1p()
    return scale + torch.where(x < _X[1], _interpolate(shape_Q, x), tail)


def delay_cdf(delay_Q: Tensor, shape_Q: Tensor, rate_Q: Tensor) -> Tensor:
    """Share of the gamma delays below `delay` (ns), by the cube-root law of Wilson and Hilferty: 0.02 at worst where
    it is used, and differentiable in the shape, which torch's incomplete gamma function is not."""
    root = (delay_Q.clamp(min=1e-6) * rate_Q / shape_Q) ** (1 / 3)
    return torch.special.ndtr((root - 1 + 1 / (9 * shape_Q)) * 3 * shape_Q.sqrt()) * (delay_Q > 0)


def _interpolate(shape_Q: Tensor, x_Q: Tensor) -> Tensor:
    """Bilinear in (log shape, x)."""
    table = _table(shape_Q.device, shape_Q.dtype)
    row, row_rest = _cell(shape_Q.clamp(min=1e-6).log(), _LOG_SHAPE)
    column, column_rest = _cell(x_Q, _X)
    corner = row * _X[2] + column
    low = table[corner] + (table[corner + 1] - table[corner]) * column_rest
    corner = corner + _X[2]
    high = table[corner] + (table[corner + 1] - table[corner]) * column_rest
    return low + (high - low) * row_rest


def _cell(value_Q: Tensor, axis: tuple[float, float, int]) -> tuple[Tensor, Tensor]:
    first, last, n = axis
    place = (value_Q.clamp(first, last) - first) * ((n - 1) / (last - first))
    cell = place.detach().long().clamp(max=n - 2)
    return cell, place - cell


@lru_cache(maxsize=4)
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """log h, flattened from (shape, x)."""
    shape_A1 = torch.linspace(*_LOG_SHAPE, dtype=torch.float64).exp()[:, None]
    log_v = torch.linspace(_LOG_FIRST, math.log(60.0), _NODES, dtype=torch.float64)
    rows = []
    for x in torch.linspace(*_X, dtype=torch.float64):
        log_phi = -(x - log_v.exp()).square() / 2
        inside = shape_A1 * log_v + log_phi
        inside[:, (0, -1)] -= math.log(2)  # trapezium
        body = torch.logsumexp(inside, dim=1) + math.log(float(log_v[1] - log_v[0]))
        start = shape_A1[:, 0] * _LOG_FIRST - shape_A1[:, 0].log() - x.square() / 2
        rows.append(torch.logaddexp(body, start))
    log_h = torch.stack(rows, dim=1) - torch.lgamma(shape_A1) - math.log(2 * math.pi) / 2
    return log_h.reshape(-1).to(device, dtype)
