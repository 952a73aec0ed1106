"""Rotations: generators, the matrices D^l(phi) of every irrep, positions as rotations.

phi (..., 3) is a rotation vector in radians: by the angle |phi| around phi / |phi|, components x, y, z. The basis of
each irrep is e3nn's: real spherical harmonics with the polar axis y, ordered m = -l..l, which for l=1 is x, y, z. So
D^1(phi) is the rotation matrix itself and exp(phi . X) = D^l(phi) with X = `generators(l)`, [X_x, X_y] = X_z.

Shape suffixes: d = 2l+1.
"""

from __future__ import annotations

from functools import cache
from math import factorial, sqrt

import numpy as np
import torch
from torch import Tensor

from gauge_attn.irreps import Irreps

_TABLES: dict[str, Tensor] = {}
_SMALL_ANGLE_SQUARED = 1e-2
"""Below this |phi|^2 the Taylor series replaces the quotient: five terms are exact to 1e-17 there."""


def generators(l: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """(3, d, d): the skew matrices X_x, X_y, X_z of the irrep l, built in float64 and then cast.

    -sum_a X_a^2 = l(l+1) and [X_a, X_b] = X_c for cyclic a, b, c.
    """
    return torch.tensor(_generators(l), dtype=dtype, device=device)


def rotation(phi_3: Tensor) -> Tensor:
    """R(phi) = I + sinc(t) K + (1 - cos t)/t^2 K^2, t = |phi|, K = phi x (Rodrigues); (..., 3) to (..., 3, 3).

    Smooth at phi = 0, with every derivative; any angle.
    """
    x, y, z = phi_3.unbind(-1)
    square = x * x + y * y + z * z
    small = square < _SMALL_ANGLE_SQUARED
    # Where the series is used the quotient sees a harmless 1, or its gradient would be NaN times 0.
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    a = torch.where(small, _series(square, 1), angle.sin() / angle)
    b = torch.where(small, _series(square, 2), 2 * (angle / 2).sin().square() / angle.square())
    return torch.stack(
        [
            torch.stack([1 - b * (y * y + z * z), b * x * y - a * z, b * x * z + a * y], -1),
            torch.stack([b * x * y + a * z, 1 - b * (x * x + z * z), b * y * z - a * x], -1),
            torch.stack([b * x * z - a * y, b * y * z + a * x, 1 - b * (x * x + y * y)], -1),
        ],
        -2,
    )


def frames_upto(phi_3: Tensor, lmax: int) -> list[Tensor]:
    """[D^0, ..., D^lmax], each (..., d, d), in phi's dtype (float32 at least).

    D^1 is Rodrigues' formula; D^{l+1} = C (D^l x D^1) C^T with the isometry C onto the top irrep of l x 1. Every
    step is a product of orthogonal matrices, so errors add up and do not multiply, at any angle: in float32
    |D D^T - I| is 1e-6 at l = 9. (exp(phi . X) by scaling and squaring is the test's reference.)
    """
    if phi_3.size(-1) != 3:
        raise ValueError(f"phi has three components x, y, z in its last dimension, got shape {tuple(phi_3.shape)}")
    phi_3 = phi_3.to(torch.promote_types(phi_3.dtype, torch.float32))
    with torch.autocast(phi_3.device.type, enabled=False):
        frames = [torch.ones(*phi_3.shape[:-1], 1, 1, dtype=phi_3.dtype, device=phi_3.device)]
        if lmax >= 1:
            # In float64, elementwise: rounded angles would cost six times the orthogonality error at l = 9.
            frames.append(rotation(phi_3.to(torch.float64)).to(phi_3.dtype))
        for l in range(1, lmax):
            d = 2 * l + 1
            product = frames[l][..., :, None, :, None] * frames[1][..., None, :, None, :]
            product = product.reshape(*phi_3.shape[:-1], 3 * d, 3 * d)
            coupling = _coupling_table(l, phi_3)
            frames.append(matmul(coupling, matmul(product, coupling.mT)))
        return frames


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
    return v * torch.where(small, 2 + square / 3, 2 * torch.atan2(length, w) / length)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b without TF32, forward and backward, whatever the user's setting is, also inside torch.compile.

    On CUDA in float32 small matrices are multiplied and summed (one fused kernel when compiled), as only matrix
    products can be TF32; no global flag is touched.
    """
    if a.is_cuda and a.dtype == torch.float32:
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    return a @ b


def _series(square: Tensor, first: int) -> Tensor:
    """sum_k (-square)^k / (2k + first)!; first = 1 is sin(t)/t, first = 2 is (1 - cos t)/t^2."""
    total = torch.zeros_like(square)
    for k in reversed(range(6)):
        total = total * square + (-1) ** k / factorial(2 * k + first)
    return total


def _quaternion(phi_3: Tensor) -> tuple[Tensor, Tensor]:
    """(cos(t/2), sin(t/2) phi/t)"""
    square = phi_3.square().sum(-1, keepdim=True)
    small = square < _SMALL_ANGLE_SQUARED
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    half_sinc = torch.where(small, _series(square / 4, 1) / 2, (angle / 2).sin() / angle)
    # cos(t/2) = 1 - (t/2)^2/2! + ... = 1 - (t^2/4) (1 - cos s)/s^2 at s = t/2.
    cosine = torch.where(small, 1 - square / 4 * _series(square / 4, 2), (angle / 2).cos())
    return cosine, half_sinc * phi_3


def _coupling_table(l: int, like: Tensor) -> Tensor:
    """`_coupling(l)` on like's device and dtype. Kept, so that a compiled function finds it and uploads nothing."""
    key = f"{l} {like.dtype} {like.device}"
    if key not in _TABLES:
        _fill_table(key, l, like)
    return _TABLES[key]


def _fill(key: str, l: int, like: Tensor) -> None:
    with torch.inference_mode(False):  # an inference tensor could never be used in a backward pass again
        _TABLES[key] = torch.tensor(_coupling(l), dtype=like.dtype, device=like.device)


# This is torch.compiler.disable without importing dynamo (seconds) before it is needed.
_fill_table = torch._disable_dynamo(_fill)


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
