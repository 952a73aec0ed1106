"""Hardy's Z(t) = e^{i theta(t)} zeta(1/2 + it) on many short blocks at once, as one complex matrix product.

In a block of centre c, with d = t - c, the Riemann-Siegel formula reads

    Z(c + d) = 2 Re e^{i theta(c + d)} sum_{n <= m} n^{-1/2} e^{-i c log n} e^{-i d log n} + R(c + d),

m = floor(sqrt(c / 2 pi)) for the whole block (R is entire in t for a fixed m). The sum is a product of a matrix over
(block, n) and one over (n, d), where d runs over Chebyshev nodes shared by all blocks. Z oscillates no faster than
theta'(t) = log(t / 2 pi) / 2, so about that times the block's half-width, plus a margin, is enough nodes.
Below LOW the sum over n < N of Euler and Maclaurin takes its place, with the same matrices.

Gabcke (1979), "Neue Herleitung und explizite Restabschaetzung der Riemann-Siegel-Formel": R and its coefficients.

Shape suffixes: B blocks, M terms, K nodes of a block, F few nodes for smooth functions, J powers.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from rh_memory.zeros.layout import Layout, terms_at, unit
from rh_memory.zeros.theta import pi_decimal, stirling_tail, theta, theta_at, turns

_BERNOULLI_TERMS = 24


class Blocks:
    """Consecutive blocks on a device: integer-valued centres below MAX_HEIGHT, and theta there (unused below LOW)."""

    def __init__(self, centres: np.ndarray, device: torch.device) -> None:
        self.centre = torch.tensor(centres, device=device)
        self.phase, self.slope_high, self.slope_low = (torch.tensor(x, device=device) for x in theta_at(centres))
        self.most_terms = terms_at(float(centres[-1]))


def hardy_z(blocks: Blocks, shared: Layout) -> Tensor:
    """Z (B, K) at the nodes of each block."""
    if shared.euler_maclaurin:
        return _euler_maclaurin(blocks.centre, shared)
    centre = blocks.centre[:, None]
    terms_B = torch.floor(torch.sqrt(blocks.centre / (2 * math.pi)))
    sum_BK = shared.main_sum(blocks.centre, terms_B, blocks.most_terms)
    linear = turns(shared.node_K, blocks.slope_high[:, None], blocks.slope_low[:, None])
    t = centre + shared.node_K
    rest = ((t * torch.log1p(shared.node_K / centre) - shared.node_K) / 2 + stirling_tail(t)) / (2 * math.pi)
    angle = 2 * math.pi * (blocks.phase[:, None] + linear + rest)
    z = 2 * (torch.cos(angle) * sum_BK.real - torch.sin(angle) * sum_BK.imag)
    return z.addmm_(_remainder(centre + shared.few_F, terms_B[:, None]), shared.few_to_nodes_FK)


def _remainder(t: Tensor, m: Tensor) -> Tensor:
    """R(t) = (-1)^{m-1} a^{-1/2} sum_{k=0}^4 C_k(a - m) a^{-k}, a = sqrt(t / 2 pi)."""
    a = torch.sqrt(t / (2 * math.pi))
    z = a - m - 0.5
    square = z * z
    total = torch.zeros_like(t)
    for k in reversed(range(5)):
        polynomial = torch.zeros_like(t)
        for coefficient in reversed(remainder_coefficients()[k]):
            polynomial = polynomial * square + coefficient
        total = total / a + (polynomial * z if k % 2 else polynomial)
    return total * (2 * (m % 2) - 1) / torch.sqrt(a)


@cache
def remainder_coefficients(powers: int = 24) -> list[list[float]]:
    """C_0..C_4 as series in z = p - 1/2: even ones in z^0, z^2, ..., odd ones in z^1, z^3, ...

    From Psi(p) = cos(2 pi (p^2 - p - 1/16)) / cos(2 pi p) = -cos(2 pi z^2 - 5 pi / 8) / cos(2 pi z), whose series is a
    quotient of two known ones; the digits that the division loses are paid for in advance.
    """
    with localcontext() as context:
        context.prec = 100
        pi = pi_decimal()
        sin, cos = (2 + Decimal(2).sqrt()).sqrt() / 2, -(2 - Decimal(2).sqrt()).sqrt() / 2  # of 5 pi / 8
        count = powers + 8
        x = 2 * pi
        numerator = [Decimal(0)] * count  # of z^{2j}: cos(x z^2) cos + sin(x z^2) sin, negated
        denominator = [Decimal(0)] * count
        for j in range(count):
            if j % 2 == 0:
                numerator[j] = -cos * (-1) ** (j // 2) * x**j / math.factorial(j)
            else:
                numerator[j] = -sin * (-1) ** (j // 2) * x**j / math.factorial(j)
            denominator[j] = (-1) ** j * x ** (2 * j) / math.factorial(2 * j)
        psi: list[Decimal] = []
        for j in range(count):
            psi.append(numerator[j] - sum((denominator[j - i] * psi[i] for i in range(j)), Decimal(0)))

        def derivative(order: int, scale: Decimal) -> list[Decimal]:
            """scale * Psi^(order): coefficients of z^{order % 2}, z^{order % 2 + 2}, ..."""
            start = (order + order % 2) // 2
            return [
                scale * psi[j] * (math.factorial(2 * j) // math.factorial(2 * j - order))
                for j in range(start, start + powers)
            ]

        one = Decimal(1)
        formulas = [
            [(0, one)],
            [(3, -one / (96 * pi**2))],
            [(2, one / (64 * pi**2)), (6, one / (18432 * pi**4))],
            [(1, -one / (64 * pi**2)), (5, -one / (3840 * pi**4)), (9, -one / (5308416 * pi**6))],
            [
                (0, one / (128 * pi**2)),
                (4, 19 * one / (24576 * pi**4)),
                (8, 11 * one / (5898240 * pi**6)),
                (12, one / (2038431744 * pi**8)),
            ],
        ]
        return [
            [float(sum(column)) for column in zip(*(derivative(order, s) for order, s in formula), strict=True)]
            for formula in formulas
        ]


def _euler_maclaurin(centre_B: Tensor, shared: Layout) -> Tensor:
    """Z (B, K) for 7 < t < LOW + 32, with N terms and s = 1/2 + it:

    zeta(s) = sum_{n<N} n^-s + N^-s / 2 + N^{1-s} / (s-1) + sum_k B_2k / (2k)! s (s+1) .. (s+2k-2) N^{1-s-2k}.
    """
    main_sum, t = shared.main_sum, centre_B[:, None] + shared.node_K
    count = len(main_sum.n)
    terms_B = torch.full_like(centre_B, count - 1)
    sum_BK = main_sum(centre_B, terms_B, count)
    s = torch.complex(torch.full_like(t, 0.5), t)
    tail = count / (s - 1) + 0.5
    factor = s / count
    for k, bernoulli in enumerate(_bernoulli_over_factorial(), start=1):
        tail = tail + bernoulli * factor
        factor = factor * (s + (2 * k - 1)) * (s + 2 * k) / count**2
    last = unit(-turns(centre_B[:, None], main_sum.high[-1:], main_sum.low[-1:])) * main_sum.node_MK[-1]
    # Z is real for the exact theta, so an error in it acts only to second order.
    angle = theta(t)
    return (torch.complex(torch.cos(angle), torch.sin(angle)) * (sum_BK + last * tail / math.sqrt(count))).real


@cache
def _bernoulli_over_factorial() -> list[float]:
    """B_2k / (2k)! for k = 1.._BERNOULLI_TERMS, from the series of x / (e^x - 1)."""
    series = [Fraction(1)]
    for n in range(1, 2 * _BERNOULLI_TERMS + 1):
        series.append(-sum((b / math.factorial(n + 1 - j) for j, b in enumerate(series)), Fraction(0)))
    return [float(b) for b in series[2::2]]
