"""torch.compile as this package needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(function: Callable[..., Any]) -> Any:
    """`function` (or a module) compiled for the shapes it meets.

    Inductor's tiling analysis in torch 2.11 raises CantSplit on features of odd widths, so it is left out.
    """
    import torch._inductor.config

    torch._inductor.config.triton.coalesce_tiling_analysis = False
    return torch.compile(function, dynamic=False)
