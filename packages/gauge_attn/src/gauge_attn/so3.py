"""Rotations: generators, the matrices D^l(phi) of every irrep, positions as rotations.

phi (..., 3) is a rotation vector in radians: by the angle |phi| around phi / |phi|, components x, y, z. The basis of
each irrep is e3nn's: real spherical harmonics with the polar axis y, ordered m = -l..l, which for l=1 is x, y, z. So
D^1(phi) is the rotation matrix itself and exp(phi . X) = D^l(phi) with X = `generators(l)`, [X_x, X_y] = X_z.

Shape suffixes: d = 2l+1.
"""

from __future__ import annotations

from functools import cache
from math import factorial, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gauge_attn.irreps import Irreps
from gauge_attn.tables import table

_SMALL_ANGLE_SQUARED = 1e-2
"""Below this |phi|^2 the Taylor series replaces the quotients: six terms are exact to 1e-17 there."""
_SERIES_TERMS = 6
_SQUARED_UPTO = 2
"""Up to this l, D^{l+1} is one product with the coupling's square; above, two with the coupling take less work."""


def generators(l: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """(3, d, d): the skew matrices X_x, X_y, X_z of the irrep l, built in float64 and then cast.

    -sum_a X_a^2 = l(l+1) and [X_a, X_b] = X_c for cyclic a, b, c.
    """
    return torch.tensor(_generators(l), dtype=dtype, device=device)


def rotation(phi_3: Tensor) -> Tensor:
    """R(phi) = cos t I + sin(t)/t K + (1 - cos t)/t^2 phi phi^T, t = |phi|, K = phi x; (..., 3) to (..., 3, 3).

    Smooth at phi = 0, with every derivative; any angle.
    """
    return frames(phi_3, 1)


def frames_upto(phi_3: Tensor, lmax: int) -> list[Tensor]:
    """[D^0, ..., D^lmax], each (..., d, d), in phi's dtype (float32 at least).

    D^1 is Rodrigues' formula; D^{l+1} = C (D^l x D^1) C^T with the isometry C onto the top irrep of l x 1. Every
    step is a product of orthogonal matrices, so errors add up and do not multiply, at any angle: all in float64,
    then rounded. (exp(phi . X) by scaling and squaring is the test's reference.)

    Raises ValueError when phi's last dimension is not 3.
    """
    return unpack(packed_frames(phi_3, lmax), lmax)


def packed_frames(phi_3: Tensor, lmax: int) -> Tensor:
    """D^1, ..., D^lmax flattened side by side, (..., sum of (2l+1)^2), so that tokens can look them up at once."""
    if phi_3.size(-1) != 3:
        raise ValueError(f"phi has three components x, y, z in its last dimension, got shape {tuple(phi_3.shape)}")
    dtype = torch.promote_types(phi_3.dtype, torch.float32)
    if lmax == 0:
        return phi_3.new_empty(*phi_3.shape[:-1], 0, dtype=dtype)
    with torch.autocast(phi_3.device.type, enabled=False):
        wide = phi_3.to(torch.float64)
        series = table("series", _series, 0, wide)
        couplings = [
            table("coupling", _coupling, l, wide) if l > _SQUARED_UPTO else table("squared", _coupling_squared, l, wide)
            for l in range(1, lmax)
        ]
        moves = [table("generators", _generators_flat, l, wide) for l in range(1, lmax + 1)]
        packed: Tensor = _Frames.apply(wide, lmax, series, *couplings, *moves)
        return packed.to(dtype)


def unpack(packed: Tensor, lmax: int) -> list[Tensor]:
    """[D^0, ..., D^lmax] from `packed_frames`."""
    every = [packed.new_ones(*packed.shape[:-1], 1, 1)]
    begin = 0
    for l in range(1, lmax + 1):
        d = 2 * l + 1
        every.append(packed[..., begin : begin + d * d].unflatten(-1, (d, d)).contiguous())
        begin += d * d
    return every


class _Frames(torch.autograd.Function):
    """D(phi) with its derivative in closed form, which is a few products instead of the recursion backwards.

    D^l(phi + e) = D^l(phi) exp((J e) . X) to first order with J = I - b K + c K^2, K = phi x, b = (1 - cos t)/t^2 and
    c = (t - sin t)/t^3. So a gradient G^l of D^l is one of phi by J^T w, w_a = sum_l <G^l, D^l X_a>.
    """

    @staticmethod
    def forward(ctx: Any, phi_3: Tensor, lmax: int, series: Tensor, *tables: Tensor) -> Tensor:
        couplings, moves = tables[: lmax - 1], tables[lmax - 1 :]
        square = phi_3.square().sum(-1, keepdim=True)
        coefficients = _coefficients(square, series)
        a, b, _ = coefficients.unsqueeze(-1).split(1, -2)
        # phi x is phi . X of l = 1.
        cross = (phi_3 @ moves[0].mT).unflatten(-1, (3, 3))
        outer = phi_3.unsqueeze(-1) * phi_3.unsqueeze(-2)
        identity = torch.eye(3, dtype=phi_3.dtype, device=phi_3.device)
        first = (1 - b * square.unsqueeze(-1)) * identity + a * cross + b * outer
        nine = first.flatten(-2)
        frame, parts = first, [nine]
        for l, coupling in enumerate(couplings, 1):
            d = 2 * l + 1
            if l <= _SQUARED_UPTO:
                product = frame.reshape(*phi_3.shape[:-1], d * d, 1) * nine.unsqueeze(-2)
                frame = (product.flatten(-2) @ coupling).unflatten(-1, (d + 2, d + 2))
            else:
                product = frame[..., :, None, :, None] * first[..., None, :, None, :]
                half = product.reshape(*phi_3.shape[:-1], 3 * d, 3 * d) @ coupling.mT
                frame = (half.mT @ coupling.mT).mT
            parts.append(frame.flatten(-2))
        packed = torch.cat(parts, -1)
        ctx.lmax = lmax
        ctx.save_for_backward(phi_3, packed, coefficients, series, *moves)
        return packed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        phi_3, packed, coefficients, series, *moves = ctx.saved_tensors
        total: Tensor | None = None
        for g, frame, move in zip(unpack(grad, ctx.lmax)[1:], unpack(packed, ctx.lmax)[1:], moves, strict=True):
            part = (frame.mT @ g).flatten(-2) @ move
            total = part if total is None else total + part
        assert total is not None
        if torch.is_grad_enabled():  # for second derivatives they are functions of phi
            coefficients = _coefficients(phi_3.square().sum(-1, keepdim=True), series)
        _, b, c = coefficients.split(1, -1)
        once = torch.linalg.cross(phi_3, total)
        result = total + b * once + c * torch.linalg.cross(phi_3, once)
        return (result, None, None, *[None] * (2 * ctx.lmax - 1))


def frames(phi_3: Tensor, l: int) -> Tensor:
    """D^l(phi), (..., d, d); see `frames_upto`."""
    return frames_upto(phi_3, l)[l]


def frames_for(irreps: Irreps, phi_3: Tensor) -> dict[int, Tensor]:
    """{l: D^l(phi)} for the l that occur in `irreps`; phi (B, N, 3) gives (B, N, d, d)."""
    every = frames_upto(phi_3, irreps.lmax)
    return {l: every[l] for l in irreps.ls}


def rope_frames(
    l: int, positions_N: Tensor, theta: float | Tensor, axis: tuple[float, float, float] = (0.0, 1.0, 0.0)
) -> Tensor:
    """Gauge RoPE: R(i) = D^l(i * theta * axis), (N, d, d), or (H, N, d, d) for theta (H,).

    theta: radians per position. With frames Omega_i R(i) the divergences depend on i - j only (if the beliefs do
    not). Around y it turns the pair of components (m, -m) at m * theta; l = 0 does not see positions. Angles are
    formed in float64, as in float32 position 10,000 would be off by 1e-3 rad; the result has theta's dtype,
    float32 for a number.
    """
    dtype = theta.dtype if isinstance(theta, Tensor) else torch.float32
    theta = torch.as_tensor(theta, dtype=torch.float64, device=positions_N.device)
    direction = torch.tensor(axis, dtype=torch.float64, device=positions_N.device)
    angles = theta[..., None] * positions_N.to(torch.float64)
    return frames(angles[..., None] * (direction / direction.norm()), l).to(dtype)


def compose(first_3: Tensor, second_3: Tensor) -> Tensor:
    """The rotation vector of R(first) R(second), |result| <= pi, by quaternions (exact; no BCH series)."""
    w1, v1 = _quaternion(first_3)
    w2, v2 = _quaternion(second_3)
    w = w1 * w2 - (v1 * v2).sum(-1, keepdim=True)
    v = w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)
    sign = torch.where(w < 0, -1.0, 1.0).to(w.dtype)
    w, v = sign * w, sign * v
    square = v.square().sum(-1, keepdim=True)
    small = square < 1e-12
    length = torch.where(small, torch.ones_like(square), square).sqrt()
    # 2 atan(|v|/w)/|v| for the angle; at |v| -> 0 it is 2 (w = 1) up to |v|^2.
    angle = v * torch.where(small, 2 + square / 3, 2 * torch.atan2(length, w) / length)
    return angle.to(torch.promote_types(first_3.dtype, second_3.dtype))


