"""Linear predictors of the next spacing whose weights are polynomials in log height, by normal equations.

s_{n+1} = sum_k z_n^k (w_k . f_n) + noise, with z the standardised log height and f_n = (1, lags, prime phases):
- lags: s_{n-d} - 1 for d = 0 .. L-1;
- prime phases: sum over the last 255 zeros before gamma_n of taper(d) exp(i (gamma_n - gamma_{n-d}) log q), real and
  imaginary part, one frequency for every prime power q. The explicit formula says the zeros carry lines at exactly
  these frequencies.

The normal equations are summed over chunks of CHUNK rows, in which z is taken as constant (it moves by less than 1e-3
of its range): then one Gram matrix of f per chunk gives the equations of every polynomial degree and, as a leading
block, of every smaller set of features. float64 throughout but for the features themselves.

Shapes: N rows (one per predicted spacing), F features, Q frequencies, K tapers, D = 256 distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.progress import Counter
from torch import Tensor

CHUNK = 2048
DISTANCES = 256
"""Zeros a row may look back at, so that it knows no more than a window of 256 spacings."""

_TOEPLITZ = 64  # larger blocks multiply more zeros, smaller ones copy more inputs


@dataclass(frozen=True)
class Series:
    """Spacings with the heights they end at; `heights=None` for data without heights (GUE)."""

    s_N: Tensor
    """(N,) float64"""
    gamma_N: Tensor | None
    """(N,) float64, height of the zero that ends each gap"""
    log_height_N: Tensor
    """(N,) float64"""

    @classmethod
    def of(cls, spacings: object) -> Series:
        """From data.unfold.Spacings."""
        s, centre, offset, log_height = (getattr(spacings, name) for name in ("s", "centre", "offset", "log_height"))
        f64 = torch.float64
        return cls(
            torch.from_numpy(np.asarray(s)).to(f64),
            torch.from_numpy(np.asarray(centre) + np.asarray(offset)).to(f64),
            torch.from_numpy(np.asarray(log_height)).to(f64),
        )


def prime_powers(limit: int) -> list[tuple[int, int, int]]:
    """(q, p, r) with q = p^r <= limit, p prime, ascending in q."""
    sieve = np.ones(limit + 1, dtype=bool)
    sieve[:2] = False
    for p in range(2, math.isqrt(limit) + 1):
        if sieve[p]:
            sieve[p * p :: p] = False
    found = [
        (int(p) ** r, int(p), r) for p in np.flatnonzero(sieve) for r in range(1, limit.bit_length()) if p**r <= limit
    ]
    return sorted(found)


@dataclass(frozen=True)
class Features:
    """Which features a row has: an intercept, `lags` spacings, and prime phases for the powers up to `primes`."""

    lags: int
    primes: int = 0
    scales: tuple[float, ...] = (6.0, 20.0, 60.0, math.inf)
    """Decay lengths, in zeros, of the exponential tapers; each also falls to 0 at distance 256."""

    @property
    def frequencies(self) -> list[float]:
        return [math.log(q) for q, _, _ in prime_powers(self.primes)]

    @property
    def count(self) -> int:
        return 1 + self.lags + 2 * len(self.frequencies) * len(self.scales)

    @property
    def reach(self) -> int:
        """Spacings a row looks back at, its own included."""
        return DISTANCES if self.primes else self.lags

    def rows(self, series: Series, first: int, last: int) -> Tensor:
        """(last - first, F) float32: what is known after gap n, for n = first .. last - 1. Needs first >= reach - 1."""
        s = series.s_N[first - self.lags + 1 : last]
        ones = torch.ones(last - first, 1)
        lags = (s - 1).unfold(0, self.lags, 1).flip(1).float()
        if not self.primes:
            return torch.cat([ones, lags], dim=1)
        assert series.gamma_N is not None, "prime phases need heights"
        return torch.cat([ones, lags, self._phases(series.gamma_N, first, last)], dim=1)

    def tapers(self) -> Tensor:
        """(K, D) weights of the zeros at distance d = 0 .. 255; 0 at d = 0, which is the same for every row."""
        d = torch.arange(DISTANCES)
        window = torch.cos(math.pi * d / (2 * DISTANCES)) ** 2 * (d > 0)
        return torch.stack([torch.exp(-d / scale) * window for scale in self.scales])

    def _phases(self, gamma_N: Tensor, first: int, last: int) -> Tensor:
        """(rows, 2QK): tapered sums, by one matrix product with a Toeplitz block per 64 rows."""
        blocks = -(-(last - first) // _TOEPLITZ)
        gamma = gamma_N[first - DISTANCES + 1 : last] - gamma_N[first]
        phase_QM = torch.outer(torch.tensor(self.frequencies, dtype=gamma.dtype), gamma).remainder(2 * math.pi).float()
        cos_QM, sin_QM = phase_QM.cos(), phase_QM.sin()
        z_RM = torch.nn.functional.pad(torch.cat([cos_QM, sin_QM]), (0, blocks * _TOEPLITZ - (last - first)))
        taper_KD = self.tapers()
        # Row i of a block sees the zeros at places i .. i + 255 of its inputs, the last at distance 0.
        inputs = DISTANCES + _TOEPLITZ - 1
        toeplitz = torch.zeros(len(taper_KD), _TOEPLITZ, inputs)
        for i in range(_TOEPLITZ):
            toeplitz[:, i, i : i + DISTANCES] = taper_KD.flip(1)
        sums = z_RM.unfold(1, inputs, _TOEPLITZ).reshape(-1, inputs) @ toeplitz.view(-1, inputs).T
        sums = sums.view(2, len(cos_QM), blocks, len(taper_KD), _TOEPLITZ).permute(0, 1, 3, 2, 4)
        re, im = sums.reshape(2, len(cos_QM), len(taper_KD), -1)[..., : last - first]
        cos, sin = cos_QM[:, None, -(last - first) :], sin_QM[:, None, -(last - first) :]
        both = torch.cat([re * cos + im * sin, re * sin - im * cos]) / math.sqrt(DISTANCES)
        return both.reshape(-1, last - first).T


@dataclass
class NormalEquations:
    """Moments sum z^k f f', sum z^k f y over chunks, for polynomials up to `degree` in z."""

    features: Features
    degree: int
    centre: float
    scale: float
    rows: int = 0
    square: float = 0.0
    gram_KFF: Tensor = field(init=False)
    right_KF: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n = self.features.count
        self.gram_KFF = torch.zeros(2 * self.degree + 1, n, n, dtype=torch.float64)
        self.right_KF = torch.zeros(self.degree + 1, n, dtype=torch.float64)

    def add(self, f_NF: Tensor, y_N: Tensor, log_height_N: Tensor) -> None:
        """Add rows; chunk by chunk with z at the chunk's mean."""
        for f, y, height in zip(f_NF.split(CHUNK), y_N.split(CHUNK), log_height_N.split(CHUNK), strict=True):
            f, z = f.double(), float((height.mean() - self.centre) / self.scale)
            gram, right = f.T @ f, f.T @ y
            for k in range(2 * self.degree + 1):
                self.gram_KFF[k] += z**k * gram
            for k in range(self.degree + 1):
                self.right_KF[k] += z**k * right
            self.square += float(y @ y)
            self.rows += len(y)

    def solve(self, *, features: int | None = None, degree: int | None = None, ridge: float = 1e-7) -> LinearFit:
        """Least squares with the first `features` features and a polynomial of `degree` in z.

        ridge: added to the diagonal relative to it, against nearly collinear tapers.
        """
        n = self.features.count if features is None else features
        k = 1 + (self.degree if degree is None else degree)
        gram = torch.cat([torch.cat([self.gram_KFF[i + j, :n, :n] for j in range(k)], dim=1) for i in range(k)])
        right = self.right_KF[:k, :n].reshape(-1)
        damped = gram + torch.diag(ridge * gram.diagonal().clamp_min(1e-12))
        weight = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(damped))[:, 0]
        error = self.square - 2 * float(weight @ right) + float(weight @ gram @ weight)
        return LinearFit(weight.view(k, n), self.centre, self.scale, error / (self.rows - k * n))


