"""Is a predicted kappa worth its word? What it promises, how often that holds, and one temperature that mends it.

numpy in and out, float64. `iceaggr.calibrate` fits and judges a run with these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.errors import UserError

from iceaggr.uncertainty import Array, Mixture, containment, log_density, mean_direction, points

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.68, 0.7, 0.8, 0.9, 0.95)
BINS = 10  # of confidence, for the calibration error
_FURTHEST = np.log(50.0)  # temperatures are sought between 1/50 and 50


def expected_angle_deg(kappa: np.ndarray | float) -> np.ndarray:
    """Mean opening angle under vMF(kappa) in degrees: pi (I0(k) - exp(-k)) / (2 sinh k); 90 at kappa = 0.

    By parts from the density k sin(psi) exp(k cos psi) / (2 sinh k) of psi (Mardia & Jupp, 9.3).
    """
    k = np.maximum(_checked(kappa), 1e-8)
    i0e = torch.special.i0e(torch.from_numpy(k)).numpy()
    return np.rad2deg(np.pi * (i0e - np.exp(-2 * k)) / -np.expm1(-2 * k))


def containment_deg(kappa: np.ndarray | float, probability: float) -> np.ndarray:
    """Angle in degrees that contains this share of vMF(kappa).

    1 - cos psi_p = -log(1 - p (1 - exp(-2k))) / k, the cumulative distribution solved for the angle.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"probability is {probability}; it must lie in [0, 1)")
    k = np.maximum(_checked(kappa), 1e-8)
    one_minus_cos = -np.log1p(probability * np.expm1(-2 * k)) / k
    return np.rad2deg(2 * np.arcsin(np.sqrt(np.clip(one_minus_cos / 2, 0, 1))))


def expected_error_deg(mixture: Mixture) -> Array:
    """(E,) mean angle to the mean direction that each distribution promises, degrees; several components by points."""
    if mixture.weight_EK.shape[1] == 1:
        return expected_angle_deg(mixture.kappa_EK[:, 0])
    parts = []
    for at in range(0, len(mixture), 1024):
        some = mixture[at : at + 1024]
        cosine_ES = (points(some, 512) * mean_direction(some)[:, None]).sum(axis=-1)
        parts.append(np.rad2deg(np.arccos(np.clip(cosine_ES, -1, 1))).mean(axis=1))
    return np.concatenate(parts)


