"""Keeping freed memory: on a CPU, getting pages back from the kernel costs as much as the arithmetic on them."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Tell glibc to hold on to freed blocks (up to 1 GB) instead of returning and faulting them in again.

    The tensors of a step are megabytes each, above glibc's threshold for memory that goes straight back. With this the
    simulator's benchmark spends half the system time. Does nothing on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest value it takes
    mallopt(_TRIM_THRESHOLD, 1 << 30)
    mallopt(_TOP_PAD, 64 << 20)
