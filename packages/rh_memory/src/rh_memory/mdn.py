"""Mixture densities of a spacing: what every model predicts, in closed form, and the layer that predicts it.

Shapes: (...) is the batch shape of the mixture, anything; K components.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rh_memory.config import ModelConfig

Kind = Literal["gaussian", "lognormal"]
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Mixture:
    """sum_k w_k f(y; loc_k, scale_k): Gaussians, or lognormals (loc and scale are those of log y).

    log_weights, loc, scale (..., K); the weights are normalised here. y and p broadcast against the batch shape.
    Every quantity is in unfolded spacings (mean 1), densities in nats.
    """

    def __init__(self, log_weights: Tensor, loc: Tensor, scale: Tensor, kind: Kind = "gaussian") -> None:
        if kind not in ("gaussian", "lognormal"):
            raise ValueError(f"unknown mixture kind {kind!r}: choose 'gaussian' or 'lognormal'")
        self.log_weights = log_weights - log_weights.logsumexp(-1, keepdim=True)
        self.loc, self.scale, self.kind = loc, scale, kind

    @property
    def batch_shape(self) -> torch.Size:
        return self.loc.shape[:-1]

    @property
    def weights(self) -> Tensor:
        """(..., K), summing to one."""
        return self.log_weights.exp()

    def map(self, function: Callable[[Tensor], Tensor]) -> Mixture:
        """The mixture with `function` applied to its three tensors: slicing, casting, moving, detaching."""
        return Mixture(function(self.log_weights), function(self.loc), function(self.scale), self.kind)

    def __getitem__(self, index: Any) -> Mixture:
        """Part of the batch: `mixture[:, -1]` indexes the batch shape and keeps the components."""
        parts = index if isinstance(index, tuple) else (index,)
        parts = parts if Ellipsis in parts else (*parts, Ellipsis)
        return self.map(lambda x: x[(*parts, slice(None))])

    def _standard(self, y: Tensor) -> Tensor:
        """(y - loc) / scale, or that of log y; -inf where a lognormal has no mass."""
        y = y[..., None]
        if self.kind == "lognormal":
            y = torch.where(y > 0, y, 0).log()
        return (y - self.loc) / self.scale

    def log_prob(self, y: Tensor) -> Tensor:
        """log density at y (...); -inf for a lognormal at y <= 0."""
        if self.kind == "lognormal":
            inside = y > 0
            log_y = torch.where(inside, y, 1).log()
            z = (log_y[..., None] - self.loc) / self.scale
            log_p = (self.log_weights - self.scale.log() - 0.5 * z * z).logsumexp(-1) - _HALF_LOG_2PI - log_y
            return torch.where(inside, log_p, -torch.inf)
        z = self._standard(y)
        return (self.log_weights - self.scale.log() - 0.5 * z * z).logsumexp(-1) - _HALF_LOG_2PI

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) (...); over data this is the probability integral transform."""
        return (self.weights * torch.special.ndtr(self._standard(y))).sum(-1)

    def quantile(self, p: Tensor | float, iterations: int = 60) -> Tensor:
        """The y with cdf(y) = p, 0 < p < 1, by bisection in float64; p of shape (P, 1, ...) gives P quantiles.

        The quantile of a mixture lies between the smallest and the largest quantile of its components.
        """
        wide = self.map(lambda x: x.double())
        p = torch.as_tensor(p, dtype=torch.float64, device=self.loc.device)
        ends = wide.loc + wide.scale * torch.special.ndtri(p)[..., None]
        ends = ends.exp() if self.kind == "lognormal" else ends
        low, high = ends.amin(-1), ends.amax(-1)
        for _ in range(iterations):
            middle = (low + high) / 2
            below = wide.cdf(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(self.loc.dtype)

    def sample(self, generator: torch.Generator | None = None, n: int | None = None) -> Tensor:
        """One draw for each element of the batch (...), or n of them (n, ...). The density exactly: no clipping."""
        shape = self.batch_shape if n is None else (n, *self.batch_shape)
        options: Any = {"generator": generator, "device": self.loc.device, "dtype": self.loc.dtype}
        u = torch.rand(shape, **options)
        last = self.loc.size(-1) - 1
        k = (self.weights.cumsum(-1) < u[..., None]).sum(-1, keepdim=True).clamp_(max=last)
        loc, scale = (x.expand(*shape, -1).gather(-1, k)[..., 0] for x in (self.loc, self.scale))
        y = loc + scale * torch.randn(shape, **options)
        return y.exp() if self.kind == "lognormal" else y

    def component_means(self) -> Tensor:
        """(..., K)."""
        return (self.loc + 0.5 * self.scale.square()).exp() if self.kind == "lognormal" else self.loc

    def mean(self) -> Tensor:
        """Expectation (...)."""
        return (self.weights * self.component_means()).sum(-1)

    def mass_below_zero(self) -> Tensor:
        """Probability of an impossible spacing, P(Y < 0) (...); exactly 0 for lognormals."""
        return self.cdf(torch.zeros((), dtype=self.loc.dtype, device=self.loc.device))

    def entropy_of_weights(self) -> Tensor:
        """-sum_k w_k log w_k (...), between 0 and log K."""
        return -(self.weights * self.log_weights).sum(-1)

    def crps(self, y: Tensor) -> Tensor:
        """Continuous ranked probability score E|Y - y| - E|Y - Y'| / 2 (...), in closed form; lower is better.

        Gaussians: E|N(m, s^2)| = m (2 Phi(m/s) - 1) + 2 s phi(m/s) for both terms (Grimit et al. 2006). Lognormals
        with means M: E|X - y| = y (2 F(y) - 1) + M (1 - 2 F(y; loc + scale^2)) because weighting a lognormal by x
        shifts its loc by scale^2, and E|X - X'| = M (1 - 2 P(X~ < X')) + M' (1 - 2 P(X~' < X)) by the same shift.
        """
        w = self.weights
        i, j = (..., slice(None), None), (..., None, slice(None))
        if self.kind == "gaussian":
            to_y = _mean_abs_normal(self.loc - y[..., None], self.scale)
            spread = (self.scale.square()[i] + self.scale.square()[j]).sqrt()
            apart = _mean_abs_normal(self.loc[i] - self.loc[j], spread)
        else:
            ndtr, mean, variance = torch.special.ndtr, self.component_means(), self.scale.square()
            z, positive = self._standard(y), y.clamp(min=0)[..., None]
            # y <= 0: z = -inf makes both cdfs 0, and what is left is M - y
            to_y = positive * (2 * ndtr(z) - 1) + (positive - y[..., None])
            to_y = to_y + mean * (1 - 2 * ndtr(z - self.scale))
            spread = (variance[i] + variance[j]).sqrt()
            shifted = mean[i] * (1 - 2 * ndtr((self.loc[j] - (self.loc + variance)[i]) / spread))
            apart = shifted + shifted.mT
        return (w * to_y).sum(-1) - 0.5 * (w[i] * w[j] * apart).sum((-1, -2))


def _mean_abs_normal(m: Tensor, s: Tensor) -> Tensor:
    """E|X| for X ~ N(m, s^2)."""
    z = m / s
    return m * torch.erf(z * math.sqrt(0.5)) + 2 * s * torch.exp(-0.5 * z * z - _HALF_LOG_2PI)


def average(mixtures: list[Mixture]) -> Mixture:
    """The mixture whose density is the mean of the given ones' densities; all of one kind and batch shape."""
    parts = ([m.log_weights for m in mixtures], [m.loc for m in mixtures], [m.scale for m in mixtures])
    log_weights, loc, scale = (torch.cat(part, -1) for part in parts)
    return Mixture(log_weights, loc, scale, mixtures[0].kind)


class MDNHead(nn.Module):
    """(..., D) -> (logits of the weights, loc, scale), each (..., K), in float32 whatever autocast says.

    Gaussian: loc = softplus; lognormal: loc free. scale = softplus + sigma_floor.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind: Kind = config.mixture
        self.sigma_floor, self.spread = config.sigma_floor, config.head_init == "spread"
        self.linear = nn.Linear(config.d_model, 3 * config.components)

    def reset_bias(self) -> None:
        """Zero, or components between a third and five thirds of the mean spacing, each about 0.3 wide."""
        nn.init.zeros_(self.linear.bias)
        if self.spread:
            k = self.linear.out_features // 3
            centre = torch.linspace(1 / 3, 5 / 3, k)
            with torch.no_grad():
                self.linear.bias[k : 2 * k] = centre.log() if self.kind == "lognormal" else centre.expm1().log()
                self.linear.bias[2 * k :] = math.log(math.expm1(0.3))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(h.device.type, enabled=False):
            if h.is_cuda:
                raw = F.linear(h.float(), self.linear.weight, self.linear.bias)
            else:
                # Components outermost in memory: over rows of 8 numbers a CPU's kernels take three times as long.
                columns = h.float().reshape(-1, h.size(-1)).T
                raw = torch.addmm(self.linear.bias[:, None], self.linear.weight, columns)
                raw = raw.view(-1, *h.shape[:-1]).movedim(0, -1)
            log_weights, loc, scale = raw.chunk(3, -1)
            if self.kind == "gaussian":
                loc = F.softplus(loc)
            return log_weights, loc, F.softplus(scale) + self.sigma_floor

    def mixture(self, h: Tensor) -> Mixture:
        """(..., D) -> Mixture of batch shape (...)."""
        log_weights, loc, scale = self(h)
        return Mixture(log_weights, loc, scale, self.kind)
