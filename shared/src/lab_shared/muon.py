"""Muon with Newton-Schulz batched over equal shapes.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a weight matrix by
an approximation of its nearest semi-orthogonal matrix. The published implementations treat one matrix at a
time, which leaves a GPU waiting for launches; here equal shapes are stacked, and each stack is one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a x + b x^3 + c x^5, chosen for its slope at 0: it brings singular values near 1, not to 1."""


def newton_schulz(G_Bmn: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately orthogonalise a batch of matrices: U S V^T -> U S' V^T, S' within about [0.68, 1.14].

    G_Bmn: (B, m, n). Returns the same shape and type, contiguous; `dtype` is that of the arithmetic. The
    band is that of singular values above about 1% of the matrix's Frobenius norm; smaller ones grow by a
    factor of up to 485 (the slope at 0, 3.4445^5), and a zero matrix stays zero. Source: the iteration of
    muon-optimizer 0.1.0.
    """
    a, b, c = NS_COEFFICIENTS
    tall = G_Bmn.size(-2) > G_Bmn.size(-1)
    X = G_Bmn.to(dtype)
    if tall:  # of the two Gram matrices, take the smaller
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    if tall:
        X = X.mT
    return X.to(G_Bmn.dtype).contiguous()


@cache
def _compiled_newton_schulz() -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(newton_schulz, dynamic=False, fullgraph=True)

    def call(G_Bmn: Tensor) -> Tensor:
        # One graph per shape is intended, and a model may have more shapes than Dynamo's default limit of 8.
        with torch._dynamo.config.patch(recompile_limit=256):
            return compiled(G_Bmn)

    return call


class BatchedMuon(Optimizer):
    """Muon with Nesterov momentum, 5 Newton-Schulz steps and decoupled weight decay.

        m <- lerp(m, g, 1 - momentum)
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows/cols)) NS(lerp(g, m, momentum))

    The update of muon-optimizer 0.1.0 and torch.optim.Muon. On CUDA each stack of equal shapes is one
    compiled bf16 call (the first step compiles, some seconds per shape); elsewhere eager fp32. More than two
    dimensions count as rows x everything else. Parameters without a gradient are skipped. Every rank of a
    DDP job computes the same update from the same averaged gradients. A group's lr may be a 0-d tensor, as a recorded
    step needs (see `lab_shared.graphs`).

    compile: None compiles on CUDA only. Raises ValueError for a parameter with fewer than two dimensions.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        compile: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.compile = compile
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon takes matrices, not shape {tuple(p.shape)}: give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss if there is one. No host synchronisation."""
        loss = evaluate(closure)
        for group in self.param_groups:
            stacks: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for params in stacks.values():
                self._step_stack(params, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _step_stack(self, params: list[Tensor], lr: float | Tensor, momentum: float, weight_decay: float) -> None:
        shape, on_cuda = params[0].shape, params[0].is_cuda
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        G_Bmn = torch.stack(torch._foreach_lerp(grads, buffers, momentum)).flatten(2)

        if on_cuda if self.compile is None else self.compile:
            O_Bmn = _compiled_newton_schulz()(G_Bmn)
        else:
            # A CPU without bf16 instructions is slower in bf16 than in fp32.
            O_Bmn = newton_schulz(G_Bmn, torch.bfloat16 if on_cuda else torch.float32)

        rows, cols = G_Bmn.shape[1:]
        updates = O_Bmn.view(-1, *shape).unbind(0)
        size = math.sqrt(max(1.0, rows / cols))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            O_Bmn.mul_(-size * lr)
            torch._foreach_add_(params, updates)
        else:
            torch._foreach_add_(params, updates, alpha=-lr * size)


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of an optimizer step's closure, computed with gradients; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
