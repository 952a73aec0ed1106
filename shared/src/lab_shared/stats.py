"""Statistics of results: intervals, a paired test, a correction for families of tests, tables over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lab_shared.bootstrap import BLOCK, Interval, Quantile, bca_interval

__all__ = [
    "Interval",
    "Quantile",
    "SeedsTable",
    "SignFlip",
    "Summary",
    "bca_interval",
    "holm",
    "paired_sign_flip",
    "seeds_table",
    "student_t_cdf",
    "student_t_quantile",
]


class SignFlip(NamedTuple):
    p: float
    """Two-sided."""
    difference: float
    """Mean of a - b."""
    n: int
    flips: int
    """Sign patterns looked at: 2^n when exact."""
    exact: bool


def paired_sign_flip(a: ArrayLike, b: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> SignFlip:
    """Test whether paired values differ: are the signs of a - b exchangeable?

    a, b: (n,), paired (same seed, same event). Up to n = 20 all 2^n sign patterns are counted, so that the
    smallest possible p is 2^(1 - n): 5 pairs can never give p < 0.0625. Above, `resamples` random patterns,
    and p = (1 + count) / (1 + resamples), which is never 0.

    Raises ValueError for unequal lengths, no pairs or values that are not finite.
    Source: Fisher's randomisation test, Design of Experiments (1935), section 21.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"shapes {a.shape} and {b.shape}: need the same positive number of paired values")
    d = a - b
    if not np.isfinite(d).all():
        raise ValueError(f"{int((~np.isfinite(d)).sum())} of {d.size} differences are not finite")
    # The same sum in another order must count as equal.
    threshold = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if d.size <= 20:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        p, flips = float(np.mean(np.abs(sums) >= threshold)), sums.size
        return SignFlip(p, float(d.mean()), d.size, flips, exact=True)
    rng = np.random.default_rng(seed)
    rows, count = max(1, BLOCK // d.size), 0
    for start in range(0, resamples, rows):
        plus = rng.integers(0, 2, (min(rows, resamples - start), d.size), dtype=np.int8)
        count += int(np.sum(np.abs(2 * (plus @ d) - d.sum()) >= threshold))
    return SignFlip((1 + count) / (1 + resamples), float(d.mean()), d.size, resamples, exact=False)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for a family of tests: the k-th smallest of m times m - k + 1, made monotone, at most 1.

    Those at most alpha are what Holm's step-down procedure rejects at alpha: the chance of one false rejection or more
    is at most alpha, however the tests depend on each other. Raises ValueError for values outside [0, 1].
    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"{list(p_values)}: p-values lie between 0 and 1")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


class Summary(NamedTuple):
    n: int
    mean: float
    sd: float | None
    """With n - 1; None for one seed."""
    low: float | None
    """Student-t interval of the mean: n is too small here for a bootstrap."""
    high: float | None


@dataclass(frozen=True)
class SeedsTable:
    """One row per seed, and the summary of every metric."""

    rows: list[dict[str, float]]
    summary: dict[str, Summary]
    level: float

    def cells(self) -> list[list[str]]:
        """Header, one line per seed, then mean, sd and interval."""
        table = [["seed", *self.summary]]
        for row in self.rows:
            table.append([str(row["seed"]), *(_number(row[name]) for name in self.summary)])
        summaries = list(self.summary.values())
        table.append(["mean", *(_number(s.mean) for s in summaries)])
        table.append(["sd", *(_number(s.sd) for s in summaries)])
        intervals = ("n/a" if s.low is None else f"{_number(s.low)} to {_number(s.high)}" for s in summaries)
        table.append([f"{100 * self.level:g}% interval", *intervals])
        return table

    def text(self) -> str:
        """Aligned columns."""
        return "\n".join("  ".join(line).rstrip() for line in _padded(self.cells()))

    def markdown(self) -> str:
        """A GitHub table."""
        header, *body = _padded(self.cells())
        rule = ["-" * len(header[0])] + ["-" * (len(cell) - 1) + ":" for cell in header[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body])


def seeds_table(rows: Sequence[Mapping[str, float]], *, level: float = 0.95) -> SeedsTable:
    """Summarise the same experiment over seeds.

    rows: one mapping per run with "seed" and the same metrics in each. The interval is Student's t on the
    mean. Raises ValueError when there are no rows, a seed occurs twice, or metrics differ between rows.
    """
    if not rows:
        raise ValueError("no rows: give one mapping per seed")
    names = [name for name in rows[0] if name != "seed"]
    seeds = [row.get("seed") for row in rows]
    if None in seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds}: every row needs its own 'seed'")
    for row in rows:
        if odd := set(row) ^ {"seed", *names}:
            raise ValueError(f"seed {row['seed']}: metric {min(odd)!r} is not in every row")
    summary = {name: _summarise([float(row[name]) for row in rows], level) for name in names}
    return SeedsTable([dict(row) for row in rows], summary, level)


def _summarise(values: list[float], level: float) -> Summary:
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Summary(1, mean, None, None, None)
    sd = float(np.std(values, ddof=1))
    half = student_t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def student_t_quantile(p: float, dof: int) -> float:
    """The t with P(T < t) = p for Student's distribution with `dof` degrees of freedom, 0.5 <= p < 1.

    Bisection on `student_t_cdf`.
    """
    if not 0.5 <= p < 1 or dof < 1:
        raise ValueError(f"p={p}, dof={dof}: need 0.5 <= p < 1 and dof >= 1")
    low, high = 0.0, 1.0
    while student_t_cdf(high, dof) < p:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, dof) < p else (low, middle)
    return (low + high) / 2


def student_t_cdf(t: float, dof: int) -> float:
    """P(T < t) of Student's distribution with `dof` degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan2(t, math.sqrt(dof))
    odd = dof % 2
    total, term = 0.0, math.cos(theta) if odd else 1.0
    for k in range(1, dof - 1 + odd, 2) if odd else range(0, dof - 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return 0.5 + inside / 2


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def _padded(table: list[list[str]]) -> list[list[str]]:
    """Every column to one width, names to the left and numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in table
    ]
