import pytest
import torch
from gauge_attn.reference import dense_kl_attention, taylor4_frames
from gauge_attn.so3 import frames, generators
from lab_shared.testing import assert_parity

F64 = torch.float64


@pytest.mark.parametrize("kind", ["variances", "covariances", "isotropic"])
def test_the_dense_reference_is_its_definition_in_loops(beliefs, kind):
    x = beliefs(1, kind, n_batch=1, n_heads=1, n_tokens=4)
    got = dense_kl_attention(x.mu, x.sigma, x.frames, 0.5, alibi=0.2, self_mask=True)
    mu, omega = x.mu[0, 0], x.frames[0]
    full = {"variances": torch.diag_embed, "isotropic": lambda s: s[..., None, None] * torch.eye(3, dtype=F64)}
    cov = full.get(kind, lambda s: s)(x.sigma)[0, 0]
    normal = torch.distributions.MultivariateNormal
    for i in range(4):
        moved = [omega[i] @ omega[j].mT for j in range(4)]
        means = [t @ mu[j] for j, t in enumerate(moved)]
        covs = [t @ cov[j] @ t.mT for j, t in enumerate(moved)]
        kl = torch.stack(
            [
                torch.distributions.kl_divergence(normal(mu[i], cov[i]), normal(m, c))
                for m, c in zip(means, covs, strict=True)
            ]
        )
        assert_parity(got.divergence[0, 0, i], kl, atol=1e-12)
        seen = range(i) if i else [0]
        weights = torch.stack([-kl[j] / 0.5 - 0.2 * (i - j) for j in seen]).softmax(0)
        mean = sum(w * means[j] for w, j in zip(weights, seen, strict=True))
        covariance = sum(
            w * (covs[j] + torch.outer(means[j] - mean, means[j] - mean)) for w, j in zip(weights, seen, strict=True)
        )
        assert_parity(got.beta[0, 0, i, list(seen)], weights, atol=1e-13)
        assert got.beta[0, 0, i].sum().item() == pytest.approx(1)
        assert_parity(got.mean[0, 0, i], mean, atol=1e-13)
        expected = covariance.diagonal().mean() if kind == "isotropic" else covariance
        assert_parity(got.covariance[0, 0, i], expected, atol=1e-12)


def test_the_taylor_series_is_truncated_at_four_and_its_transpose_is_that_of_minus_phi(beliefs):
    phi = beliefs(2).phi
    a = torch.einsum("...a,aij->...ij", phi, generators(2))
    series = torch.eye(5, dtype=F64) + a + a @ a / 2 + a @ a @ a / 6 + a @ a @ a @ a / 24
    assert_parity(taylor4_frames(phi, 2), series, atol=1e-12)
    assert_parity(taylor4_frames(-phi, 2), series.mT, atol=1e-12)
    assert_parity(taylor4_frames(0.01 * phi, 2), frames(0.01 * phi, 2), atol=1e-6)


def test_truncation_makes_divergences_of_a_belief_from_itself(beliefs):
    """By definition KL(q_i || Omega_ii q_i) is 0; with the truncated series it grows with l (phi of std 0.4827)."""
    spurious = []
    for l in (1, 2, 3):
        x = beliefs(l, n_tokens=16, n_heads=1)
        phi = 0.4827 * x.phi
        sigma = torch.ones_like(x.sigma)
        exact = dense_kl_attention(0.081 * x.mu, sigma, frames(phi, l), 1.0, mean_only=True)
        truncated = dense_kl_attention(0.081 * x.mu, sigma, taylor4_frames(phi, l), 1.0, mean_only=True)
        assert exact.covariance is None
        assert exact.divergence.diagonal(dim1=-2, dim2=-1).abs().max() < 1e-12
        spurious.append(truncated.divergence.diagonal(dim1=-2, dim2=-1).mean().item())
    assert spurious[0] < 0.05
    assert spurious[1] > 0.3
    assert spurious[2] > spurious[1]


def test_the_diagonal_approximation_is_its_formula_and_not_the_divergence(beliefs):
    x = beliefs(2, n_batch=1, n_heads=1, n_tokens=5)
    got = dense_kl_attention(x.mu, x.sigma, x.frames, 0.5, covariance="diag_approx")
    for i in range(5):
        for j in range(5):
            turn = x.frames[0, i] @ x.frames[0, j].mT
            own, var = x.sigma[0, 0, i], (turn**2) @ x.sigma[0, 0, j]
            shift = turn @ x.mu[0, 0, j] - x.mu[0, 0, i]
            kl = 0.5 * (own / var + shift**2 / var - 1 + var.log() - own.log()).sum()
            assert_parity(got.divergence[0, 0, i, j], kl, atol=1e-12)
    off = got.covariance - torch.diag_embed(got.covariance.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() == 0
    exact = dense_kl_attention(x.mu, x.sigma, x.frames, 0.5)
    assert (exact.divergence - got.divergence).abs().max() > 0.1
    with pytest.raises(ValueError, match="needs variances"):
        dense_kl_attention(x.mu, x.sigma[..., 0], x.frames, 0.5, covariance="diag_approx")


def test_transport_of_pairs_includes_the_flat_one_and_curvature(beliefs):
    x = beliefs(1)
    flat = x.frames[:, :, None] @ x.frames[:, None].mT
    same = dense_kl_attention(x.mu, x.sigma, None, 0.5, transport=flat)
    for one, other in zip(same, dense_kl_attention(x.mu, x.sigma, x.frames, 0.5), strict=True):
        assert_parity(one, other, atol=1e-12)
    bent = flat @ frames(torch.randn(2, 13, 13, 3, dtype=F64, generator=torch.Generator().manual_seed(3)), 1)
    assert (dense_kl_attention(x.mu, x.sigma, None, 0.5, transport=bent).mean - same.mean).abs().max() > 0.1
    with pytest.raises(ValueError, match="no cache"):
        dense_kl_attention(x.mu, x.sigma, x.frames, 0.5, cache=object())


def test_a_misspelt_option_is_no_option(beliefs):
    x = beliefs(1)
    dense_kl_attention(x.mu, x.sigma, x.frames, 0.5, precision="fp32", return_lse=True)
    with pytest.raises(TypeError, match="self_masks"):
        dense_kl_attention(x.mu, x.sigma, x.frames, 0.5, self_masks=True)
