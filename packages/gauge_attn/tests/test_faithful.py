"""The faithful model: its routes and options, the free-energy step, temperatures."""

import pytest
import torch
from gauge_attn.measure import calibrate, diversity_of, head_records, kl_std_per_head
from gauge_attn.models.faithful import turned
from gauge_attn.models.layers import Temperature
from gauge_attn.so3 import frames_for
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity
from torch.nn import functional as F


def test_dense_route_equals_the_exact_one(make, tokens):
    exact, dense = make("faithful"), make("faithful", route="dense")
    dense.load_state_dict(exact.state_dict())
    assert_parity(dense(tokens()).logits_BNV, exact(tokens()).logits_BNV, atol=1e-5)
    a, b = head_records(exact, tokens()), head_records(dense, tokens())
    of_exact, of_dense = diversity_of(exact, tokens()), diversity_of(dense, tokens())
    assert of_dense == pytest.approx(of_exact, rel=1e-3, abs=1e-6)
    for x, y in zip(a, b, strict=True):
        for key in ("row_std", "entropy_ratio", "effective_keys", "attended_kl", "row_std_rescaled"):
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=1e-5), key


def test_dense_options_change_what_they_should(make, tokens):
    base = make("faithful", route="dense", layers=1, frame_std=0.6)
    logits = base(tokens()).logits_BNV
    for change in ({"covariance": "diag_approx"}, {"exponential": "taylor4"}, {"curvature": 0.5}):
        other = make("faithful", route="dense", layers=1, frame_std=0.6, **change)
        torch.nn.init.normal_(other.log_sigma_VK, std=0.3)
        base.load_state_dict(other.state_dict())
        logits = base(tokens()).logits_BNV
        assert (other(tokens()).logits_BNV - logits).abs().max() > 1e-5, change


def test_options_that_exclude_each_other_are_user_errors(make):
    with pytest.raises(UserError, match=r"needs --model\.route dense"):
        make("faithful", curvature=0.1)
    with pytest.raises(UserError, match="free-energy step is made of exact features"):
        make("faithful-vfe", route="dense")
    with pytest.raises(UserError, match="whole covariances"):
        make("faithful", gauge_fixed=True, vfe_step=True)
    with pytest.raises(UserError, match="no multiple of 2 heads"):
        make("gpt", d_model=18)


def test_gauge_fixed_beliefs_have_no_divergence(make, tokens):
    model = make("faithful", gauge_fixed=True, frame_std=1.0)
    torch.nn.init.normal_(model.log_sigma_VK, std=0.5)
    assert max(abs(r["attended_kl"]) for r in head_records(model, tokens())) < 1e-4
    mu, sigma = torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 3) + 0.5
    assert_parity(turned((mu, sigma), None)[1], torch.diag_embed(sigma), atol=0)


def test_a_free_energy_step_descends_the_free_energy(make):
    """Its direction is minus sigma times the gradient of the free energy that its docstring states."""
    from gauge_attn.models.faithful import vfe_step

    torch.manual_seed(0)
    mu = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    sigma = torch.rand_like(mu) + 0.5
    frame = frames_for(make("faithful").irreps, torch.randn(1, 6, 3, dtype=torch.float64))[1]
    prior = (torch.randn_like(mu), torch.rand_like(mu) + 0.5)
    kappa_H = torch.tensor([0.5, 1.5], dtype=torch.float64)
    i = 4
    probe = mu[:, :, i].clone().requires_grad_()
    moved = mu.clone()
    moved[:, :, i] = 0
    query = moved + F.one_hot(torch.tensor(i), 6).view(1, 1, 6, 1) * probe[:, :, None]
    omega = frame[:, :, None] @ frame[:, None].mT
    keys = (omega[:, None, i] @ mu[..., None])[..., 0]
    cov = omega[:, None, i] @ torch.diag_embed(sigma) @ omega[:, None, i].mT
    delta = query[:, :, i, None] - keys
    quad = (delta[..., None, :] @ torch.linalg.inv(cov) @ delta[..., None])[..., 0, 0]
    trace = (torch.linalg.inv(cov) @ torch.diag_embed(sigma[:, :, i, None])).diagonal(dim1=-2, dim2=-1).sum(-1)
    kl = 0.5 * (quad + trace - 3 + cov.logdet() - sigma[:, :, i, None].log().sum(-1))[:, :, : i + 1]
    free = -(kappa_H[:, None] * torch.logsumexp(-kl / kappa_H[:, None], -1, keepdim=True)).sum()
    free = free + 0.5 * ((probe - prior[0][:, :, i]).square() / prior[1][:, :, i]).sum()
    (gradient,) = torch.autograd.grad(free, probe)
    stepped = vfe_step(mu, sigma, prior, frame, kappa_H, torch.tensor(0.1, dtype=torch.float64), self_mask=False)
    assert_parity(stepped[:, :, i], mu[:, :, i] - 0.1 * sigma[:, :, i] * gradient, atol=1e-9)


@pytest.mark.parametrize(("mode", "expected"), [("shared", [2, 2]), ("dim", [2, 10]), ("sqrt_dim", [2, 2 * 5**0.5])])
def test_temperature_modes(mode, expected):
    assert Temperature([1, 5], 2.0, mode)().tolist() == pytest.approx(expected)


def test_standardised_temperatures_give_every_head_the_same_logit_std(make, tokens):
    model = make("faithful", kappa_mode="standardised", kappa=0.5)
    calibrate(model, tokens(8))
    for layer, stds in zip(model.layers, kl_std_per_head(model, tokens(8)), strict=True):
        for l, std_H in stds.items():
            assert (std_H / layer[str(l)].temperature()).tolist() == pytest.approx([2.0] * len(std_H), rel=1e-4)
