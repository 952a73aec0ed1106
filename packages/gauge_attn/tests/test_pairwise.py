import pytest
import torch
from gauge_attn.pairwise import pairwise_kl_attention
from gauge_attn.reference import dense_kl_attention, taylor4_frames
from gauge_attn.so3 import frames
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity

FIELDS = ("mean", "lse", "kl", "beta", "divergence")


def curved(phi_BN3):
    i_BNN3, j_BNN3 = torch.broadcast_tensors(phi_BN3[:, :, None], phi_BN3[:, None])
    return lambda l: frames(torch.linalg.cross(i_BNN3, j_BNN3), l)


@settings(max_examples=25, deadline=None)
@given(
    l=st.integers(0, 3),
    covariance=st.sampled_from(["full", "diag_approx"]),
    taylor=st.booleans(),
    curvature=st.booleans(),
    self_mask=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition(l, covariance, taylor, curvature, self_mask, seed):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(2, 3, 7, 2 * l + 1, generator=generator, dtype=torch.float64)
    sigma = torch.rand(mu.shape, generator=generator, dtype=torch.float64) + 0.3
    phi = 0.4 * torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    kappa_H = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64)
    matrices = taylor4_frames(phi, l) if taylor else frames(phi, l)
    between = curved(phi)(l) if curvature else None
    transport = None if between is None else matrices[:, :, None] @ between @ matrices[:, None].mT
    options = {"self_mask": self_mask, "covariance": covariance}
    fast = pairwise_kl_attention(mu, sigma, matrices, kappa_H, between=between, **options)
    dense = dense_kl_attention(mu, sigma, matrices, kappa_H, transport=transport, mean_only=True, **options)
    for field in FIELDS:
        assert_parity(getattr(fast, field), getattr(dense, field), atol=1e-8, rtol=1e-8, name=field)


@pytest.mark.parametrize("covariance", ["full", "diag_approx"])
def test_gradients_are_those_of_the_definition(covariance, beliefs):
    x = beliefs(1, n_tokens=6)
    kappa_H = torch.tensor([0.5, 1.0], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x.mu, x.sigma, x.phi)]

    def gradients(attention, **options):
        mu, sigma, phi = leaves
        done = attention(mu, sigma, taylor4_frames(phi, 1), kappa_H, covariance=covariance, **options)
        return torch.autograd.grad(done.mean.square().sum() + done.kl.sum(), leaves)

    pairs = zip(gradients(pairwise_kl_attention), gradients(dense_kl_attention, mean_only=True), strict=True)
    for fast, dense in pairs:
        assert_parity(fast, dense, atol=1e-9, rtol=1e-8)
