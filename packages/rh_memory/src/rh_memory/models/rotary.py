"""Rotations by angles: of queries and keys by the index of a spacing, of values by its height times log q.

Explicit-formula attention ("values=prime_rotary"): token j is the gap that ends at the zero gamma_j. Its value is
turned by -gamma_j log q_f and the output of token i by +gamma_i log q_f, one frequency for each pair of channels, so
that a head returns sum_j a_ij e^{i (gamma_i - gamma_j) log q} v_j: a Landau sum over the zeros in view, tapered by the
attention. Such sums are large where q is a prime power (Landau 1911), which is how zeros "know" the primes.

Shapes: B batch, T tokens, H heads, C channels of a head, F = C / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from lab_shared.errors import UserError
from torch import Tensor

from rh_memory.config import ModelConfig


def prime_powers(n: int) -> np.ndarray:
    """The first n prime powers 2, 3, 4, 5, 7, 8, 9, 11, ... (int64)."""
    return _with_prime_factors(n, lambda different: different == 1)


def composites(n: int) -> np.ndarray:
    """The first n numbers with at least two different prime factors: 6, 10, 12, 14, ... (int64)."""
    return _with_prime_factors(n, lambda different: different > 1)


def _with_prime_factors(n: int, wanted: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The first n numbers from 2 whose number of different prime factors is wanted, by a sieve."""
    limit = 32
    while True:
        factors = np.zeros(limit, np.int64)
        for p in range(2, limit):
            if factors[p] == 0:
                factors[p::p] += 1
        found = np.flatnonzero(wanted(factors[2:])) + 2
        if found.size >= n:
            return found[:n]
        limit *= 2


def log_frequencies(config: ModelConfig) -> np.ndarray:
    """The d_model / 2 frequencies of prime_rotary, not decreasing, float64; head h uses every heads-th, from the h-th.

    prime_powers: log q of the first prime powers. Controls over the same range: shuffled adds up the gaps between
    those in random order, random draws uniformly, even spaces equally (both up to frequency_top where that is set).
    composite: logs of the first numbers that are no prime powers. With frequency_count there are only so many
    different ones, each standing as often. Raises UserError for a frequency_top that is not above log 2, or that these
    frequencies do not have, and for a frequency_count that d_model / 2 is no multiple of.
    """
    pairs = config.d_model // 2
    n = config.frequency_count or pairs
    if pairs % n:
        raise UserError(
            f"model.frequency_count = {n} with {pairs} pairs of channels (model.d_model = {config.d_model}): each "
            "frequency is for equally many pairs, so it must divide them"
        )
    top = config.frequency_top
    spread = config.frequencies in ("random", "even")
    if top is not None and (not spread or top <= math.log(2)):
        raise UserError(
            f"model.frequency_top = {top} with model.frequencies = {config.frequencies}: it must be above log 2 = "
            f"{math.log(2):.3f}, and only random and even frequencies have one"
        )
    log_q = np.log(prime_powers(pairs))
    low, high = log_q[0], log_q[-1] if top is None else top
    rng = np.random.default_rng(config.frequency_seed)
    if config.frequencies == "prime_powers":
        chosen = log_q[:n]
    elif config.frequencies == "shuffled":
        chosen = low + np.concatenate([[0.0], np.cumsum(rng.permutation(np.diff(log_q[:n])))])
    elif config.frequencies == "random":
        chosen = np.sort(rng.uniform(low, high, n))
    elif config.frequencies == "even":
        chosen = np.linspace(low, high, n)
    else:
        chosen = np.log(composites(n))
    return np.repeat(chosen, pairs // n)


def index_turns(position_T: Tensor, n_pairs: int) -> Tensor:
    """Turns (fractions of a circle) of rotary positions with base 10,000 (T, F), float32; arXiv:2104.09864."""
    rate_F = 10_000.0 ** (-torch.arange(n_pairs, device=position_T.device, dtype=torch.float32) / n_pairs)
    return position_T.float()[:, None] * (rate_F / (2 * math.pi))


def rotations(turns: Tensor) -> Tensor:
    """cos and sin of angles given in turns, (...) -> (..., 2) float32.

    Whole turns are taken off in the precision of `turns` (float64 for heights), before the cast to float32.
    """
    angle = (turns - turns.round()).float() * (2 * math.pi)
    if not torch.compiler.is_compiling():  # stacking goes pair by pair, which takes a CPU five times as long
        return torch.view_as_real(torch.complex(angle.cos(), angle.sin()))
    return torch.stack([angle.cos(), angle.sin()], -1)


def rotate(x: Tensor, rotation: Tensor, *, back: bool = False) -> Tensor:
    """Turn neighbouring channels (2f, 2f + 1) of x (..., C) by `rotation` (..., F, 2); back: the other way.

    float32 inside, x's dtype outside. Uncompiled, one complex product: one pass over memory rather than seven.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        factor = torch.view_as_complex(rotation)
        turned = torch.view_as_complex(pairs) * (factor.conj() if back else factor)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    a, b = pairs.unbind(-1)
    cos, sin = rotation.unbind(-1)
    sin = -sin if back else sin
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
