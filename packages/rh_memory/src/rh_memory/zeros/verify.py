"""Is the list complete? Turing's method, S at Gram points, Rosser's rule.

N(t) counts the zeros with 0 < Im < t, and S(t) = N(t) - theta(t)/pi - 1. Turing: S averages to almost nothing,

    |int_{t1}^{t2} S| <= 1.91 + 0.114 log(t2 / 2 pi)        for t2 > t1 > 168 pi

(Lehman 1970, "On the distribution of zeros of the Riemann zeta-function"), so zeros found on both sides of a point p
pin the integer N(p) from above and from below, even if some of them were missed. A run of zeros between two such points
is complete if it holds as many as N grows; those zeros then all lie on the critical line and are simple. In floating
point this is strong evidence, not a proof.

Gram points g_n solve theta(g_n) = n pi. g_n is good if (-1)^n Z(g_n) > 0, that is if S(g_n) is even. Rosser's rule
says that between consecutive good Gram points g_n and g_{n+k} lie at least k zeros; it first fails at n = 13,999,525.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rh_memory.zeros.theta import theta

TURING_HEIGHT = 168 * math.pi


def count_below(point: float, heights: np.ndarray, window: float) -> tuple[int, int]:
    """(lowest, highest) value that N(point) can have, given the zeros found in point +- window (float64, any order).

    From the right: N(t) >= N(p) + found(p, t) for t > p, so window N(p) <= int (theta/pi + 1) - int found + bound.
    From the left the same with the signs turned. The bounds meet once `window` exceeds the bound by enough, and an
    empty interval (lowest > highest) means that what was found are not all zeros. Raises ValueError below 168 pi.
    """
    low, high = point - window, point + window
    if low <= TURING_HEIGHT:
        raise ValueError(f"Turing's bound needs heights above {TURING_HEIGHT:.1f}, the window starts at {low:.1f}")
    bound = 1.91 + 0.114 * math.log(high / (2 * math.pi))
    right = float(np.sum(high - heights[(heights >= point) & (heights < high)]))
    left = float(np.sum(heights[(heights >= low) & (heights < point)] - low))
    highest = (_smooth_integral(point, high) - right + bound) / window
    lowest = (_smooth_integral(low, point) + left - bound) / window
    return math.ceil(lowest), math.floor(highest)


def _smooth_integral(begin: float, end: float) -> float:
    """int theta/pi + 1, by 20-point Gauss-Legendre."""
    x, w = np.polynomial.legendre.leggauss(20)
    t = torch.from_numpy((begin + end) / 2 + (end - begin) / 2 * x)
    return float(np.sum(w * (theta(t).numpy() / math.pi + 1)) * (end - begin) / 2)


def gram_statistics(heights_N: Tensor, before: int, first: float, last: float) -> dict[str, Any]:
    """S at the Gram points g_n, n >= 0, in [first, last), and Rosser's exceptions among the Gram blocks that end there.

    heights_N: all zeros in order from somewhat below `first` (a good Gram point must lie between, or the block that
    ends first is not judged) to `last`; `before`: N just below the first of them. Returns {"s_histogram": {S: Gram
    points}, "rosser_exceptions": [{"n", "length", "zeros"}], "gram_points"}.
    """
    place = theta(heights_N) / math.pi
    begin = max(0, math.ceil(float(place[0])))
    inside = max(begin, math.ceil(_theta(first) / math.pi))
    end = math.ceil(_theta(last) / math.pi)  # exclusive
    if end <= begin:
        return {"s_histogram": {}, "rosser_exceptions": [], "gram_points": 0}
    # A zero counts for g_n if theta(gamma)/pi < n.
    above = torch.ceil(place).to(torch.int64).clamp(begin, end) - begin
    found = torch.cumsum(torch.bincount(above, minlength=end - begin + 1)[: end - begin], 0)
    n = torch.arange(begin, end, device=place.device)
    s = before + found - (n + 1)

    good = (s % 2 == 0).nonzero().squeeze(1)
    bad = ((s[good][1:] < s[good][:-1]) & (n[good][1:] >= inside)).nonzero().squeeze(1)
    starts, ends = good[bad], good[bad + 1]
    exceptions = [
        {"n": int(n[a]), "length": int(b - a), "zeros": int(b - a + s[b] - s[a])}
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    values, counts = torch.unique(s[inside - begin :], return_counts=True)
    return {
        "s_histogram": {str(v): c for v, c in zip(values.tolist(), counts.tolist(), strict=True)},
        "rosser_exceptions": exceptions,
        "gram_points": end - inside,
    }


def _theta(t: float) -> float:
    return float(theta(torch.tensor(t, dtype=torch.float64)))
