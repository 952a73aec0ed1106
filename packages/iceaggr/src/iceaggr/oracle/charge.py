"""How many photo-electrons a pulse holds: the simulator's charges, read backwards.

A pulse is one photo-electron at its time t and n - 1 more in what is left of its time bin. With the rate lambda(t) and
L, its integral over the rest of the bin, the probability of the pulse is

    lambda(t) R(L) exp(-integral over the bin),    R(L) = sum over n >= 1 of p(charge | n) L^(n-1) / (n-1)!,

where p(. | n) is the n-fold convolution of the charge of one photo-electron on the simulator's grid. Suffix: V pulses
that may hold several.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from iceaggr.sim import hits
from iceaggr.sim.config import SimConfig

MOST_STEPS = 6 * hits.CHARGE_STEPS
"""Up to this charge (in steps) the photo-electrons of a pulse are summed over ..."""
_COUNTS = 14
"""... one to this many."""


def mean_charge(config: SimConfig) -> float:
    """Mean charge of one photo-electron, p.e."""
    (share_a, share_b), (width_a, width_b) = config.spe_fractions, config.spe_widths
    return share_a * width_a + share_b * width_b + (1 - share_a - share_b) * config.spe_mean


def dispersion(config: SimConfig) -> float:
    """Variance of the charge of a Poisson number of photo-electrons over that of the number, in units of the mean
    charge: E[q^2] / E[q]^2."""
    (share_a, share_b), (width_a, width_b) = config.spe_fractions, config.spe_widths
    gauss = config.spe_mean**2 + config.spe_sigma**2
    square = 2 * share_a * width_a**2 + 2 * share_b * width_b**2 + (1 - share_a - share_b) * gauss
    return square / mean_charge(config) ** 2


def log_counts(amount_V: Tensor, steps_V: Tensor, config: SimConfig) -> tuple[Tensor, Tensor]:
    """(ln R, d ln R / d ln L) up to a constant of each pulse; the second is the mean number of further photo-electrons.

    steps_V: charge in steps of 1/40 p.e., at most MOST_STEPS.
    """
    table = _table(config, amount_V.device)
    number = torch.arange(_COUNTS, device=amount_V.device, dtype=amount_V.dtype)
    terms_VN = table[steps_V] + number * amount_V.clamp(min=1e-30).log()[:, None]
    log_V = torch.logsumexp(terms_VN, dim=1)
    return log_V, ((terms_VN - log_V[:, None]).exp() * number).sum(1)


@lru_cache(maxsize=4)
def _table(config: SimConfig, device: torch.device) -> Tensor:
    """(steps, n) ln of p(charge | n + 1) / n!."""
    one = charge_law(config)
    rows, law = [], one
    for _ in range(_COUNTS):
        rows.append(law[: MOST_STEPS + 1])
        law = np.convolve(law, one)[: MOST_STEPS + 1]
    log = np.log(np.maximum(np.stack(rows, axis=1), 1e-300))
    log -= np.array([math.lgamma(n + 1) for n in range(_COUNTS)])
    return torch.from_numpy(log).to(device)


def charge_law(config: SimConfig) -> np.ndarray:
    """Probability of each charge (steps) of one photo-electron: `iceaggr.sim.photons.charge` on the grid."""
    edge = (np.arange(MOST_STEPS + 2) - 0.5).clip(min=0) / hits.CHARGE_STEPS
    (share_a, share_b), (width_a, width_b) = config.spe_fractions, config.spe_widths
    root = config.spe_sigma * math.sqrt(2)
    erf = np.vectorize(math.erf)
    folded = (erf((edge - config.spe_mean) / root) + erf((edge + config.spe_mean) / root)) / 2
    below = share_a * -np.expm1(-edge / width_a) + share_b * -np.expm1(-edge / width_b)
    law = np.diff(below + (1 - share_a - share_b) * folded)
    law[1] += law[0]  # the grid starts at one step
    law[0] = 0.0
    return law
