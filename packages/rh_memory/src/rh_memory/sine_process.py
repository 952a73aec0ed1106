"""The sine process, the limit of GUE eigenvalues at unit density: gaps and joint gaps, exactly.

K(x, y) = sin(pi (x - y)) / (pi (x - y)). Everything below is one Fredholm determinant, discretised at Gauss-Legendre
nodes, where it converges exponentially (Bornemann, Math. Comp. 79 (2010) 871). Lengths are in mean gaps, entropies in
nats per gap.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

LONGEST = 8.0
"""Gaps are tabulated up to here; the probability of a longer one is below 1e-30."""


def janossy_log(points_BK: Tensor, nodes: int = 32) -> Tensor:
    """Log density that the process has points at x_1 < ... < x_K and nowhere else in [x_1, x_K].

    points_BK: (B, K) float64, ascending, K >= 2. Returns (B,). 32 nodes suffice up to a length of 12; from a length of
    about 10 on, float64 loses digits, since the smallest eigenvalue of 1 - K falls like exp(-pi length).

    The density is det(1 - K) det R(x_i, x_j) with the resolvent kernel R = K / (1 - K) on the interval; both factors
    together are the determinant of one bordered matrix.
    """
    x, weight = (torch.from_numpy(a).to(points_BK) for a in np.polynomial.legendre.leggauss(nodes))
    half_B1 = (points_BK[:, -1:] - points_BK[:, :1]) / 2
    node_BN = points_BK[:, :1] + half_B1 * (1 + x)
    root_BN = (half_B1 * weight).sqrt()
    every_BM = torch.cat([node_BN, points_BK], dim=1)
    scale_BM = torch.cat([root_BN, torch.ones_like(points_BK)], dim=1)
    matrix = torch.sinc(every_BM[:, :, None] - every_BM[:, None, :]) * scale_BM[:, :, None] * scale_BM[:, None, :]
    # [[1 - K, B], [-B', K]]: its determinant is det(1 - K) det(K + B' (1 - K)^-1 B).
    matrix[:, :nodes] *= -1
    matrix[:, :nodes, nodes:] *= -1
    matrix[:, nodes:, :nodes] *= -1
    matrix[:, range(nodes), range(nodes)] += 1
    return torch.linalg.slogdet(matrix).logabsdet


def gap_probability(length: np.ndarray, nodes: int = 40) -> np.ndarray:
    """E(s): the probability that an interval of length s holds no point; shape of `length`."""
    x, weight = np.polynomial.legendre.leggauss(nodes)
    s = np.asarray(length, dtype=np.float64)[..., None, None] / 2
    kernel = np.sinc(s * (x[:, None] - x)) * s * np.sqrt(weight[:, None] * weight)
    return np.linalg.det(np.eye(nodes) - kernel)


@cache
def _log_density_series() -> np.polynomial.Chebyshev:
    """log(p(s) / s^2) on [0, LONGEST], where it is smooth."""

    def log_ratio(s: np.ndarray) -> np.ndarray:
        points = torch.from_numpy(np.stack([np.zeros_like(s), s], axis=1))
        return janossy_log(points, nodes=40).numpy() - 2 * np.log(s)

    return np.polynomial.Chebyshev.interpolate(log_ratio, 48, domain=[0.0, LONGEST])


def gap_log_density(s: np.ndarray) -> np.ndarray:
    """log p(s) of the exact nearest-neighbour gap (Gaudin), 0 < s <= LONGEST; longer gaps count as LONGEST."""
    s = np.minimum(np.asarray(s, dtype=np.float64), LONGEST)
    return _log_density_series()(s) + 2 * np.log(s)


def surmise_log_density(s: np.ndarray) -> np.ndarray:
    """log of Wigner's surmise for GUE, p(s) = (32 / pi^2) s^2 exp(-4 s^2 / pi): the 2 x 2 matrix's gap."""
    s = np.asarray(s, dtype=np.float64)
    return math.log(32 / math.pi**2) + 2 * np.log(s) - 4 / math.pi * s**2


def surmise_entropy() -> float:
    """Differential entropy of Wigner's surmise in nats: s^2 (4 / pi) is Gamma(3/2), with E log = psi(3/2)."""
    psi = 2 - float(np.euler_gamma) - 2 * math.log(2)
    return -math.log(32 / math.pi**2) - (psi + math.log(math.pi / 4)) + 1.5


@cache
def gap_moments() -> dict[str, float]:
    """Mean, standard deviation and differential entropy (nats) of the exact gap."""
    x, weight = np.polynomial.legendre.leggauss(200)
    s, w = LONGEST / 2 * (1 + x), LONGEST / 2 * weight
    log_p = gap_log_density(s)
    p = w * np.exp(log_p)
    mean = float(p @ s)
    return {"mean": mean, "std": math.sqrt(float(p @ s**2) - mean**2), "entropy": float(-p @ log_p)}


def conditional_nll(gaps_BK: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """-log p(last gap | the K - 1 gaps before it) under the sine process: (B,), nats.

    gaps_BK: (B, K), K >= 1. The points at both ends of the known gaps are conditioned on, what lies outside is not.
    """
    points = np.cumsum(np.concatenate([np.zeros((len(gaps_BK), 1)), gaps_BK], axis=1, dtype=np.float64), axis=1)
    out = []
    nodes = 16 + (3 * gaps_BK.shape[1] + 1) // 2  # the length grows with the number of gaps
    for rows in torch.from_numpy(points).split(chunk):
        known = janossy_log(rows[:, :-1], nodes) if rows.shape[1] > 2 else 0.0
        out.append((known - janossy_log(rows, nodes)).numpy())
    return np.concatenate(out)


def number_variance(length: np.ndarray) -> np.ndarray:
    """Variance of the number of points in an interval of this length (GUE); shape of `length`.

    Sigma^2(L) = L - 2 int_0^L (L - r) sinc^2(r) dr, by Gauss-Legendre on unit panels.
    Closed form and use: Mehta, Random Matrices, 3rd ed., eq. 16.1.2.
    """
    out = []
    x, weight = np.polynomial.legendre.leggauss(12)
    for L in np.atleast_1d(np.asarray(length, dtype=np.float64)):
        edges = np.linspace(0, L, 2 + int(L))
        half = np.diff(edges)[:, None] / 2
        r = edges[:-1, None] + half * (1 + x)
        out.append(L - 2 * float((half * weight * (L - r) * np.sinc(r) ** 2).sum()))
    return np.array(out).reshape(np.shape(length))


def pair_correlation(r: np.ndarray) -> np.ndarray:
    """R_2(r) = 1 - sinc(r)^2 at unit density (Montgomery; Dyson)."""
    return 1 - np.sinc(np.asarray(r, dtype=np.float64)) ** 2
