"""Where on the sky a model believes a neutrino came from: mixtures of von Mises-Fisher distributions.

    p(x) = sum_k w_k C(kappa_k) exp(kappa_k mu_k . x),    C(kappa) = kappa / (2 pi (exp(kappa) - exp(-kappa)))

per steradian (Mardia & Jupp, Directional Statistics, 9.3). One component is the plain case; more than one says "here
or there". All float64. Shape suffixes: E events, K components, S points on the sky, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DEG2_PER_SR = (180 / np.pi) ** 2
_SMALLEST = 1e-8  # below this kappa the distribution is isotropic to double precision
_POINTS = 512
_BLOCK = 1 << 20  # points handled at a time


@dataclass(frozen=True)
class Mixture:
    """One distribution over the sky per event."""

    weight_EK: Array
    """Positive, each row sums to one."""
    vector_EK3: Array
    """kappa times the unit mean direction of each component."""

    def __post_init__(self) -> None:
        weight, vector = np.asarray(self.weight_EK, np.float64), np.asarray(self.vector_EK3, np.float64)
        if weight.ndim != 2 or vector.shape != (*weight.shape, 3):
            raise ValueError(f"weights {weight.shape} and vectors {vector.shape}; need (E, K) and (E, K, 3)")
        if not np.isfinite(vector).all() or not (weight >= 0).all() or not np.allclose(weight.sum(1), 1, atol=1e-5):
            raise ValueError("vectors must be finite and the weights of every event must be >= 0 and sum to one")
        object.__setattr__(self, "weight_EK", weight)
        object.__setattr__(self, "vector_EK3", vector)

    @classmethod
    def single(cls, v_E3: Array) -> Mixture:
        """One component per event: mean direction v / |v|, concentration |v|."""
        v_E3 = np.asarray(v_E3, dtype=np.float64)
        return cls(np.ones((len(v_E3), 1)), v_E3[:, None])

    @classmethod
    def of_output(cls, out_EC: Array) -> Mixture:
        """A model's answers: (E, 3) is one component, (E, 4 K) are K as `iceaggr.losses.mixture_parts` reads them."""
        out_EC = np.asarray(out_EC, dtype=np.float64)
        if out_EC.shape[1] == 3:
            return cls.single(out_EC)
        parts_EK4 = out_EC.reshape(len(out_EC), -1, 4)
        weight_EK = np.exp(parts_EK4[..., 3] - parts_EK4[..., 3].max(axis=1, keepdims=True))
        return cls(weight_EK / weight_EK.sum(axis=1, keepdims=True), parts_EK4[..., :3])

    def __len__(self) -> int:
        return len(self.weight_EK)

    def __getitem__(self, rows: Any) -> Mixture:
        """Some of the events: an index array, a mask or a slice."""
        return Mixture(self.weight_EK[rows], self.vector_EK3[rows])

    @property
    def kappa_EK(self) -> Array:
        return np.maximum(np.linalg.norm(self.vector_EK3, axis=-1), _SMALLEST)

    def tempered(self, temperature: float) -> Mixture:
        """Every kappa divided by the temperature: above 1 wider, below 1 narrower."""
        return Mixture(self.weight_EK, self.vector_EK3 / temperature)


def log_density(mixture: Mixture, x: Array) -> Array:
    """log p at unit vectors in nats per steradian: x (E, S, 3), each event's own points, or (S, 3) -> (E, S)."""
    kappa_EK = mixture.kappa_EK
    dot_ESK = np.asarray(x, dtype=np.float64) @ np.swapaxes(mixture.vector_EK3, 1, 2)
    with np.errstate(divide="ignore"):  # a weight of exactly 0 adds nothing
        offset_EK = np.log(mixture.weight_EK) + _log_peak(kappa_EK) - kappa_EK
    log_ESK = dot_ESK + offset_EK[:, None]
    top_ES = log_ESK.max(axis=-1)
    return top_ES + np.log(np.exp(log_ESK - top_ES[..., None]).sum(axis=-1))