class Levels(NamedTuple):
    """Which nominal probability a region must have to hold 0, 1, .. 100% of the events, by confidence.

    One temperature cannot mend distributions of the wrong shape, or too narrow here and too wide there; asking for
    another level can. To cover 90% of the events of confidence bin b, draw the region of nominal[b, 90].
    """

    edges: Array
    """(B - 1,) inner bin edges in `sharpness`."""
    nominal: Array
    """(B, 101), each row rising from 0 to 1."""

    @classmethod
    def fit(cls, mixture: Mixture, true_E3: Array) -> Levels:
        """Quantiles of u in up to ten equally filled bins of confidence, of 300 events or more each."""
        confidence_E, u_E = sharpness(mixture), containment(mixture, true_E3)
        bins = max(1, min(BINS, len(mixture) // 300))
        edges = np.quantile(confidence_E, np.arange(1, bins) / bins)
        bin_E = np.searchsorted(edges, confidence_E, side="right")
        percent = np.linspace(0, 1, 101)
        rows = [u_E[bin_E == b] if (bin_E == b).any() else u_E for b in range(bins)]
        nominal = np.stack([np.quantile(u, percent) for u in rows])
        nominal[:, 0], nominal[:, -1] = 0, 1
        return cls(edges, nominal)

    def actual(self, u_E: Array, confidence_E: Array) -> Array:
        """(E,) share of events that regions of nominal probability u hold."""
        bin_E = np.searchsorted(self.edges, confidence_E, side="right")
        percent = np.linspace(0, 1, self.nominal.shape[1])
        out_E = np.empty(len(u_E))
        for b, nominal in enumerate(self.nominal):
            out_E[bin_E == b] = np.interp(u_E[bin_E == b], nominal, percent)
        return out_E

    def wanted(self, level: float, confidence: float) -> float:
        """The nominal probability of the region that holds this share of events of this confidence."""
        row = self.nominal[int(np.searchsorted(self.edges, confidence, side="right"))]
        return float(np.interp(level, np.linspace(0, 1, len(row)), row))


def pull(u_E: Array) -> Array:
    """Opening angle in units of its own sigma, r = sqrt(-2 log(1 - u)), u from `uncertainty.containment`.

    Calibrated distributions give the 2-D Rayleigh law r exp(-r^2 / 2), median 1.177, at any kappa and for mixtures; at
    large kappa r is the usual psi sqrt(kappa). At most 6.4, where 1 - u is lost in rounding.
    """
    return np.sqrt(-2 * np.log1p(-np.minimum(u_E, 1 - 1e-9)))


def mean_nll(mixture: Mixture, true_E3: Array) -> float:
    """Mean -log p of the true directions, nats per steradian; log 4 pi = 2.531 knows nothing."""
    return float(-log_density(mixture, true_E3[:, None]).mean())


def fit_temperature(mixture: Mixture, true_E3: Array) -> tuple[float, float]:
    """(T, standard error of log T): the T that makes the directions most likely under kappa / T.

    Golden-section search on log T. The error is the sandwich estimate sqrt(mean g^2 / n) / mean h with g, h the first
    and second derivative of each event's -log p, so that it holds for a model of the wrong shape too.

    Raises:
        UserError: no T between 1/50 and 50 is best: the lengths say nothing about the errors.
    """

    def nll_E(log_t: float) -> Array:
        return -log_density(mixture.tempered(float(np.exp(log_t))), true_E3[:, None])[:, 0]

    best = _golden(lambda log_t: float(nll_E(log_t).mean()), -_FURTHEST, _FURTHEST)
    if abs(best) > _FURTHEST - 0.01:
        raise UserError(
            f"the best temperature lies outside 1/{np.exp(_FURTHEST):.0f}..{np.exp(_FURTHEST):.0f}: kappa is no "
            "confidence here; train for longer, and with a vMF loss (optim.vmf_weight above 0)"
        )
    step = 0.02
    low_E, here_E, high_E = (nll_E(best + s) for s in (-step, 0.0, step))
    gradient_E, curvature = (high_E - low_E) / (2 * step), float((high_E - 2 * here_E + low_E).mean()) / step**2
    return float(np.exp(best)), float(np.sqrt((gradient_E**2).mean() / len(mixture)) / max(curvature, 1e-12))


def judge(
    mixture: Mixture, true_E3: Array, levels: Levels | None = None, *, n_fit: int | None = None
) -> dict[str, Any]:
    """How well the distributions describe the true directions, ready for JSON.

    levels: regions are those of the levels that really hold; nll, which no choice of levels changes, is `mean_nll`.
    coverage: for each level the share of events inside the smallest region of that probability, with its 95% Wilson
    interval. ece: |share - level| averaged over the levels 0.1 to 0.9 within ten equally filled bins of confidence;
    ece_if_calibrated is what chance alone gives at this number of events. ks: largest distance between the
    distribution of u and the diagonal; ks_critical is its 5% value. pull: median and share above 3, beside Rayleigh's.
    n_fit: events that the levels were fitted on; their noise is in both of chance's values, as in a comparison of two
    samples.
    """
    u_E = containment(mixture, true_E3)
    if levels is not None:
        u_E = levels.actual(u_E, sharpness(mixture))
    n, pull_E = len(u_E), pull(u_E)
    tenths = np.arange(1, 10) / 10
    bins = np.array_split(np.argsort(sharpness(mixture), kind="stable"), min(BINS, n))
    share_BL = np.array([(u_E[rows, None] <= tenths).mean(axis=0) for rows in bins])
    fitted, bin_fitted = (0.0, 0.0) if levels is None or n_fit is None else (1 / n_fit, len(levels.nominal) / n_fit)
    chance_BL = np.array([np.sqrt(2 / np.pi * tenths * (1 - tenths) * (1 / len(r) + bin_fitted)) for r in bins])
    sorted_E, steps_E = np.sort(u_E), np.arange(1, n + 1) / n
    return {
        "n": n,
        "nll": mean_nll(mixture, true_E3),
        "coverage": [
            {"level": level, **dict(zip(("share", "low", "high"), _wilson(int((u_E <= level).sum()), n), strict=True))}
            for level in LEVELS
        ],
        "ece": float(np.abs(share_BL - tenths).mean()),
        "ece_if_calibrated": float(chance_BL.mean()),
        "ks": float(np.maximum(np.abs(steps_E - sorted_E), np.abs(sorted_E - (steps_E - 1 / n))).max()),
        "ks_critical": float(1.358 * np.sqrt(1 / n + fitted)),
        "pull_median": float(np.median(pull_E)),
        "pull_median_rayleigh": float(np.sqrt(2 * np.log(2))),
        "pull_above_3": float((pull_E > 3).mean()),
        "pull_above_3_rayleigh": float(np.exp(-4.5)),
    }


def sharpness(mixture: Mixture) -> Array:
    """(E,) kappa, or for several components the weighted mean of their kappas: what confidence is ranked by."""
    return (mixture.weight_EK * mixture.kappa_EK).sum(axis=1)


def _wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """(share, low, high): Wilson's 95% interval of a proportion."""
    p, w = k / n, z * z / n
    middle, half = (p + w / 2) / (1 + w), z / (1 + w) * np.sqrt(p * (1 - p) / n + w / (4 * n))
    return p, float(middle - half), float(middle + half)


def _golden(f: Callable[[float], float], low: float, high: float, tolerance: float = 1e-4) -> float:
    """Where a function with one minimum between low and high has it."""
    ratio = (np.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = f(a), f(b)
    while high - low > tolerance:
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = f(b)
    return float((low + high) / 2)


def _checked(kappa: np.ndarray | float) -> np.ndarray:
    k = np.atleast_1d(np.asarray(kappa, dtype=np.float64))
    if not (np.isfinite(k) & (k >= 0)).all():
        raise ValueError("kappa must be finite and >= 0; pass the length of the output vector")
    return k