def _coefficients(square_1: Tensor, series: Tensor) -> Tensor:
    """[sin(t)/t, (1 - cos t)/t^2, (t - sin t)/t^3] of t^2 (..., 1), as (..., 3)."""
    small = square_1 < _SMALL_ANGLE_SQUARED
    # Where the series is used the quotient sees a harmless 1, or its gradient would be NaN times 0.
    safe = torch.where(small, torch.ones_like(square_1), square_1)
    t = safe.sqrt()
    sine = t.sin()
    quotients = torch.cat([sine / t, 2 * (t / 2).sin().square() / safe, (t - sine) / (t * safe)], -1)
    powers = torch.arange(_SERIES_TERMS, dtype=square_1.dtype, device=square_1.device)
    return torch.where(small, torch.where(small, square_1, 0.0).pow(powers) @ series, quotients)


def _series(_: int) -> np.ndarray:
    """(terms, 3): the coefficients of (t^2)^k in sin(t)/t, (1 - cos t)/t^2 and (t - sin t)/t^3."""
    return np.array([[(-1) ** k / factorial(2 * k + first) for first in (1, 2, 3)] for k in range(_SERIES_TERMS)])


def _quaternion(phi_3: Tensor) -> tuple[Tensor, Tensor]:
    """(cos(t/2), sin(t/2) phi/t), in float64"""
    phi_3 = phi_3.to(torch.float64)
    quarter = phi_3.square().sum(-1, keepdim=True) / 4
    sinc, versine, _ = _coefficients(quarter, table("series", _series, 0, quarter)).split(1, -1)
    return 1 - quarter * versine, sinc / 2 * phi_3


