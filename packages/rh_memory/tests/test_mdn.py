"""Mixtures against numerical integration, sampling and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity
from rh_memory.config import ModelConfig
from rh_memory.mdn import MDNHead, Mixture, average

KINDS = ["gaussian", "lognormal"]


def mixture(kind, seed=0, batch=(3,), k=4):
    g = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(*batch, k, generator=g, dtype=torch.float64)
    loc = 1 + 0.4 * torch.randn(*batch, k, generator=g, dtype=torch.float64)
    scale = 0.1 + 0.4 * torch.rand(*batch, k, generator=g, dtype=torch.float64)
    return Mixture(log_weights, loc - 1 if kind == "lognormal" else loc, scale, kind)


def grid(kind):
    """Points dense enough for the trapezoid rule to 1e-6 (geometric for lognormals, which have long tails)."""
    if kind == "gaussian":
        return torch.linspace(-6, 9, 30_001, dtype=torch.float64)
    return torch.linspace(-7, 5, 60_001, dtype=torch.float64).exp()


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one_and_to_the_cdf_and_the_mean(kind):
    m, y = mixture(kind), grid(kind)[:, None]
    p = m.log_prob(y).exp()
    assert_parity(torch.trapezoid(p, y, dim=0), torch.ones(3), atol=1e-6)
    assert_parity(torch.trapezoid(p * y, y, dim=0), m.mean(), atol=1e-5)
    cdf = torch.cumulative_trapezoid(p, y, dim=0)
    assert_parity(cdf[::500], (m.cdf(y) - m.cdf(y[0]))[1::500], atol=1e-6)
    below = torch.where(y < 0, p, 0)
    assert_parity(torch.trapezoid(below, y, dim=0), m.mass_below_zero(), atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), y=st.floats(-0.5, 4))
def test_crps_is_the_integral_of_the_squared_cdf_error(kind, seed, y):
    m, x = mixture(kind, seed, batch=(1,)), grid(kind)
    error = m.cdf(x) - (x >= y).double()
    # the first cell of the lognormal grid, and what lies between a negative y and zero, where F = 0
    missing = max(0.0, float(x[0]) - y) if kind == "lognormal" else 0.0
    integral = torch.trapezoid(error.square(), x) + missing
    assert_parity(m.crps(torch.tensor([y], dtype=torch.float64))[0], integral, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), p=st.floats(1e-4, 1 - 1e-4))
def test_quantile_inverts_the_cdf(kind, seed, p):
    m = mixture(kind, seed)
    assert_parity(m.cdf(m.quantile(p)), torch.full((3,), p, dtype=torch.float64), atol=1e-9)


def test_many_quantiles_at_once():
    m, p = mixture("gaussian", batch=(2, 3)), torch.tensor([0.1, 0.5, 0.9])
    quantiles = m.quantile(p[:, None, None])
    assert quantiles.shape == (3, 2, 3)
    assert_parity(quantiles[1], m.quantile(0.5), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_density(kind):
    m = mixture(kind, batch=())
    y = m.sample(torch.Generator().manual_seed(1), n=4000)
    uniform = m.cdf(y).sort().values
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (uniform - steps).abs().max() < 1.95 / 4000**0.5  # Kolmogorov: 0.1 %
    again = m.sample(torch.Generator().manual_seed(1), n=4000)
    assert torch.equal(y, again)
    assert mixture(kind).sample().shape == (3,)


def test_lognormals_never_go_below_zero():
    m = mixture("lognormal")
    assert torch.equal(m.mass_below_zero(), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(m.log_prob(torch.tensor(0.0)), torch.full((3,), -math.inf, dtype=torch.float64))
    assert m.sample(n=1000).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_has_finite_gradients_even_outside_the_support(kind):
    loc = torch.zeros(2, 4, requires_grad=True)
    y = torch.tensor([0.5, 2.0]) if kind == "gaussian" else torch.tensor([0.5, -1.0])
    log_p = Mixture(torch.zeros(2, 4), loc, torch.ones(2, 4), kind).log_prob(y)
    log_p[0].backward()
    assert torch.isfinite(loc.grad).all()


def test_indexing_the_batch_keeps_the_components():
    m = mixture("gaussian", batch=(2, 5))
    y = torch.full((2,), 0.8, dtype=torch.float64)
    assert_parity(m[:, -1].log_prob(y), m.log_prob(y[:, None])[:, -1], atol=1e-14)
    assert m[0].batch_shape == (5,)
    assert m[..., 1:3].batch_shape == (2, 2)


def test_average_is_the_mean_of_the_densities():
    ms, y = [mixture("gaussian", seed) for seed in (1, 2, 3)], torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    mean = torch.stack([m.log_prob(y).exp() for m in ms]).mean(0)
    assert_parity(average(ms).log_prob(y).exp(), mean, atol=1e-12)


def test_entropy_of_the_weights():
    even = Mixture(torch.zeros(1, 8), torch.zeros(1, 8), torch.ones(1, 8))
    assert float(even.entropy_of_weights()) == pytest.approx(math.log(8))
    assert float(Mixture(torch.tensor([50.0, 0, 0]), torch.zeros(3), torch.ones(3)).entropy_of_weights()) < 1e-6


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown mixture kind 'student'"):
        Mixture(torch.zeros(1), torch.zeros(1), torch.ones(1), "student")


@pytest.mark.parametrize("kind", KINDS)
def test_head_is_float32_and_respects_its_floor(kind):
    torch.manual_seed(0)
    head = MDNHead(ModelConfig(d_model=16, mixture=kind, sigma_floor=0.05, head_init="spread"))
    head.reset_bias()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = head.mixture(torch.zeros(2, 16))
    assert m.loc.dtype == torch.float32
    assert (m.scale > 0.05).all()
    centres = m.component_means() if kind == "gaussian" else m.loc.exp()
    np.testing.assert_allclose(centres[0].detach(), np.linspace(1 / 3, 5 / 3, 8), rtol=1e-5)