@dataclass(frozen=True)
class LinearFit:
    """Weights (degree + 1, F) and the residual variance on the fitted rows."""

    weight_KF: Tensor
    centre: float
    scale: float
    variance: float

    def predict(self, f_NF: Tensor, log_height_N: Tensor) -> Tensor:
        """(N,) float64 predicted means, from rows with at least F features."""
        z_N = (log_height_N - self.centre) / self.scale
        power_NK = z_N[:, None] ** torch.arange(len(self.weight_KF))
        parts_NK = f_NF[:, : self.weight_KF.shape[1]] @ self.weight_KF.float().T
        return (parts_NK.double() * power_NK).sum(dim=1)

    def nll(self, mean_N: Tensor, y_N: Tensor) -> Tensor:
        """-log density of y under a Gaussian with the fitted residual variance."""
        return 0.5 * math.log(2 * math.pi * self.variance) + (y_N - mean_N) ** 2 / (2 * self.variance)


def chunks(first: int, last: int, rows: int = 4 * CHUNK) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive pieces of at most `rows` rows."""
    for start in range(first, last, rows):
        yield start, min(start + rows, last)


def accumulate(
    series: Series, features: Features, ranges: Sequence[tuple[int, int]], *, degree: int, title: str = "fitting"
) -> NormalEquations:
    """Normal equations over all rows that, with everything they look back at, lie inside one of the ranges."""
    reach = features.reach
    inside = [(first + reach - 1, last - 1) for first, last in ranges if last - first > reach]
    if not inside:
        raise UserError(f"no stretch of spacings is longer than {reach}: use more zeros")
    ends = series.log_height_N[[row for a, b in inside for row in (a, b - 1)]]
    low, high = float(ends.min()), float(ends.max())
    equations = NormalEquations(features, degree, (low + high) / 2, (high - low) / 2 or 1.0)
    with Counter(title, sum(b - a for a, b in inside), "rows") as counter:
        for first, last in inside:
            for a, b in chunks(first, last):
                rows = features.rows(series, a, b)
                equations.add(rows, series.s_N[a + 1 : b + 1], series.log_height_N[a:b])
                counter.show(equations.rows)
    return equations


def predict(fits: Sequence[LinearFit], series: Series, features: Features, spacing_W: Tensor) -> Tensor:
    """(fits, W) predicted means of the spacings with these ascending indices, each from what precedes it.

    Rows are made for whole stretches and picked from: neighbours in `spacing_W` should be close together, and a gap of
    more than 256 starts a new stretch.
    """
    out = []
    breaks = (torch.where(spacing_W.diff() > DISTANCES)[0] + 1).tolist()
    for first, last in zip([0, *breaks], [*breaks, len(spacing_W)], strict=True):
        target = spacing_W[first:last] - 1  # row n predicts spacing n + 1
        for a, b in chunks(int(target[0]), int(target[-1]) + 1):
            chosen = target[(target >= a) & (target < b)]
            rows = features.rows(series, a, b)[chosen - a]
            out.append(torch.stack([fit.predict(rows, series.log_height_N[chosen]) for fit in fits]))
    return torch.cat(out, dim=1)
