"""The Riemann-Siegel theta function, and phases that stay exact at any height used here.

theta(t) = Im log Gamma(1/4 + it/2) - t/2 log pi is about 7e6 at t = 1e6: one float64 leaves it an error of 1e-9, and
zeros the same. Phases are therefore kept in turns (units of 2 pi), and a product with a large factor is split into a
part that is exact in float64, whose whole turns drop out, and a small rest. Nothing depends on a long double.

Logarithms that must be known beyond float64 come from the decimal module, at a few anchors; between anchors a series.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import torch
from torch import Tensor

MAX_HEIGHT = 2.0**26
"""Products of an integer centre below this with a `split` number are exact."""
_SPLIT = 2.0**25
_DIGITS = 100
_STIRLING = (1 / 48, 7 / 5760, 31 / 80640, 127 / 430080, 511 / 1216512)


def theta(t: Tensor) -> Tensor:
    """theta(t) in float64 by Stirling's series, t >= 7: relative error 2e-16, absolute 1e-10 near 7."""
    return t / 2 * torch.log(t / (2 * math.pi * math.e)) - math.pi / 8 + stirling_tail(t)


def stirling_tail(t: Tensor) -> Tensor:
    """1/(48 t) + 7/(5760 t^3) + ...: what t/2 log(t / 2 pi e) - pi/8 lacks of theta(t)."""
    inverse_square = 1 / (t * t)
    total = torch.zeros_like(t)
    for coefficient in reversed(_STIRLING):
        total = total * inverse_square + coefficient
    return total / t


def smooth_count(t: float) -> float:
    """theta(t)/pi + 1: the number of zeros below t but for S(t)."""
    return float(theta(torch.tensor(t, dtype=torch.float64))) / math.pi + 1


def height_of_count(count: float) -> float:
    """The t >= 8 where smooth_count(t) = count (8 if that lies below), by Newton's method."""
    t = 20.0 + 6.0 * count / max(1.0, math.log(count + 3) - 2)
    for _ in range(50):
        step = (smooth_count(t) - count) * 2 * math.pi / math.log(max(t, 8.0) / (2 * math.pi))
        t = max(8.0, t - step)
        if abs(step) < 1e-6 * t:
            break
    return t


def turns(a: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """a * (high + low) modulo 1, in [-1/2, 1/2], to about 1e-16 + 1e-16 |a low|.

    |a| < 64 in any shape, or integer-valued below MAX_HEIGHT; high a multiple of 2^-25 below 4.
    """
    coarse = torch.round(a * 2.0**20) / 2.0**20  # coarse * high has at most 53 bits
    exact = coarse * high
    return exact - torch.round(exact) + ((a - coarse) * high + a * low)


def split(values: list[Decimal]) -> tuple[np.ndarray, np.ndarray]:
    """(high, low): high a multiple of 2^-25, low the rest in float64."""
    high = np.array([round(float(v) * _SPLIT) / _SPLIT for v in values])
    low = np.array([float(v - Decimal(float(h))) for v, h in zip(values, high, strict=True)])
    return high, low


@cache
def pi_decimal() -> Decimal:
    """pi to 100 digits, by Machin's formula."""
    with localcontext() as context:
        context.prec = _DIGITS + 5
        return 4 * (4 * _arctan_inverse(5) - _arctan_inverse(239))


def _arctan_inverse(n: int) -> Decimal:
    """arctan(1/n) in the current decimal context."""
    total, power, k = Decimal(0), Decimal(1) / n, 0
    while power > Decimal(10) ** -(_DIGITS + 5):
        total += (-1) ** k * power / (2 * k + 1)
        power /= n * n
        k += 1
    return total


def log_turns(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(high, low) of log(n) / 2 pi for n = 1..count."""
    high, low = _log_table(max(2048, 1 << (count - 1).bit_length()))
    return high[:count], low[:count]


@cache
def _log_table(count: int) -> tuple[np.ndarray, np.ndarray]:
    logs = [Decimal(0)] * (count + 1)
    with localcontext() as context:
        context.prec = 34
        least_factor = _least_factors(count).tolist()
        for n in range(2, count + 1):
            p = least_factor[n]
            logs[n] = Decimal(n).ln() if p == n else logs[p] + logs[n // p]
        scale = 1 / (2 * pi_decimal())
        return split([x * scale for x in logs[1:]])


def _least_factors(count: int) -> np.ndarray:
    factors = np.arange(count + 1)
    for p in range(2, math.isqrt(count) + 1):
        if factors[p] == p:
            multiples = factors[p * p :: p]
            multiples[multiples == np.arange(p * p, count + 1, p)] = p
    return factors


def theta_at(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(phase, high, low), each (B,): for ascending integer-valued centres c from 800 to MAX_HEIGHT, in turns,

        theta(c + d) / 2 pi = phase + d (high + low) + ((c + d) log1p(d / c) - d) / 4 pi + stirling_tail(c + d) / 2 pi

    modulo 1, where high + low = log(c / 2 pi) / 4 pi. Everything linear in a large number is exact: the centres hang
    on anchors a, whose logarithms come from the decimal module, by theta's series in D = c - a.
    """
    anchor = _anchor_index(centres)
    first = np.flatnonzero(np.diff(anchor, prepend=-1))
    middle = centres[(first + np.append(first[1:], len(centres)) - 1) // 2]
    with localcontext() as context:
        context.prec = 34
        scale = 1 / (4 * pi_decimal())
        log_2pi = (2 * pi_decimal()).ln()
        slope = [(Decimal(int(a)).ln() - log_2pi) * scale for a in middle]
        value = [int(a) * (s - scale) for a, s in zip(middle, slope, strict=True)]
        base = np.array([float(v - v.to_integral_value()) for v in value]) - 1 / 16
    high, low = split(slope)
    a, high, low = middle[anchor], high[anchor], low[anchor]
    shift = centres - a
    exact = shift * high
    phase = base[anchor] + (exact - np.round(exact)) + (shift * low + a * _entropy_series(shift / a) / (4 * math.pi))
    return phase, high, low + np.log1p(shift / a) / (4 * math.pi)


def _anchor_index(centres: np.ndarray) -> np.ndarray:
    """Centres that share an anchor share an index: groups about 6 sqrt(c) wide, so that the series part of theta
    stays below a turn and its rounding below 1e-16."""
    index = np.floor(np.sqrt(centres) / 3).astype(np.int64)
    return np.unique(index, return_inverse=True)[1]


def _entropy_series(u: np.ndarray) -> np.ndarray:
    """(1 + u) log(1 + u) - u = sum_{k >= 2} (-u)^k / (k (k - 1)), for |u| < 0.13 (no cancellation near 0)."""
    total = np.zeros_like(u)
    for k in range(18, 1, -1):
        total = 1 / (k * (k - 1)) - u * total
    return u * u * total
