"""Unfolding: spacings in units of the local mean gap.

u(g) = g/2pi * log(g / (2 pi e)) is the smooth part of the counting function up to constants, and
s_n = u(gamma_{n+1}) - u(gamma_n) has mean 1. u is about 2e6 at gamma = 1e6, so in float32 its differences would carry
errors of 0.1; here they are formed in float64 from the (centre, offset) pairs, and only s itself is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rh_memory.zeros.store import Zeros

TWO_PI = 2 * np.pi
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Spacings:
    """N unfolded spacings, in order of height. Gap n ends at gamma_{n+1} = centre + offset.

    segment: 0 for one unbroken sequence; else every `segment` spacings start an unrelated one (another random matrix),
    and no window may cross from one to the next.
    """

    s: np.ndarray  # (N,) float32
    centre: np.ndarray  # (N,) float64
    offset: np.ndarray  # (N,) float64
    log_height: np.ndarray  # (N,) float32, log(gamma / 2 pi)
    segment: int = 0

    def __len__(self) -> int:
        return len(self.s)


def unfold(zeros: Zeros) -> Spacings:
    """The len(zeros) - 1 spacings between consecutive zeros, good to about 1e-14 before they become float32.

    With x the gap between a and b = a + x:  2 pi (u(b) - u(a)) = x (log(a / 2 pi) - 1) + b log1p(x / a).
    """
    n = max(len(zeros) - 1, 0)
    s, log_height = np.empty(n, np.float32), np.empty(n, np.float32)
    # In chunks, so that a memory-mapped file of 100 million zeros needs no float64 copies of itself.
    for begin in range(0, n, _CHUNK):
        end = min(begin + _CHUNK, n)
        centre = np.asarray(zeros.centre[begin : end + 1])
        offset = np.asarray(zeros.offset[begin : end + 1])
        s[begin:end] = spacings(centre, offset)
        log_height[begin:end] = np.log((centre[1:] + offset[1:]) / TWO_PI)
    return Spacings(s, zeros.centre[1:], zeros.offset[1:], log_height)


def spacings(centre: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Unfolded spacings (N-1,) in float64 of the N heights centre + offset."""
    gap = np.diff(centre) + np.diff(offset)
    height = centre + offset
    return (gap * (np.log(height[:-1] / TWO_PI) - 1) + height[1:] * np.log1p(gap / height[:-1])) / TWO_PI
