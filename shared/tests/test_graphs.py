"""The recorded step against the ordinary one."""

from __future__ import annotations

import copy

import pytest
import torch
from lab_shared.graphs import EAGER_STEPS, StepGraph
from lab_shared.muon import BatchedMuon
from lab_shared.optim import clip_grads, make_optimizer, set_lr
from torch import Tensor, nn


def make(device: str = "cpu") -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    batches = [torch.randint(11, (8, 5), generator=generator).to(device) for _ in range(3 * EAGER_STEPS)]
    return model.to(device), batches


def train(model: nn.Module, batches: list[Tensor], *, alone: bool) -> list[tuple[float, float]]:
    """alone: through StepGraph. Returns (loss, norm) of every step; the rate changes from step to step."""
    optimizer = make_optimizer(model, lr=0.01, muon_lr=0.02, weight_decay=0.1, compile=False)

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean()

    step, seen = StepGraph(loss_of, model, optimizer, clip=0.5), []
    for i, x in enumerate(batches):
        set_lr(optimizer, 1 / (1 + i))
        if alone:
            loss, norm = step(x)
        else:
            loss = loss_of(x)
            loss.backward()
            norm = clip_grads(list(model.parameters()), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
        assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    return seen


def test_off_cuda_it_is_the_ordinary_step() -> None:
    model, batches = make()
    other = copy.deepcopy(model)
    assert train(model, batches, alone=True) == train(other, batches, alone=False)
    assert all(p.equal(q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_muon_takes_its_rate_as_a_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers, tensors = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    gradient = torch.randn(6, 4, generator=generator)
    for p, lr in ((numbers, 0.3), (tensors, torch.tensor(0.3))):
        optimizer = BatchedMuon([p], lr=0.0, weight_decay=0.2)
        optimizer.param_groups[0]["lr"] = lr
        p.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(tensors, numbers)
    assert not tensors.allclose(torch.ones(6, 4), atol=0.01)


@pytest.mark.gpu
def test_recorded_steps_follow_ordinary_ones() -> None:
    model, batches = make("cuda")
    other = copy.deepcopy(model)
    recorded, ordinary = train(model, batches, alone=True), train(other, batches, alone=False)
    for got, expected in zip(recorded, ordinary, strict=True):
        assert got == pytest.approx(expected, rel=2e-2)  # Muon computes in bfloat16
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
    assert all(p.grad is None for p in model.parameters())
