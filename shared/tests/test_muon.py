"""Newton-Schulz and batched Muon against a slow reference: one matrix at a time, by singular values, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared import muon as lab_muon
from lab_shared.muon import BatchedMuon, newton_schulz
from torch import Tensor, nn

# Newton-Schulz


def polynomial(s: Tensor) -> Tensor:
    a, b, c = lab_muon.NS_COEFFICIENTS
    for _ in range(lab_muon.NS_STEPS):
        s = a * s + b * s**3 + c * s**5
    return s


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 10**6), st.floats(-3, 3))
@settings(deadline=None, max_examples=60)
def test_newton_schulz_acts_on_singular_values(m: int, n: int, batch: int, seed: int, log_scale: float) -> None:
    G = torch.randn(batch, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    O = newton_schulz(G * 10**log_scale, torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    relative = S / S.norm(dim=-1, keepdim=True)
    S_out = torch.linalg.svdvals(O)
    torch.testing.assert_close(O, U @ torch.diag_embed(polynomial(relative)) @ Vh, atol=1e-3, rtol=1e-3)
    if relative.min() > 0.01:
        assert S_out.min() > 0.68
        assert S_out.max() < 1.14
    assert O.shape == G.shape
    assert O.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 40, 40), (3, 64, 24), (1, 24, 64)])
def test_newton_schulz_bf16_band(shape: tuple[int, ...]) -> None:
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(newton_schulz(G))
    well_conditioned = torch.linalg.svdvals(G) / G.flatten(1).norm(dim=1)[:, None] > 0.02
    assert S[well_conditioned].min() > 0.65
    assert S.max() < 1.2


def test_zero_gradient_gives_zero_update() -> None:
    assert newton_schulz(torch.zeros(2, 3, 4)).eq(0).all()


# Muon


def naive_muon(
    weights: list[Tensor],
    gradients: list[list[Tensor | None]],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> list[Tensor]:
    """One matrix at a time in float64, by singular values."""
    out = []
    for i, weight in enumerate(weights):
        W = weight.double().clone()
        buffer = torch.zeros_like(W)
        for step in gradients:
            if step[i] is None:
                continue
            g = step[i].double()
            buffer = momentum * buffer + (1 - momentum) * g
            G = ((1 - momentum) * g + momentum * buffer).reshape(len(W), -1)
            U, S, Vh = torch.linalg.svd(G, full_matrices=False)
            O = U @ torch.diag(polynomial(S / S.norm())) @ Vh
            scale = max(1.0, G.shape[0] / G.shape[1]) ** 0.5
            W = (1 - lr * weight_decay) * W - lr * scale * O.reshape(W.shape)
        out.append(W)
    return out


def test_batched_muon_equals_naive() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (3, 2, 4), (6, 4), (7, 1, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    start = [p.detach().clone() for p in params]
    gradients: list[list[Tensor | None]] = [
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)
    ]
    gradients[1][0] = gradients[2][3] = gradients[0][5] = None  # a parameter may be out of use for a step
    optimizer = BatchedMuon(params, lr=0.1, momentum=0.9, weight_decay=0.3)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        assert all(p.grad is None or torch.equal(p.grad, g) for p, g in zip(params, step, strict=True))
    for p, reference in zip(params, naive_muon(start, gradients, 0.1, 0.9, 0.3), strict=True):
        torch.testing.assert_close(p.detach().double(), reference, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_many_shapes_compile_one_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than Dynamo's default limit of recompilations, and none is compiled twice."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    lab_muon._compiled_newton_schulz.cache_clear()
    try:
        shapes = [(n, n + k) for n in range(3, 8) for k in (0, 1)]
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = BatchedMuon(params, lr=0.1, compile=True)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert len(graphs) == len(shapes) == 10
    finally:
        lab_muon._compiled_newton_schulz.cache_clear()
        torch._dynamo.reset()


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"not shape \(3,\): give it to AdamW"):
        BatchedMuon([nn.Parameter(torch.zeros(3))])
