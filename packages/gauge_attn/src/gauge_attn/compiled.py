"""torch.compile and CUDA graphs as this package needs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gauge_attn.models import Model, Output, Practical

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


def compiled_model(model: Model) -> Any:
    """The model for training steps; the practical one in parts, so that its blocks are compiled once for all."""
    if not isinstance(model, Practical):
        return compiled(model)
    model.compile_regions(compiled)
    return model


def graphed_model(
    model: Model, tokens_BN: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Tensor], Output]:
    """The compiled model on CUDA with forward and backward captured as graphs: a small model's step is shorter than
    the launches of its kernels.

    tokens_BN: an example; every call must have its shape. autocast: makes the context of a forward pass, without the
    cache of converted weights, which would outlive the capture. The logits lie in the graph's memory and hold until
    the next call. Not for DDP, whose hooks work between kernels.
    """
    with torch.no_grad():
        model(tokens_BN)  # makes the constant tables
    # Compiling happens in the calls that warm up for the capture.
    graphed: Any = torch.cuda.make_graphed_callables(
        _Step(compiled_model(model), autocast), (tokens_BN.clone(),), allow_unused_input=True
    )

    def forward(tokens_BN: Tensor) -> Output:
        logits_BNV, *alignment = graphed(tokens_BN)
        return Output(logits_BNV, *alignment) if alignment else Output(logits_BNV, None)

    return forward


class _Step(nn.Module):
    """A forward pass that returns tensors only, as a graph must."""

    def __init__(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, tokens_BN: Tensor) -> tuple[Tensor, ...]:
        with self.autocast():
            out = self.model(tokens_BN)
        return (out.logits_BNV,) if out.alignment is None else (out.logits_BNV, out.alignment)
