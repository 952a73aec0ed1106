import math

import numpy as np
import pytest
import torch
from gauge_attn.gaussians import Centre, features, kl_divergence, svec, unsvec
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity

F64 = torch.float64


def full(sigma: torch.Tensor, d: int) -> torch.Tensor:
    if sigma.dim() == 3:
        return sigma[..., None, None] * torch.eye(d, dtype=sigma.dtype)
    return torch.diag_embed(sigma) if sigma.dim() == 4 else sigma


def pairwise(mu: torch.Tensor, sigma: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """KL(q_i || Omega_i Omega_j^T q_j) with inverses and determinants, one pair at a time."""
    cov = full(sigma, mu.size(-1)).numpy()
    m, turns = mu.numpy(), omega.numpy()
    kl = np.empty((*mu.shape[:3], mu.size(2)))
    for b, h, i, j in np.ndindex(kl.shape):
        turn = turns[b, i] @ turns[b, j].T
        moved = turn @ cov[b, h, j] @ turn.T
        inverse, shift = np.linalg.inv(moved), turn @ m[b, h, j] - m[b, h, i]
        log_ratio = np.linalg.slogdet(moved)[1] - np.linalg.slogdet(cov[b, h, i])[1]
        kl[b, h, i, j] = 0.5 * (np.trace(inverse @ cov[b, h, i]) + shift @ inverse @ shift - mu.size(-1) + log_ratio)
    return torch.from_numpy(kl)


@pytest.mark.parametrize("l", [0, 1, 2])
@pytest.mark.parametrize("kind", ["variances", "covariances", "isotropic"])
def test_features_are_the_divergences_pair_by_pair(beliefs, l, kind):
    x = beliefs(l, kind, n_batch=1, n_tokens=4)
    exact = pairwise(x.mu, x.sigma, x.frames)
    d = 2 * l + 1
    for centre in (Centre(), Centre(torch.tensor([0.4, 3.0], dtype=F64), torch.randn(2, d, dtype=F64))):
        query, key, to_reference = features(x.mu, x.sigma, x.frames, centre)
        assert query.size(-1) == (d + 2 if kind == "isotropic" else d * (d + 1) // 2 + d + 1)
        assert torch.equal(query[..., -1], torch.ones_like(query[..., -1]))
        assert_parity(0.5 * query @ key.mT + to_reference[..., None], exact, atol=1e-11)


@pytest.mark.parametrize("kind", ["variances", "covariances", "isotropic"])
def test_float32_keeps_its_digits_when_beliefs_cluster(beliefs, kind):
    x = beliefs(2, kind, spread=0.08)
    near = {"covariances": torch.eye(5, dtype=F64)}.get(kind, torch.ones((), dtype=F64))
    sigma = near + 0.01 * (x.sigma - near)
    exact = features(x.mu, sigma, x.frames, Centre())
    low = features(x.mu.float(), sigma.float(), x.frames.float(), Centre())
    kl, kl_low = (0.5 * q @ k.mT + r[..., None] for q, k, r in (exact, low))
    assert kl.mean() < 0.1
    assert_parity(kl_low, kl, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_svec_is_an_isometry_with_its_inverse(d, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, d, d, generator=generator, dtype=F64)
    a, b = a + a.mT, b + b.mT
    assert svec(a).shape == (3, d * (d + 1) // 2)
    assert_parity((svec(a) * svec(b)).sum(-1), (a @ b).diagonal(dim1=-2, dim2=-1).sum(-1), atol=1e-12)
    assert_parity(unsvec(svec(a), d), a, atol=1e-14)


def test_the_route_without_tf32_leads_to_the_same_features_under_autocast_too(monkeypatch, beliefs):
    x = beliefs(2, dtype=torch.float32)
    here = features(x.mu, x.sigma, x.frames, Centre())
    with monkeypatch.context() as patch:  # what float32 does on CUDA
        patch.setattr("gauge_attn.tables.could_be_tf32", lambda a: a.dtype == torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            there = features(x.mu, x.sigma, x.frames, Centre())
    for a, b in zip(here, there, strict=True):
        assert_parity(a, b, atol=1e-5, rtol=1e-5)


def test_divergence_of_equal_beliefs_is_zero_and_of_two_scalars_the_textbook_value():
    mean, cov = torch.randn(3, 5, dtype=F64), torch.eye(5, dtype=F64).expand(3, 5, 5) * 0.7
    assert_parity(kl_divergence(mean, cov, mean, cov), torch.zeros(3, dtype=F64), atol=1e-14)
    one = torch.tensor([1.0], dtype=F64)
    value = kl_divergence(one, 2 * one[None], 3 * one, 8 * one[None])
    assert value.item() == pytest.approx(0.5 * (2 / 8 + 4 / 8 - 1 + math.log(4)), abs=1e-14)
