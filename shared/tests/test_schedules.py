"""Learning-rate schedules and gradient clipping, against torch's and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.optim import clip_grads, lr_multiplier, set_lr
from torch import nn


@pytest.mark.parametrize(("total", "warmup"), [(50, 10), (37, 11), (9, 3)])
def test_one_cycle_is_torchs(total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1.0,
        total_steps=total,
        pct_start=warmup / total,
        cycle_momentum=False,
        div_factor=25,
        final_div_factor=1000,
    )
    for step in range(total):
        assert lr_multiplier("one_cycle", step, total, warmup=warmup) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_schedule_values() -> None:
    assert [lr_multiplier("constant", s, 8, warmup=4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = [lr_multiplier("cosine", s, 10, warmup=2, final=0.1) for s in range(12)]
    assert cosine[:3] == [0.5, 1, 1]
    assert cosine[6] == pytest.approx(0.55)  # half way
    assert cosine[7] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 5 / 8)) / 2)
    assert cosine[10] == cosine[11] == pytest.approx(0.1)
    wsd = [lr_multiplier("wsd", s, 10, warmup=2, decay=4) for s in range(12)]
    assert wsd == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


@given(
    st.sampled_from(["constant", "cosine", "one_cycle", "wsd"]),
    st.integers(1, 200),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_schedules_rise_then_fall(kind: str, total: int, warmup_fraction: float, final: float) -> None:
    warmup = int(warmup_fraction * total)
    values = [lr_multiplier(kind, s, total, warmup=warmup, final=final) for s in range(total + 2)]
    assert all(0 <= v <= 1 for v in values)
    peak = max(warmup - 1, 0)
    if kind == "wsd" and warmup > total - total // 5:
        return  # the decay begins before the warm-up ends
    assert all(a <= b + 1e-12 for a, b in pairwise(values[: peak + 1]))
    assert values[peak] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in pairwise(values[peak:]))
    if kind != "constant" and peak < total - 1:
        assert values[-1] == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "linear", "step": 0, "total": 9}, "unknown schedule 'linear'"),
        ({"kind": "cosine", "step": -1, "total": 9}, "step -1"),
        ({"kind": "cosine", "step": 0, "total": 0}, "total >= 1"),
        ({"kind": "cosine", "step": 0, "total": 9, "warmup": 0.05}, "warmup=0.05 is a number of steps"),
        ({"kind": "cosine", "step": 0, "total": 9, "warmup": 10}, "out of total=9"),
        ({"kind": "wsd", "step": 0, "total": 9, "decay": 0.2}, "decay=0.2 is a number of steps"),
    ],
)
def test_schedule_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_multiplier(**arguments)


def test_set_lr_needs_base_lr() -> None:
    with pytest.raises(KeyError, match="make_optimizer"):
        set_lr(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 0.5)


# clipping


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 100))
@settings(deadline=None)
def test_clip_is_torchs_for_finite_gradients(scale: float, max_norm: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    for p in params[:-1]:  # the last has no gradient
        p.grad = scale * torch.randn(p.shape, generator=generator)
    theirs = [nn.Parameter(p.detach().clone()) for p in params[:-1]]
    for p, t in zip(params, theirs, strict=False):
        t.grad = p.grad.clone()
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(clip_grads(iter(params), max_norm), expected)
    for p, t in zip(params, theirs, strict=False):
        torch.testing.assert_close(p.grad, t.grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clip_leaves_gradients_of_a_non_finite_norm(bad: float) -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, bad, 300.0])
    before = p.grad.clone()
    assert not clip_grads([p], 1.0).isfinite()
    torch.testing.assert_close(p.grad, before, equal_nan=True)


def test_clip_edges() -> None:
    p = nn.Parameter(torch.zeros(2))
    assert clip_grads([p], 1.0) == 0  # no gradient at all
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_grads([p], math.inf) == 5
    assert p.grad.tolist() == [3, 4]
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            clip_grads([p], bad)
