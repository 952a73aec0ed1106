"""Free-running predictions: errors in the accumulated phase u against linear prediction, and their spectral statistics.

Zeros are rigid: the height of the n-th is known to within O(log n) gaps whatever came before, so the seed's error of
a single later gap says nothing (it is bounded by the marginal's). What can grow is the error of the accumulated
u = sum of spacings; and a sampled continuation can be asked whether it looks like zeros.

Shapes: B windows, S steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rh_memory.data.windows import WindowBatch
from rh_memory.diagnostics.golden import Golden
from rh_memory.linear import LinearFit
from rh_memory.scores import Estimate

HORIZONS = (1, 2, 5, 10, 20, 50, 100, 200)
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0)
_SMALLEST = 1e-4  # a Gaussian mixture can draw a gap below zero, which no sequence of zeros has


def next_height(gamma: Tensor, s: Tensor) -> Tensor:
    """The height whose unfolded distance from gamma is s, float64: three Newton steps on u(g + x) - u(g) = s."""
    log_height = torch.log(gamma / (2 * math.pi))
    x = 2 * math.pi * s / log_height
    for _ in range(3):
        distance = (x * (log_height - 1) + (gamma + x) * torch.log1p(x / gamma)) / (2 * math.pi)
        x = x - (distance - s) * 2 * math.pi / torch.log((gamma + x) / (2 * math.pi))
    return gamma + x


@torch.inference_mode()
def roll(model: Any, golden: Golden, steps: int, *, has_heights: bool, seed: int | None = None) -> Tensor:
    """(B, S) spacings the model continues each golden context with; its own outputs become its inputs.

    seed: draw from the predicted densities; None feeds back their means. has_heights: new zeros get the heights their
    spacings imply; without (GUE), positions are sums of spacings.
    """
    context = golden.width - 1
    parts = []
    for number, starts in enumerate(golden.starts_W.split(golden.batch)):
        starts_B = starts.to(golden.device)
        first = golden.data.window(starts_B, context)
        generator = None
        if seed is not None:
            generator = torch.Generator(device=starts_B.device).manual_seed(seed + number)
        base_B = (golden.data.centre[starts_B] + golden.data.offset[starts_B]).double()
        s = torch.cat([first.s_BW, first.s_BW.new_zeros(len(starts_B), steps + 1)], dim=1)
        log_height = torch.cat([first.log_height_BW, first.log_height_BW.new_zeros(len(starts_B), steps + 1)], dim=1)
        gamma = torch.cat([first.gamma_BW, first.gamma_BW.new_zeros(len(starts_B), steps + 1)], dim=1)
        for k in range(steps):
            here = slice(k, k + context + 1)
            # predict() leaves out the last place of a batch, which is where the new spacing goes.
            window = WindowBatch(s[:, here], log_height[:, here], gamma[:, here] - gamma[:, k : k + 1])
            mixture = model.predict(window, "last")
            new_B = mixture.mean() if generator is None else mixture.sample(generator)
            new_B = new_B.float().clamp_min(_SMALLEST)
            at = context + k
            s[:, at] = new_B
            if has_heights:
                height_B = next_height(base_B + gamma[:, at - 1], new_B.double())
                gamma[:, at] = height_B - base_B
                log_height[:, at] = torch.log(height_B / (2 * math.pi)).to(log_height.dtype)
            else:
                gamma[:, at] = gamma[:, at - 1] + new_B
                log_height[:, at] = log_height[:, at - 1]
        parts.append(s[:, context : context + steps])
    return torch.cat(parts)


def roll_linear(fit: LinearFit, golden: Golden, steps: int) -> Tensor:
    """(B, S) mean continuations of an autoregression (an intercept and lags, no height dependence)."""
    weight_F = fit.weight_KF[0].cpu()
    lags = len(weight_F) - 1
    context = torch.cat([b.s_BW[:, -lags - 1 : -1].double().cpu() for b in golden.windows()])
    history = torch.cat([context - 1, context.new_zeros(len(context), steps)], dim=1)
    for k in range(steps):
        recent = history[:, k : k + lags].flip(1)
        history[:, lags + k] = weight_F[0] + recent @ weight_F[1:] - 1
    return history[:, lags:] + 1


def true_future(golden: Golden, steps: int) -> Tensor:
    """(B, S) spacings that follow each golden context."""
    starts = golden.starts_W.to(golden.device) + golden.width - 1
    return golden.data.window(starts, steps).s_BW


def phase_errors(golden: Golden, truth_BS: Tensor, rolled: dict[str, Tensor]) -> list[dict[str, Any]]:
    """RMS error of accumulated u after h steps for each predictor, and the paired difference of squares to "AR"."""
    true_u = truth_BS.double().cpu().cumsum(1)
    squares = {name: (x.double().cpu().cumsum(1) - true_u).square() for name, x in rolled.items()}
    rows = []
    for h in [h for h in HORIZONS if h <= truth_BS.shape[1]]:
        row: dict[str, Any] = {"steps": h}
        for name, square in squares.items():
            mean = golden.estimate(square[:, h - 1])
            root = Estimate(*(math.sqrt(max(x, 0.0)) if x is not None else None for x in mean))  # type: ignore[arg-type]
            row[name] = root.json()
            if name != "AR":
                row[f"{name} minus AR, squared"] = golden.estimate(square[:, h - 1] - squares["AR"][:, h - 1]).json()
        rows.append(row)
    return rows


def _statistics(s_BS: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """One value per sequence of each statistic; their means are compared."""
    x = s_BS - 1
    found = {
        "mean spacing": s_BS.mean(1),
        "variance of spacings": (x**2).mean(1),
        "lag-1 covariance": (x[:, 1:] * x[:, :-1]).mean(1),
        "lag-2 covariance": (x[:, 2:] * x[:, :-2]).mean(1),
        "share below 0.3": (s_BS < 0.3).mean(1),
        "share above 1.8": (s_BS > 1.8).mean(1),
    }
    u = np.cumsum(s_BS, axis=1)
    for L in [L for L in LENGTHS if s_BS.shape[1] / 3 >= L]:
        values = []
        for row in u:
            # One window at least, also where a bad model's sequence is shorter than it.
            start = np.arange(row[0], max(row[-1] - L, row[0] + 0.25), 0.5)
            values.append(np.mean((np.searchsorted(row, start + L) - np.searchsorted(row, start) - L) ** 2))
        found[f"number variance L={L:g}"] = np.array(values)
    return found


def spectral_comparison(golden: Golden, truth_BS: Tensor, sampled_BS: Tensor) -> list[dict[str, Any]]:
    """Statistics of sampled continuations beside those of the true ones; differences paired by context."""
    true, drawn = (_statistics(x.double().cpu().numpy()) for x in (truth_BS, sampled_BS))
    return [
        {
            "statistic": name,
            "zeros": golden.estimate(true[name]).json(),
            "model": golden.estimate(drawn[name]).json(),
            "difference": golden.estimate(drawn[name] - true[name]).json(),
        }
        for name in true
    ]