def mean_direction(mixture: Mixture) -> Array:
    """Unit vectors (E, 3) along the mean of x: sum_k w_k (coth kappa_k - 1 / kappa_k) mu_k."""
    kappa_EK = mixture.kappa_EK
    # Langevin's function; its series below 0.01, where coth and 1 / kappa cancel
    length_EK = np.where(kappa_EK < 1e-2, kappa_EK / 3, 1 / np.tanh(kappa_EK) - 1 / kappa_EK)
    mean_E3 = ((mixture.weight_EK * length_EK / kappa_EK)[..., None] * mixture.vector_EK3).sum(axis=1)
    return mean_E3 / np.maximum(np.linalg.norm(mean_E3, axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def points(mixture: Mixture, n: int = _POINTS) -> Array:
    """(E, n, 3) points that follow each event's distribution, evenly spread and the same at every call.

    The three numbers of a point (component; cos psi by the inverse cumulative distribution, which is
    1 + log(u + (1 - u) exp(-2 kappa)) / kappa; turn about the mean) are the fractional parts of multiples of sqrt 2, of
    the golden ratio and of sqrt 3: expectations over the points err by about 1 / n, not 1 / sqrt(n).
    """
    step_3 = np.array([np.sqrt(2), (np.sqrt(5) - 1) / 2, np.sqrt(3)])
    u_3S = (0.5 + np.arange(n) * step_3[:, None]) % 1
    edges_EK = mixture.weight_EK.cumsum(axis=1)[:, :-1]
    component_ES = (u_3S[0] > edges_EK[..., None]).sum(axis=1)
    kappa_ES = np.take_along_axis(mixture.kappa_EK, component_ES, axis=1)
    cos_ES = np.clip(1 + np.log(u_3S[1] + (1 - u_3S[1]) * np.exp(-2 * kappa_ES)) / kappa_ES, -1, 1)
    sin_ES = np.sqrt(1 - cos_ES**2)
    turn_S = 2 * np.pi * u_3S[2]
    parts = (cos_ES, sin_ES * np.cos(turn_S), sin_ES * np.sin(turn_S))
    x_ES3 = np.zeros((*cos_ES.shape, 3))
    for part_ES, axis_EK3 in zip(parts, _frame(mixture.vector_EK3), strict=True):
        x_ES3 += part_ES[..., None] * np.take_along_axis(axis_EK3, component_ES[..., None], axis=1)
    return x_ES3


def log_outside(mixture: Mixture, x_E3: Array) -> Array:
    """log(1 - u) of `containment` for one component, exact also where u rounds to one. Raises ValueError for K > 1."""
    if mixture.weight_EK.shape[1] != 1:
        raise ValueError("log_outside is for one component; use containment")
    kappa_E, v_E3, x_E3 = mixture.kappa_EK[:, 0], mixture.vector_EK3[:, 0], np.asarray(x_E3, dtype=np.float64)
    mu_E3 = _unit(v_E3)
    # 1 - cos psi = |mu - x|^2 / 2, without the cancellation of two cosines near one
    away_E = np.clip(((mu_E3 - x_E3) ** 2).sum(axis=1) / 2, 0, 2 - 1e-15)
    return -kappa_E * away_E + np.log(np.expm1(-kappa_E * (2 - away_E)) / np.expm1(-2 * kappa_E))


def containment(mixture: Mixture, x_E3: Array, *, n: int = _POINTS) -> Array:
    """u (E,): the probability inside the smallest region of the sky that reaches each event's direction x.

    The region holds all points of higher density than x (highest posterior density). If the distributions are right, u
    of the true directions is uniform on 0..1. One component: u = (1 - exp(-kappa (1 - cos psi))) / (1 - exp(-2 kappa)).
    More: the share of `n` points of the distribution with a higher density, good to about 1 / n.
    """
    if mixture.weight_EK.shape[1] == 1:
        return -np.expm1(log_outside(mixture, x_E3))
    x_E3 = np.asarray(x_E3, dtype=np.float64)
    parts = []
    for at in range(0, len(mixture), max(1, _BLOCK // n)):
        rows = slice(at, at + max(1, _BLOCK // n))
        here_E1 = log_density(mixture[rows], x_E3[rows, None])
        there_ES = log_density(mixture[rows], points(mixture[rows], n))
        parts.append(((there_ES > here_E1).sum(axis=1) + 0.5) / (n + 1))
    return np.concatenate(parts) if parts else np.zeros(0)


def credible_regions(
    mixture: Mixture, levels: Sequence[float] = (0.5, 0.9), *, n: int = 32 * _POINTS
) -> tuple[Array, Array]:
    """(log_threshold_EL, area_EL): the smallest regions of these probabilities, {x: log p(x) >= threshold}.

    Areas in square degrees. One component: a cap with 1 - cos psi = -log(1 - level (1 - exp(-2 kappa))) / kappa. More:
    the threshold is the (1 - level) quantile of log p over `n` points of the distribution, the area the mean of
    1[log p >= threshold] / p over the same points: no grid, so as good for kappa = 1e6 as for 1.

    Raises ValueError for a level that is not between 0 and 1.
    """
    level_L = np.asarray(levels, dtype=np.float64)
    if not ((level_L > 0) & (level_L < 1)).all():
        raise ValueError(f"levels {list(levels)}; each must lie between 0 and 1")
    if mixture.weight_EK.shape[1] == 1:
        kappa_E1 = mixture.kappa_EK
        away_EL = -np.log1p(level_L * np.expm1(-2 * kappa_E1)) / kappa_E1
        return _log_peak(kappa_E1) - kappa_E1 * away_EL, 2 * np.pi * away_EL * DEG2_PER_SR
    thresholds, areas = [], []
    for at in range(0, len(mixture), max(1, _BLOCK // n)):
        some = mixture[at : at + max(1, _BLOCK // n)]
        log_ES = log_density(some, points(some, n))
        threshold_EL = np.quantile(log_ES, 1 - level_L, axis=1).T
        inside_ELS = log_ES[:, None] >= threshold_EL[..., None]
        areas.append(np.where(inside_ELS, np.exp(-log_ES)[:, None], 0.0).mean(axis=-1) * DEG2_PER_SR)
        thresholds.append(threshold_EL)
    return np.concatenate(thresholds), np.concatenate(areas)


def sphere_grid(n: int) -> Array:
    """(n, 3) unit vectors, each for the same 4 pi / n steradians: a Fibonacci spiral from the north to the south."""
    z_S = 1 - (2 * np.arange(n) + 1) / n
    turn_S = np.pi * (3 - np.sqrt(5)) * np.arange(n)
    return np.stack((np.sqrt(1 - z_S**2) * np.cos(turn_S), np.sqrt(1 - z_S**2) * np.sin(turn_S), z_S), axis=1)


def _log_peak(kappa: Array) -> Array:
    """log C(kappa) + kappa, the log density at the mean: finite where exp(kappa) is not."""
    return np.log(kappa / (2 * np.pi * -np.expm1(-2 * kappa)))


def _unit(v: Array) -> Array:
    """v / |v|, and straight up where v is zero: an isotropic distribution has no direction of its own."""
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.where(length > 0, v, (0.0, 0.0, 1.0)) / np.where(length > 0, length, 1.0)


def _frame(v: Array) -> tuple[Array, Array, Array]:
    """Three orthonormal vectors (..., 3) of which the first is along v."""
    mu = _unit(v)
    away = np.where(np.abs(mu[..., 2:]) < 0.9, (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
    a = _unit(np.cross(away, mu))
    return mu, a, np.cross(mu, a)
