"""Chebyshev matrices for bandlimited functions: nodes, the change from values to short local series, evaluation.

Shape suffixes: K nodes of a block, D coefficients of a piece, N points, P pieces of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rh_memory.zeros.theta import turns


def terms(bandwidth: float, tail: float = 1e-17) -> int:
    """How many Chebyshev terms hold exp(i bandwidth x) on [-1, 1] up to `tail`.

    The smallest k > bandwidth with J_k(bandwidth) < tail by Debye's asymptotics: exp(-k (a - tanh a)), k = bandwidth
    cosh a.
    """
    k = math.ceil(bandwidth) + 1
    while True:
        a = math.acosh(k / bandwidth)
        if k * (a - math.tanh(a)) > -math.log(tail):
            return k
        k += 1


def nodes(count: int) -> Tensor:
    """The zeros of T_count, ascending, (count,) float64."""
    return -torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)


def basis(x_N: Tensor, count: int) -> Tensor:
    """T_0..T_{count-1} at points of [-1, 1]: (N, count)."""
    angle = torch.arccos(x_N) / (2 * math.pi)
    high = torch.round(angle * 2.0**25) / 2.0**25
    # k * angle would lose log2(k) bits.
    return torch.cos(
        2 * math.pi * turns(torch.arange(count, dtype=torch.float64), high[:, None], (angle - high)[:, None])
    )


def values_to_series(count: int) -> Tensor:
    """(K, K): row vectors of values at `nodes(count)` to the coefficients of their Chebyshev series."""
    j = torch.arange(count)
    # Angles as integers over 4 count, so that large multiples of them keep all digits.
    cosine = torch.cos(2 * math.pi * ((2 * (count - 1 - j[:, None]) + 1) * j % (4 * count)).double() / (4 * count))
    weights = torch.full((count,), 2.0 / count, dtype=torch.float64)
    weights[0] /= 2
    return cosine * weights


def values_to_pieces(count: int, centre_P: Tensor, radius: float, degree: int) -> Tensor:
    """(K, P*D): values at `nodes(count)` to Chebyshev series of `degree` terms around each centre_P +- radius."""
    points = (centre_P[:, None] + radius * nodes(degree)).reshape(-1)
    at_local_nodes = basis(points, count) @ values_to_series(count).T  # (P*D, K)
    local = at_local_nodes.reshape(len(centre_P), degree, count)
    return torch.einsum("pdk,dc->kpc", local, values_to_series(degree)).reshape(count, -1).contiguous()


def derivative(count: int) -> Tensor:
    """(D, D): row vectors of Chebyshev coefficients to those of the derivative."""
    k, j = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(count, dtype=torch.float64)
    matrix = torch.where((j < k) & ((k - j) % 2 == 1), 2 * k, torch.zeros(()).double())
    matrix[:, 0] /= 2
    return matrix


def evaluate(series_DN: Tensor, x_N: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative (N,) of N series, each at its own point, by Clenshaw's recurrence."""
    twice = 2 * x_N
    b1, b2, e1, e2 = series_DN[-1], torch.zeros_like(x_N), torch.zeros_like(x_N), torch.zeros_like(x_N)
    for k in range(len(series_DN) - 2, 0, -1):
        # e is half of the derivative of b.
        e1, e2 = torch.sub(b1, e2).addcmul_(twice, e1), e1
        b1, b2 = torch.sub(series_DN[k], b2).addcmul_(twice, b1), b1
    value = torch.sub(series_DN[0], b2).addcmul_(x_N, b1)
    slope = b1 + 2 * (x_N * e1 - e2)
    return value, slope
