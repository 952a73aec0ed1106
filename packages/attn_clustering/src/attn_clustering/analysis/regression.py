"""Multinomial logistic regression for many probes at once, full batch, in float32.

Shape suffixes: G groups (layers) with features of their own, N rows, D features, P problems that share the features
(other labels, other penalties), K classes.

Every (group, problem) minimises  mean cross-entropy + l2 / 2 |W|^2  over W (D, K) and a free bias. This is
scikit-learn's LogisticRegression with C = 1 / (l2 N). All of them advance together: one matrix product with the
features serves all problems, and nothing is read back from the device but a convergence check every few iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

HISTORY = 8
CHECK_EVERY = 10
STEPS = (1.0, 0.3, 0.05)
"""Step lengths tried along each direction; the best is taken, none if all are worse than staying."""


class Fit(NamedTuple):
    """Linear classifiers on raw features: logits = x W + b."""

    weight_GDPK: Tensor
    bias_GPK: Tensor
    iterations: int
    gradient: float
    """Largest absolute entry of any problem's gradient at the end."""

    def logits(self, x_GND: Tensor) -> Tensor:
        """(G, N, P, K)."""
        g, d, p, k = self.weight_GDPK.shape
        return (x_GND @ self.weight_GDPK.reshape(g, d, p * k)).unflatten(-1, (p, k)) + self.bias_GPK[:, None]


def fit(
    x_GND: Tensor,
    labels_PN: Tensor,
    l2_P: Tensor,
    n_classes: int,
    *,
    max_iterations: int = 150,
    tolerance: float = 1e-4,
) -> Fit:
    """Fit all problems; features are standardised first, and the penalty acts on the standardised weights.

    Limited-memory BFGS in the eigenbasis of each group's covariance, where the curvature bound of Böhning (1992)
    becomes a diagonal preconditioner. Stops when every gradient entry is below `tolerance`, when float32 sees no
    better point for any problem, or after max_iterations.
    """
    with full_float32():
        mean_GD, scale_GD = x_GND.mean(1), x_GND.std(1, correction=0)
        # A constant feature has nothing but rounding left once its mean is gone.
        scale_GD = torch.where(scale_GD > 1e-5 * mean_GD.abs(), scale_GD, 1)
        x = (x_GND - mean_GD[:, None]) / scale_GD[:, None]
        variance_GD, basis_GDD = torch.linalg.eigh(x.mT @ x / x.size(1))
        # A column of ones is the bias: after standardising, it is orthogonal to all others.
        x = torch.cat([x @ basis_GDD, x.new_ones(*x.shape[:2], 1)], -1)
        variance_GD = torch.cat([variance_GD.clamp_min(0), variance_GD.new_ones(len(x), 1)], -1)
        penalty_PD = l2_P.to(x)[:, None].repeat(1, x.size(-1))
        penalty_PD[:, -1] = 0
        w_GPDK, iterations, gradient = _minimise(
            x, labels_PN, penalty_PD, variance_GD, n_classes, max_iterations, tolerance
        )
        weight_GPDK = basis_GDD[:, None] @ w_GPDK[:, :, :-1] / scale_GD[:, None, :, None]
        bias_GPK = w_GPDK[:, :, -1] - (mean_GD[:, None, :, None] * weight_GPDK).sum(2)
    return Fit(weight_GPDK.transpose(1, 2), bias_GPK, iterations, gradient)


def _minimise(
    x_GND: Tensor,
    labels_PN: Tensor,
    penalty_PD: Tensor,
    variance_GD: Tensor,
    n_classes: int,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, int, float]:
    """Weights (G, P, D, K), iterations done, largest gradient entry."""
    g, n, d = x_GND.shape
    p, k = len(labels_PN), n_classes
    target_NPK = torch.nn.functional.one_hot(labels_PN.T.long(), k).to(x_GND)
    penalty = penalty_PD[:, :, None]
    # Curvature of softmax regression at p = 1 / K, the start: (K - 1) / K^2 of the features' variance.
    inverse = 1 / ((k - 1) / k**2 * variance_GD[:, None, :, None] + penalty).clamp_min(1e-8)
    steps = torch.tensor([0.0, *STEPS], device=x_GND.device)

    def logits(w_GPDK: Tensor) -> Tensor:
        return (x_GND @ w_GPDK.transpose(1, 2).reshape(g, d, p * k)).unflatten(-1, (p, k))

    def gradient(z_GNPK: Tensor, w_GPDK: Tensor) -> Tensor:
        residual = (z_GNPK.softmax(-1) - target_NPK) / n
        return (x_GND.mT @ residual.flatten(2)).unflatten(-1, (p, k)).transpose(1, 2) + penalty * w_GPDK

    def loss(z_GNPK: Tensor, w_GPDK: Tensor) -> Tensor:
        nats = z_GNPK.logsumexp(-1).mean(1) - (z_GNPK * target_NPK).sum(-1).mean(1)
        return nats + (penalty * w_GPDK.square()).sum((2, 3)) / 2

    w = x_GND.new_zeros(g, p, d, k)
    z = x_GND.new_zeros(g, n, p, k)
    value_GP, grad = loss(z, w), gradient(z, w)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    iteration, largest = 0, float("inf")
    while iteration < max_iterations:
        direction = -_two_loop(grad, pairs, inverse)
        dz = logits(direction)
        losses = torch.stack([value_GP, *(loss(z + a * dz, w + a * direction) for a in STEPS)])
        value_GP, best_GP = losses.min(0)
        chosen_GP = steps[best_GP]
        move = chosen_GP[..., None, None] * direction
        w = w + move
        z = z + chosen_GP[:, None, :, None] * dz
        new_grad = gradient(z, w)
        change = new_grad - grad
        inner_GP = (move * change).sum((2, 3))
        # A problem that did not move (converged to rounding) adds nothing to its history.
        rho = torch.where(inner_GP > 1e-20, 1 / inner_GP.clamp_min(1e-20), 0)
        pairs = [*pairs[1 - HISTORY :], (move, change, rho[..., None, None])]
        grad = new_grad
        iteration += 1
        if iteration % CHECK_EVERY == 0:
            largest, moved = torch.stack([grad.abs().max(), best_GP.max().to(grad)]).tolist()
            if largest < tolerance or not moved:
                break
    return w, iteration, largest


def _two_loop(grad: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """The L-BFGS product of inverse Hessian and gradient (Nocedal and Wright 2006, algorithm 7.4), batched."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    q, alphas = grad, []
    for move, change, rho in reversed(pairs):
        alphas.append(rho * dot(move, q))
        q = q - alphas[-1] * change
    r = inverse * q
    if pairs:
        move, change, rho = pairs[-1]
        scale = dot(move, change) / dot(change, inverse * change).clamp_min(1e-30)
        r = r * torch.where(rho > 0, scale, 1)
    for (move, change, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + move * (alpha - rho * dot(change, r))
    return r


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, whatever training in this process has set: its rounding is larger than gradients near a minimum."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
