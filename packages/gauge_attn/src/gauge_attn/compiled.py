"""torch.compile as this package needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gauge_attn.models import Model, Practical

COMPILE_FROM = 2000
"""Training steps from which on compiling is the default on a GPU: it takes about a minute and saves some 20 to 40 ms a
step."""


def compiled(function: Callable[..., Any]) -> Any:
    """`function` (or a module) compiled for the shapes it meets.

    Inductor's tiling analysis in torch 2.11 raises CantSplit on features of odd widths, so it is left out. Call it
    once uncompiled before: constant tables (`gauge_attn.tables`) are made on the first call, which compiled code
    would stop for.
    """
    import torch._inductor.config

    torch._inductor.config.triton.coalesce_tiling_analysis = False
    return torch.compile(function, dynamic=False)


def compiled_model(model: Model, tokens_BN: Tensor) -> Any:
    """The model for training steps; the practical one in parts, so that its blocks are compiled once for all.

    tokens_BN: an example, for the uncompiled call.
    """
    with torch.no_grad():
        model(tokens_BN)
    if not isinstance(model, Practical):
        return compiled(model)
    model.compile_regions(compiled)
    return model
