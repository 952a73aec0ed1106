"""Constant float64 matrices by name, kept on every device that asked for them, and products that are never TF32.

A compiled function finds its tables and uploads nothing, provided that it ran once uncompiled before
(`compiled.compiled` says so); otherwise the filling is a graph break.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_TABLES: dict[str, Tensor] = {}


def table(name: str, make: Callable[[int], np.ndarray], l: int, like: Tensor) -> Tensor:
    """make(l) on like's device and in its type; `name` and l identify it."""
    key = f"{name} {l} {like.dtype} {like.device}"
    if key not in _TABLES:
        (_fill_uncompiled if torch.compiler.is_compiling() else _fill)(key, make, l, like)
    return _TABLES[key]


def _fill(key: str, make: Callable[[int], np.ndarray], l: int, like: Tensor) -> None:
    with torch.inference_mode(False):  # an inference tensor could never be used in a backward pass again
        _TABLES[key] = torch.tensor(make(l), dtype=like.dtype, device=like.device)


# This is torch.compiler.disable without importing dynamo (seconds) before it is needed.
_fill_uncompiled = torch._disable_dynamo(_fill)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b without TF32, forward and backward, whatever the user's setting is, also inside torch.compile.

    On CUDA in float32 small matrices are multiplied and summed (one fused kernel when compiled), as only matrix
    products can be TF32; no global flag is touched.
    """
    if could_be_tf32(a):
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    return a @ b


def apply_table(x: Tensor, name: str, make: Callable[[int], np.ndarray], l: int) -> Tensor:
    """x @ make(l) for a constant matrix, without TF32: one product of the whole batch, in float64 where float32 could
    be rounded."""
    wide = x.to(torch.float64) if could_be_tf32(x) else x
    with torch.autocast(x.device.type, enabled=False):
        return (wide @ table(name, make, l, wide)).to(x.dtype)


def could_be_tf32(x: Tensor) -> bool:
    """Whether a matrix product of x may be rounded to TF32, as the user's setting has it."""
    return x.is_cuda and x.dtype == torch.float32
