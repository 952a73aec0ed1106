"""Random numbers as a function of their position: the same bits on every device, in any order and batch.

Integer arithmetic modulo 2^64 only (the finaliser of splitmix64, Steele, Lea and Flood 2014), so that nothing depends
on a generator's state, on rounding or on a library's version.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def key(*words: int) -> int:
    """A 64-bit key (signed, as torch stores it) from several integers; neighbouring words give unrelated keys."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return _signed(state)


def bits(stream: Tensor | int, counter: Tensor) -> Tensor:
    """64 random bits (int64) for each counter of a stream; both are int64, broadcast against each other.

    `stream` is a `key` or a tensor of earlier bits: draw number `counter` of the generator splitmix64(stream).
    """
    return _mix_(counter * _signed(_GOLDEN) + stream)


def _mix_(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, in place on int64."""
    shifted = torch.empty_like(x)
    for n, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        torch.bitwise_right_shift(x, n, out=shifted)
        x ^= shifted.bitwise_and_((1 << (64 - n)) - 1)  # int64 shifts are arithmetic; the mask makes them logical
        if factor is not None:
            x *= _signed(factor)
    return x


def high(x: Tensor, n: Tensor | int) -> Tensor:
    """Uniform on 0..n-1 from the upper 32 bits, n < 2^31 (bias below n / 2^32)."""
    return (x >> 32).bitwise_and_(0xFFFFFFFF).mul_(n).bitwise_right_shift_(32)


def low(x: Tensor, n: Tensor | int) -> Tensor:
    """Uniform on 0..n-1 from the lower 32 bits, independent of `high`."""
    return (x & 0xFFFFFFFF).mul_(n).bitwise_right_shift_(32)


def permutation(stream: int, n: int) -> Tensor:
    """A random order of 0..n-1, int64 on the CPU."""
    return torch.argsort(bits(stream, torch.arange(n)), stable=True)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