def _ladder(l: int) -> np.ndarray:
    """J_- in the basis |l, m>, m = -l..l: J_- |l, m> = sqrt(l(l+1) - m(m-1)) |l, m-1>."""
    m = np.arange(-l + 1, l + 1)
    return np.diag(np.sqrt(l * (l + 1) - m * (m - 1.0)), 1)


def _real_basis(l: int) -> np.ndarray:
    """Columns: the real harmonics (sin |m| alpha for m < 0, cos m alpha for m > 0) in the basis |l, m>, without the
    Condon-Shortley sign."""
    basis = np.zeros((2 * l + 1, 2 * l + 1), dtype=complex)
    basis[l, l] = 1
    for m in range(1, l + 1):
        sign = (-1) ** m
        basis[l + m, l + m], basis[l - m, l + m] = sign / sqrt(2), 1 / sqrt(2)
        basis[l + m, l - m], basis[l - m, l - m] = -1j * sign / sqrt(2), 1j / sqrt(2)
    return basis


@cache
def _generators(l: int) -> np.ndarray:
    """-i J in the real basis. The polar axis, z in the textbooks, is y here, so textbook (y, z, x) is (x, y, z)."""
    down, basis = _ladder(l), _real_basis(l)
    up = down.T
    j_x, j_y, j_z = (up + down) / 2, (up - down) / 2j, np.diag(np.arange(-l, l + 1.0))
    return np.stack([(basis.conj().T @ (-1j * j) @ basis).real for j in (j_y, j_z, j_x)])


@cache
def _coupling(l: int) -> np.ndarray:
    """(2l+3, 3(2l+1)): the isometry of l x 1 onto l+1 in the real bases.

    From the top state |l, l>|1, 1> downwards with J_-, which fixes every Clebsch-Gordan coefficient, then into the
    real bases; the real phase that is left over is common to all rows and cancels in D.
    """
    down = np.kron(_ladder(l), np.eye(3)) + np.kron(np.eye(2 * l + 1), _ladder(1))
    state = np.zeros(3 * (2 * l + 1))
    state[-1] = 1
    states = [state]
    for _ in range(2 * l + 2):
        state = down @ states[-1]
        states.append(state / np.linalg.norm(state))
    top = np.stack(states[::-1])  # rows |l+1, m>, m ascending
    return (_real_basis(l + 1).conj().T @ top @ np.kron(_real_basis(l), _real_basis(1))).real


@cache
def _coupling_squared(l: int) -> np.ndarray:
    """(9 (2l+1)^2, (2l+3)^2): D^l_ij R_km flattened to D^{l+1} flattened."""
    d = 2 * l + 1
    coupling = _coupling(l).reshape(d + 2, d, 3)
    return np.einsum("aik,bjm->ijkmab", coupling, coupling).reshape(9 * d * d, (d + 2) ** 2)


@cache
def _generators_flat(l: int) -> np.ndarray:
    """((2l+1)^2, 3): X_x, X_y, X_z flattened, as columns."""
    return _generators(l).reshape(3, -1).T
