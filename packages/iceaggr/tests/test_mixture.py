"""The mixture of von Mises-Fisher densities: its normalisation, mean, gradients and limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.losses import angle_loss, mean_vector, mixture_nll, mixture_parts, pointing, vmf_nll
from lab_shared.testing import assert_parity
from torch.nn import functional as F


def sphere(n=40_000):
    """Fibonacci points of equal area, float64."""
    i = torch.arange(n, dtype=torch.float64) + 0.5
    z, phi = 1 - 2 * i / n, math.pi * (1 + math.sqrt(5)) * i
    r = (1 - z * z).sqrt()
    return torch.stack([r * phi.cos(), r * phi.sin(), z], 1)


def some_mixture(kappas, seed=0):
    g = torch.Generator().manual_seed(seed)
    mu = F.normalize(torch.randn(len(kappas), 3, generator=g), dim=-1)
    v = mu * torch.tensor(kappas)[:, None]
    return torch.cat([v, torch.randn(len(kappas), 1, generator=g)], 1).reshape(1, -1)


@pytest.mark.parametrize("kappas", [[0.0, 0.3], [0.4, 3.0, 20.0], [9.0, 11.0], [60.0, 60.0, 60.0, 0.01]])
def test_mixture_density_integrates_to_one_and_has_the_mean_it_says(kappas):
    """Against sums over the sphere; the equivalent vMF has the mean resultant of the mixture."""
    out, points = some_mixture(kappas), sphere()
    v_K3, log_w_K = (x[0].double() for x in mixture_parts(out))
    each_KN = torch.stack(
        [vmf_density(v, points) for v in v_K3],
    )
    density_N = (log_w_K.exp()[:, None] * each_KN).sum(0)
    area = 4 * math.pi / len(points)
    assert float(density_N.sum() * area) == pytest.approx(1, abs=2e-3)
    some = points[:: len(points) // 50].float()
    nll = torch.stack([mixture_nll(out, p[None])[0] for p in some])
    assert_parity(nll, -density_N[:: len(points) // 50].log(), atol=2e-4, rtol=1e-5)
    mean = (density_N[:, None] * points).sum(0) * area
    v = mean_vector(out)[0].double()
    k = float(v.norm())
    length = 1 / math.tanh(k) - 1 / k if k > 1e-3 else k / 3
    assert_parity(v / v.norm() * length, mean, atol=3e-4)


def vmf_density(v, points):
    k = float(v.norm())
    if k < 1e-6:
        return torch.full((len(points),), 1 / (4 * math.pi), dtype=torch.float64)
    return k / (2 * math.pi * -math.expm1(-2 * k)) * torch.exp(points @ v - k)


@given(
    logs=st.lists(st.floats(-6, 4), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_mixture_has_finite_gradients_at_every_kappa(logs, seed):
    out = some_mixture([10.0**x for x in logs], seed).requires_grad_()
    target = F.normalize(torch.randn(1, 3, generator=torch.Generator().manual_seed(seed + 1)), dim=-1)
    for loss in (mixture_nll(out, target)[0], angle_loss(pointing(out), target)[0], mean_vector(out).sum()):
        (gradient,) = torch.autograd.grad(loss, out)
        assert torch.isfinite(gradient).all()
    nothing = torch.zeros(1, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture_nll(nothing, target)[0], nothing)
    assert torch.isfinite(gradient).all()
    assert gradient[0, :3].abs().max() > 0


def test_mixture_gradients_match_differences():
    out = some_mixture([0.3, 4.0, 30.0], 3).double()
    target = F.normalize(torch.tensor([[0.2, -0.5, 0.7]]), dim=-1)
    x = out.float().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture_nll(x, target)[0], x)
    for i in range(out.shape[1]):
        step = torch.zeros_like(out)
        step[0, i] = 1e-2
        up, down = (mixture_nll((out + s).float(), target)[0].double() for s in (step, -step))
        assert float(gradient[0, i]) == pytest.approx(float(up - down) / 2e-2, abs=2e-3)


@given(log_kappa=st.floats(-4, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_equal_components_are_one(log_kappa, seed):
    v = some_mixture([10.0**log_kappa], seed)[:, :3]
    both = torch.cat([v, torch.tensor([[0.3]]), v, torch.tensor([[-1.0]])], 1)
    target = F.normalize(torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)
    one = vmf_nll(v, target)[0]
    assert_parity(mixture_nll(both, target)[0], one, atol=1e-5, rtol=1e-5)
    # float32 holds 1 - A(kappa), the reciprocal of kappa, to 1e-7
    assert_parity(mean_vector(both), v, atol=1e-6, rtol=2e-6 * (1 + 10**log_kappa) + 1e-4)
    assert mean_vector(v) is v


def test_unused_events_do_not_count():
    out, target = torch.full((2, 8), torch.nan), torch.nn.functional.normalize(torch.ones(2, 3), dim=-1)
    out[0] = some_mixture([2.0, 3.0])
    out.requires_grad_()
    loss, n = mixture_nll(out, target, torch.tensor([True, False]))
    (gradient,) = torch.autograd.grad(loss, out)
    assert int(n) == 1
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
