"""Maximum likelihood of many events at once: Levenberg-Marquardt steps on the Fisher information.

Every hypothesis has its own damping; those that have converged leave the batch. Suffixes as in
`iceaggr.oracle.likelihood`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from iceaggr.oracle.hypothesis import Layout, frame
from iceaggr.oracle.likelihood import Likelihood, Score
from iceaggr.sim.config import SimConfig

_CONVERGED = 1e-2
"""Gain of ln L that a step must promise for the fit to go on."""
_MOST_DAMPING = 1e6
_SCAN_STEPS = 5
"""Evaluations from each direction of the scan before the best is chosen."""
_BLURS = (30.0, 8.0)
"""Times are blurred by this many ns in the scan, and then on the way from its best direction."""


class Fit(NamedTuple):
    rows_RS: Tensor
    value_S: Tensor  # ln L
    steps_S: Tensor  # int64, evaluations used


def maximise(
    likelihood: Likelihood, rows_RS: Tensor, event_S: Tensor, *, steps: int, fixed_direction: bool = False
) -> Fit:
    """Climb from each hypothesis to the next maximum, at most `steps` evaluations.

    fixed_direction: over everything but the direction.
    """
    layout, config = likelihood.layout, likelihood.config
    scale_K = torch.tensor(layout.scale, dtype=rows_RS.dtype, device=rows_RS.device)
    free_K = torch.ones_like(scale_K)
    free_K[:2] = 0.0 if fixed_direction else 1.0
    best_RS = _within(rows_RS, layout, config)
    score = likelihood.score(best_RS, event_S)
    best_S, used_S = score.value_S.clone(), torch.ones_like(event_S)
    active = torch.arange(event_S.numel(), device=event_S.device)
    damping = torch.full_like(best_S, 0.03)
    for _ in range(steps - 1):
        step, promise = _step(score, damping, scale_K, free_K)
        going = ((promise > _CONVERGED) & (damping < _MOST_DAMPING)).nonzero().squeeze(1)
        if going.numel() == 0:
            break
        if going.numel() < active.numel():
            active, damping, step = active[going], damping[going], step[going]
            score = Score(*(x[going] for x in score))
        here = best_RS[:, active]
        tried = _within(layout.move(here, frame(here), step.T), layout, config)
        new = likelihood.score(tried, event_S[active])
        used_S[active] += 1
        better = new.value_S > score.value_S
        score = Score(*(torch.where(_rows(better, x), x, y) for x, y in zip(new, score, strict=True)))
        best_RS[:, active] = torch.where(better, tried, here)
        best_S[active] = score.value_S
        damping = torch.where(better, damping * 0.3, damping * 5)
    return Fit(best_RS, best_S, used_S)


def scan_and_climb(likelihood: Likelihood, rows_RE: Tensor, *, scan: int, steps: int) -> Fit:
    """The climb from the best of `scan` directions: it is told the place and the light of `rows_RE`, not the direction.

    Turns each hypothesis about its point, evenly over the sphere, climbs a few steps from each direction with blurred
    times and goes on with the best.
    """
    n = rows_RE.shape[1]
    event_E = torch.arange(n, device=rows_RE.device)
    turned_RS = rows_RE.repeat_interleave(scan, dim=1)
    turned_RS[:3] = sphere(scan, rows_RE).T.repeat(1, n)
    blurred = likelihood.blurred(_BLURS[0])
    short = maximise(blurred, turned_RS, event_E.repeat_interleave(scan), steps=_SCAN_STEPS)
    chosen = short.value_S.view(n, scan).argmax(1) + scan * event_E
    return sharpen(likelihood, short.rows_RS[:, chosen], event_E, steps=steps)


def higher(first: Fit, second: Fit) -> tuple[Fit, Tensor]:
    """The higher of two fits of each event, and True where it is the second."""
    won_E = second.value_S > first.value_S + _CONVERGED
    return Fit(*(torch.where(won_E, y, x) for x, y in zip(first, second, strict=True))), won_E


def sharpen(likelihood: Likelihood, rows_RS: Tensor, event_S: Tensor, *, steps: int) -> Fit:
    """Climb with blurred times first: far from the maximum most pulses miss the sharp arrival times altogether."""
    for blur in _BLURS:
        rows_RS = maximise(likelihood.blurred(blur), rows_RS, event_S, steps=steps // 2).rows_RS
    return maximise(likelihood, rows_RS, event_S, steps=steps)


def sphere(n: int, like: Tensor) -> Tensor:
    """(n, 3) unit vectors spread evenly, on a Fibonacci spiral."""
    index = torch.arange(n, dtype=like.dtype, device=like.device)
    z = 1 - (2 * index + 1) / n
    phi = math.pi * (3 - math.sqrt(5)) * index
    rho = (1 - z * z).sqrt()
    return torch.stack((rho * phi.cos(), rho * phi.sin(), z), dim=1)


def _step(score: Score, damping_S: Tensor, scale_K: Tensor, free_K: Tensor) -> tuple[Tensor, Tensor]:
    """Damped Newton step in units of the natural scales, no longer than one of them, and the gain it promises."""
    gradient = score.gradient_SK * scale_K * free_K
    fisher = score.fisher_SKK * (scale_K * free_K)[:, None] * (scale_K * free_K)
    diagonal = fisher.diagonal(dim1=1, dim2=2)
    damped = fisher + torch.diag_embed(damping_S[:, None] * (diagonal + 1) + 1e-9)
    step = torch.linalg.solve_ex(damped, gradient[:, :, None]).result.squeeze(2)
    step = step / step.abs().amax(dim=1, keepdim=True).clamp(min=1)
    promise = (gradient * step).sum(1) - (step[:, None, :] @ fisher @ step[:, :, None]).reshape(-1) / 2
    return step * scale_K, promise


def _within(rows_RS: Tensor, layout: Layout, config: SimConfig) -> Tensor:
    """Hypotheses inside what the simulator draws: energies up to its largest, and cascades inside its cylinder."""
    rows = rows_RS.clone()
    rows[layout.log_energies] = rows[layout.log_energies].clamp(0.0, math.log(config.energy_max))
    if not layout.is_track:
        radius = rows[3:5].norm(dim=0)
        rows[3:5] *= (config.radius / radius.clamp(min=1.0)).clamp(max=1.0)
        rows[5] = rows[5].clamp(-config.half_height, config.half_height)
    return rows


def _rows(chosen_S: Tensor, like: Tensor) -> Tensor:
    """chosen_S with the further dimensions of `like`."""
    return chosen_S.view(-1, *[1] * (like.ndim - 1))
