import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.losses import angle_loss, vmf_nll
from lab_shared.testing import assert_parity


def unit(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


def rotate_off(target_E3, angle_E, kappa_E):
    """Vectors of length kappa at the given angle from the target, float64."""
    t = target_E3.double()
    helper = torch.where(t[:, :1].abs() < 0.9, t.new_tensor([1.0, 0, 0]), t.new_tensor([0, 1.0, 0]))
    side = torch.nn.functional.normalize(torch.linalg.cross(t, helper), dim=-1)
    return kappa_E[:, None] * (angle_E.cos()[:, None] * t + angle_E.sin()[:, None] * side)


def nll_float64(kappa, cos_psi):
    """-log density of vMF in float64, by whichever form does not cancel."""
    if kappa < 1e-3:
        return math.log(4 * math.pi) + kappa**2 / 6 - kappa * cos_psi
    return math.log(2 * math.pi) - math.log(kappa) + math.log1p(-math.exp(-2 * kappa)) + kappa * (1 - cos_psi)


def gradient(loss, v, target):
    v = v.clone().requires_grad_()
    value, _ = loss(v, target)
    return value.detach(), torch.autograd.grad(value, v)[0]


@given(
    angle=st.floats(1e-3, math.pi - 1e-3),
    kappa=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_angle_is_the_angle(angle, kappa, seed):
    target = unit(1, seed=seed)
    v = rotate_off(target, torch.tensor([angle]).double(), torch.tensor([kappa]).double()).float()
    value, grad = gradient(angle_loss, v, target)
    assert abs(float(value) - angle) < 2e-4 * (1 + 1e-3 / kappa)
    # moving along the great circle changes the angle at unit rate: |gradient| = 1 / |v|, across v
    assert float(grad.norm()) * kappa == pytest.approx(1, rel=2e-2)
    assert abs(float((grad * v).sum())) < 1e-2


@pytest.mark.parametrize("loss", [angle_loss, vmf_nll])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e4])
def test_gradients_are_finite_at_parallel_opposite_and_zero(loss, scale):
    target = torch.cat([unit(50, seed=3), torch.eye(3), -torch.eye(3)])
    for v in (scale * target, -scale * target, torch.zeros_like(target)):
        value, grad = gradient(loss, v, target)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert grad.abs().max() <= 1.01e5


def test_angle_at_the_special_points():
    t = torch.eye(3)
    assert float(angle_loss(t, t)[0]) / 3 < 2e-5
    assert float(angle_loss(-t, t)[0]) / 3 == pytest.approx(math.pi, abs=2e-5)
    value, grad = gradient(angle_loss, torch.zeros(3, 3), t)
    assert float(value) / 3 == pytest.approx(math.pi / 2, abs=1e-6)
    assert ((-grad * t).sum(-1) > 0).all()  # descent from v = 0 goes to the target
    _, grad = gradient(angle_loss, t.clone(), t)
    assert grad.norm() < 1e-4  # the minimum is stationary (what is left lengthens v)


def test_angle_gradient_does_not_vanish_at_a_tenth_of_a_degree():
    # a clipped arccos has no gradient below 0.8 degrees
    target = unit(20, seed=5)
    angle = torch.full((20,), math.radians(0.1)).double()
    _, grad = gradient(angle_loss, rotate_off(target, angle, torch.ones(20).double()).float(), target)
    assert_parity(grad.norm(dim=-1), torch.ones(20), atol=1e-2)


@pytest.mark.parametrize("kappa", [1e-6, 1e-3, 0.1, 0.499, 0.5, 0.501, 1.0, 10.0, 300.0, 1e4, 1e5])
@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.3, 1.5, 3.0, math.pi])
def test_vmf_matches_float64(kappa, angle):
    target = unit(8, seed=1)
    v = rotate_off(target, torch.full((8,), angle).double(), torch.full((8,), kappa).double()).float()
    for i in range(8):
        # the rounding of the inputs to float32 is not the function's error: evaluate at the rounded inputs
        v64, t64 = v[i].double().numpy(), target[i].double().numpy()
        t64 = t64 / np.linalg.norm(t64)
        k = float(np.linalg.norm(v64))
        psi = math.atan2(np.linalg.norm(np.cross(v64, t64)), v64 @ t64)
        expected = nll_float64(k, 1 - 2 * math.sin(psi / 2) ** 2)
        assert float(vmf_nll(v[i : i + 1], target[i : i + 1])[0]) == pytest.approx(expected, rel=3e-6, abs=3e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.7, 5.0, 200.0])
def test_vmf_density_integrates_to_one(kappa):
    nodes, weights = np.polynomial.legendre.leggauss(200)  # in cos psi
    t = torch.tensor([[0.0, 0.0, 1.0]]).expand(200, 3)
    s = np.sqrt(1 - nodes**2)
    v = kappa * torch.tensor(np.stack([s, 0 * s, nodes], -1), dtype=torch.float32)
    nll = np.array([float(vmf_nll(v[i : i + 1], t[i : i + 1])[0]) for i in range(200)])
    assert 2 * np.pi * (weights * np.exp(-nll)).sum() == pytest.approx(1, rel=1e-5)


@given(log_kappa=st.floats(-6, 5), angle=st.floats(0, math.pi), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_vmf_gradient_matches_the_formula(log_kappa, angle, seed):
    """d NLL / dv = A(k) v / k - t with A(k) = coth k - 1/k."""
    kappa, target = 10.0**log_kappa, unit(1, seed=seed)
    v = rotate_off(target, torch.tensor([angle]).double(), torch.tensor([kappa]).double()).float()
    _, grad = gradient(vmf_nll, v, target)
    v64 = v.double()
    k = float(v64.norm())
    a = k / 3 if k < 1e-3 else 1 / math.tanh(k) - 1 / k
    assert_parity(grad, a * v64 / k - target.double(), atol=3e-6)


def test_both_losses_are_rotation_invariant():
    v, target = 3 * unit(100, seed=1), unit(100, seed=2)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7)))[0].float()
    for loss in (angle_loss, vmf_nll):
        assert float(loss(v @ q.T, target @ q.T)[0]) == pytest.approx(float(loss(v, target)[0]), rel=1e-5)


@pytest.mark.parametrize("loss", [angle_loss, vmf_nll])
def test_only_valid_events_count_and_junk_rows_cannot_leak(loss):
    v, target = unit(6, seed=1), unit(6, seed=2)
    valid = torch.tensor([True, True, False, True, False, False])
    v[2], v[4], target[5] = math.nan, math.inf, 0.0
    leaf = v.clone().requires_grad_()
    total, count = loss(leaf, target, valid)
    total.backward()
    assert int(count) == 3
    assert float(total.detach()) == pytest.approx(float(loss(v[valid], target[valid])[0]))
    assert (leaf.grad[~valid] == 0).all()
    assert torch.isfinite(leaf.grad).all()
    assert int(loss(v[valid], target[valid])[1]) == 3


@pytest.mark.parametrize("loss", [angle_loss, vmf_nll])
def test_losses_are_float32_for_low_precision_outputs(loss):
    v, target = (2 * unit(10, seed=1)).bfloat16(), unit(10, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss(v, target)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(loss(v.float(), target)[0]))


def test_vmf_is_finite_for_absurd_lengths():
    target = unit(4, seed=1)
    for kappa in (0.0, 1e-30, 1e12):
        value, grad = gradient(vmf_nll, kappa * unit(4, seed=2), target)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
