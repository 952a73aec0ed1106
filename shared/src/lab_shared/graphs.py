"""A whole training step as one CUDA graph.

    step = StepGraph(loss_of, model, optimizer, clip=1.0)
    for tick in ticks(run, steps, model=model, optimizer=optimizer, lr=schedule):
        tokens = ...
        tick.stepped(*step(tokens), n=tokens.numel())

A small model's kernels are shorter than their launches, which the device then waits for; a graph has one launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lab_shared.dist import Dist, average_gradients
from lab_shared.optim import clip_grads

EAGER_STEPS = 3
"""Steps before the recording: they compile what is compiled, choose kernels and make the optimiser's state."""


class StepGraph:
    """Forward, backward, clipping, optimiser step and zero_grad, recorded once and then launched as one.

    loss_of: tensors of fixed shapes and types -> 0-d loss, without a look at their values; it is called a few times
    only. optimizer: of `make_optimizer`; its groups' `lr` are read anew in every step, everything else is recorded.
    clip: limit of the gradient norm; None only measures.

    dist: of several ranks the gradients are averaged, as DistributedDataParallel does, which must not be around the
    model: all in one sum after the backward pass, recorded with the rest. All ranks must begin with the same weights.

    The first EAGER_STEPS calls, and all calls off CUDA, are ordinary steps. Do not load other weights or another
    optimiser state once it has recorded.
    Source: PyTorch's notes on CUDA graphs (whole-network capture).
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        model: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
        dist: Dist | None = None,
    ) -> None:
        self._loss_of, self._optimizer, self._dist = loss_of, optimizer, dist or Dist()
        self._clip = math.inf if clip is None else clip
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._on_cuda = self._params[0].is_cuda
        self._calls = 0
        if self._on_cuda:
            self._stream = torch.cuda.Stream(self._params[0].device)
            self._graph = torch.cuda.CUDAGraph()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """One training step. Returns the loss and the gradient norm before clipping, which the next call overwrites."""
        self._calls += 1
        if not self._on_cuda:
            return self._step(*inputs)
        if self._calls <= EAGER_STEPS:
            # On the stream of the recording, whose kernels find their workspaces there.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._step(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._calls == EAGER_STEPS + 1:
            self._record(inputs)
        for ours, given in zip(self._inputs, inputs, strict=True):
            ours.copy_(given)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        return self._result

    def _step(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss = self._loss_of(*inputs)
        loss.backward()
        average_gradients(self._params, self._dist)
        norm = clip_grads(self._params, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        """Recording computes nothing: weights and state stay as they are."""
        groups = self._optimizer.param_groups
        self._inputs = [x.clone() for x in inputs]
        # A number would be recorded with its value, so the groups hold tensors for the time of the recording.
        self._rates = [torch.zeros((), device=self._params[0].device) for _ in groups]
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:  # torch's optimisers refuse to be recorded without
                group["capturable"] = True
        try:
            # Of several ranks NCCL's own thread asks for its events meanwhile, which "global" forbids to all threads.
            mode = "global" if self._dist.world == 1 else "thread_local"
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode=mode):
                self._result = self._step(*self._inputs)
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)
