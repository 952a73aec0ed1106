"""What number theory predicts for zeta zeros at finite height, to be drawn beside what is measured.

T is a height, D = log(T / 2 pi) / (2 pi) the density of zeros there, q = p^r a prime power. Everything starts from the
explicit formula: the density of zeros is D minus (1 / pi) sum_q (log p / sqrt(q)) cos(t log q).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rh_memory.linear import prime_powers

Floats = NDArray[np.float64]


def zeta_line(epsilon: Floats, terms: int = 60) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
    """zeta(1 + i e) and the second derivative of log zeta there, for |e| > 0 up to about 100.

    Euler-Maclaurin at N = 60 with 6 Bernoulli terms; derivatives with respect to s taken term by term.
    """
    s = 1 + 1j * np.asarray(epsilon, dtype=np.float64)[..., None]
    n = np.arange(1, terms, dtype=np.float64)
    log_n, log_big = np.log(n), math.log(terms)
    powers = np.exp(-s * log_n)
    # Value and first two derivatives of each piece.
    value = [(powers * (-log_n) ** k).sum(-1) for k in range(3)]
    s = s[..., 0]
    big = np.exp(-s * log_big)
    head = terms * big / (s - 1)
    log_slope, log_curve = -log_big - 1 / (s - 1), 1 / (s - 1) ** 2
    value[0] += head + big / 2
    value[1] += head * log_slope - log_big * big / 2
    value[2] += head * (log_slope**2 + log_curve) + log_big**2 * big / 2
    rising, slope, curve = s.copy(), 1 / s, -1 / s**2
    bernoulli = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730)
    for k, b in enumerate(bernoulli, start=1):
        term = b / math.factorial(2 * k) * rising * big * terms ** (1.0 - 2 * k)
        value[0] += term
        value[1] += term * (slope - log_big)
        value[2] += term * ((slope - log_big) ** 2 + curve)
        for step in (2 * k - 1, 2 * k):
            rising, slope, curve = rising * (s + step), slope + 1 / (s + step), curve - 1 / (s + step) ** 2
    ratio = value[1] / value[0]
    return value[0], value[2] / value[0] - ratio**2


def pair_correlation(epsilon: Floats, height: float, primes: int = 2000) -> Floats:
    """Pair correlation of zeros at distance e (not unfolded) near `height`, over D^2: 1 for independent zeros.

    Sum of the diagonal term (1/2 pi^2) Re[(log zeta)''(1 + ie) - sum_p (log p / (p^{1+ie} - 1))^2], which dips where e
    is the height of a low zero, and the oscillating (1/2 pi^2) |zeta(1+ie)|^2 Re[e^{2 pi i D e} prod_p (1 - ((p^{ie} -
    1) / (p - 1))^2)]. Source: Bogomolny and Keating, Phys. Rev. Lett. 77 (1996) 1472.
    """
    density = math.log(height / (2 * math.pi)) / (2 * math.pi)
    e = np.asarray(epsilon, dtype=np.float64)
    zeta, curvature = zeta_line(e)
    p = np.array([q for q, _, r in prime_powers(primes) if r == 1], dtype=np.float64)
    turn = np.exp(1j * e[..., None] * np.log(p))
    diagonal = curvature - ((np.log(p) / (p * turn - 1)) ** 2).sum(-1)
    product = np.prod(1 - ((turn - 1) / (p - 1)) ** 2, axis=-1)
    oscillating = np.abs(zeta) ** 2 * np.exp(2j * math.pi * density * e) * product
    return 1 + (diagonal + oscillating).real / (2 * math.pi**2 * density**2)


def number_variance(length: Floats, height: float) -> Floats:
    """Variance of the number of zeros in L mean gaps near `height`: GUE's logarithm at first, then saturation.

    Sigma^2(L) = L - 2 int_0^L (L - r) (1 - R_2(r)) dr with R_2 = `pair_correlation`, by Gauss-Legendre on panels of at
    most half a gap; up to L of about 100 densities. Its leading order is Berry's formula (Nonlinearity 1 (1988) 399,
    eq. 19), which with his cut of 1/4 is off by up to 3 % at T = 1e6, many standard errors of two million zeros.
    """
    L = np.asarray(length, dtype=np.float64)
    density = math.log(height / (2 * math.pi)) / (2 * math.pi)
    edges = np.unique(np.concatenate([np.arange(0, L.max(), 0.5), L.ravel()]))
    x, weight = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges)[:, None] / 2
    r = edges[:-1, None] + half * (1 + x)
    lacking = half * weight * (1 - pair_correlation(r / density, height))
    mass, moment = (np.concatenate([[0.0], np.cumsum(part.sum(1))]) for part in (lacking, r * lacking))
    at = np.searchsorted(edges, L)
    return np.asarray(L - 2 * (L * mass[at] - moment[at]))


def saturation_length(height: float) -> float:
    """L* = log(T / 2 pi) / log 2: longer intervals hold whole periods of every prime's line."""
    return math.log(height / (2 * math.pi)) / math.log(2)


def line_amplitude(q: int, r: int, height: float) -> float:
    """Amplitude of cos(m log q) in the unfolded gap whose middle, in t, is m: (2 / (pi r sqrt q)) sin(D^-1 log q / 2).

    From s = 1 - S(gamma_{n+1}) + S(gamma_n) with S(t) = -(1 / pi) sum_q sin(t log q) / (r sqrt q), the gap in t taken
    as its mean 1 / D.
    """
    mean_gap = 2 * math.pi / math.log(height / (2 * math.pi))
    return 2 / (math.pi * r * math.sqrt(q)) * math.sin(mean_gap * math.log(q) / 2)
