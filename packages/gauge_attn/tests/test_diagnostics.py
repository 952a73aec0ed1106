import math

import pytest
import torch
from gauge_attn import Irreps, diagnostics
from gauge_attn.attention import kl_attention, prepare
from gauge_attn.diagnostics import (
    diversity,
    kl_statistics,
    row_std_onehot,
    row_std_uniform,
    sharpness,
)
from gauge_attn.printed import averaged_line, baselines, diversity_line, head_line, verdict
from gauge_attn.reference import dense_kl_attention
from gauge_attn.so3 import frames_for, rope_frames
from lab_shared.testing import assert_parity

F64 = torch.float64
KAPPA = torch.tensor([0.43, 0.05], dtype=F64)


def row_std_of(beta):
    """The seed's: per row the population standard deviation over all keys but the query's own, then the mean."""
    n = beta.size(-1)
    others = beta.masked_select(~torch.eye(n, dtype=torch.bool)).view(*beta.shape[:-1], n - 1)
    return others.std(-1, correction=0).mean((0, 2))


def figures_of(beta, kl, self_mask):
    keys = (torch.arange(beta.size(-1), dtype=F64) + (0 if self_mask else 1)).clamp_min(1)
    entropy = -torch.special.xlogy(beta, beta).sum(-1)
    square = beta.square().sum(-1)
    some = keys >= 2
    return {
        "row_std": row_std_of(beta),
        "entropy_ratio": (entropy[..., some] / keys[some].log()).mean((0, 2)),
        "effective_keys": (1 / square).mean((0, 2)),
        "participation": square.mean((0, 2)),
        "relative_participation": (keys * square)[..., some].mean((0, 2)),
        "attended_kl": kl.mean((0, 2)),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"self_mask": True}, {"alibi": 0.3}, {"alibi": 0.3, "self_mask": True}, {"rope": True}],
)
@pytest.mark.parametrize("kind", ["variances", "covariances", "isotropic"])
def test_every_figure_is_that_of_the_matrix(beliefs, kind, options):
    x = beliefs(1, kind, n_tokens=20)
    if "rope" in options:
        options = {"rope": rope_frames(1, torch.arange(20), torch.tensor(0.3, dtype=F64))}
    dense = dense_kl_attention(x.mu, x.sigma, x.frames, KAPPA, **options)
    got = sharpness(x.mu, x.sigma, x.frames, KAPPA, **options)
    self_mask = options.get("self_mask", False)
    for name, value in figures_of(dense.beta, dense.kl, self_mask).items():
        assert_parity(getattr(got, name), value, atol=1e-10, name=name)
    uniform, onehot = row_std_uniform(20, self_mask), row_std_onehot(20)
    assert_parity(got.row_std_rescaled, (got.row_std - uniform) / (onehot - uniform), atol=1e-14)


@pytest.mark.parametrize("n", [2, 3, 64, 99])
@pytest.mark.parametrize("self_mask", [True, False])
def test_baselines_are_those_of_the_uniform_and_the_one_hot_matrix(n, self_mask):
    uniform = torch.ones(n, n, dtype=F64).tril(-1 if self_mask else 0)
    uniform[0, 0] = 1
    uniform = uniform / uniform.sum(-1, keepdim=True)
    assert row_std_uniform(n, self_mask) == pytest.approx(row_std_of(uniform[None, None]).item(), abs=1e-11)
    onehot = torch.eye(n, dtype=F64).roll(-1, 1)
    onehot[0], onehot[-1] = torch.eye(n, dtype=F64)[0], torch.eye(n, dtype=F64)[0]
    assert row_std_onehot(n) == pytest.approx(row_std_of(onehot[None, None]).item(), abs=1e-14)


def test_the_thresholds_at_the_lengths_of_the_claim():
    assert round(row_std_uniform(64), 4) == 0.0217
    assert round(row_std_uniform(128), 4) == 0.0113
    assert round(row_std_onehot(64), 4) == 0.1230
    assert round(row_std_onehot(128), 4) == 0.0877
    assert all(row_std_onehot(n) < 0.10 for n in range(99, 400))


def test_equal_beliefs_are_uniform_and_far_apart_ones_one_hot():
    mu = torch.zeros(1, 1, 64, 1, dtype=F64)
    same = sharpness(mu, torch.ones_like(mu), None, 0.43, self_mask=True)
    assert same.row_std.item() == pytest.approx(row_std_uniform(64), abs=1e-10)
    assert same.entropy_ratio.item() == pytest.approx(1, abs=1e-12)
    assert same.row_std_rescaled.item() == pytest.approx(0, abs=1e-10)
    apart = sharpness(torch.arange(64, dtype=F64).view(1, 1, 64, 1), torch.ones_like(mu), None, 1e-2, self_mask=True)
    assert apart.row_std.item() == pytest.approx(row_std_onehot(64), abs=1e-10)
    assert apart.effective_keys.item() == pytest.approx(1, abs=1e-10)
    with pytest.raises(ValueError, match="at least two tokens, got 1"):
        sharpness(mu[:, :, :1], mu[:, :, :1] + 1, None, 0.4)


def test_divergence_statistics_are_those_of_the_matrix_averaged_over_heads(monkeypatch):
    monkeypatch.setattr(diagnostics, "_CHUNK", 16)
    irreps = Irreps("2x0e+2x1e+1x2e")
    generator = torch.Generator().manual_seed(0)
    mu, phi = irreps.randn(2, 50, generator=generator), torch.randn(2, 50, 3, generator=generator, dtype=F64)
    sigma, omega = irreps.randn(2, 50, generator=generator).exp().double(), frames_for(irreps, phi)
    sigmas = irreps.split(sigma)
    parts = [(m.double(), sigmas[l], omega[l], 1.0) for l, m in irreps.split(mu).items()]
    matrix = torch.cat([dense_kl_attention(*part, mean_only=True).divergence[0] for part in parts]).mean(0)
    got = kl_statistics([prepare(*part) for part in parts])
    pairs = matrix[~torch.eye(50, dtype=torch.bool)]
    for value, exact in (
        (got.mean, pairs.mean()),
        (got.std, pairs.std()),
        (got.smallest, pairs.min()),
        (got.largest, pairs.max()),
    ):
        assert value == pytest.approx(exact.item(), rel=1e-10)


def test_attended_divergence_and_its_gradient_are_those_of_the_matrix(beliefs):
    x = beliefs(1)
    leaves = [t.clone().requires_grad_() for t in x[:3]]
    ours = kl_attention(*leaves, 0.43, self_mask=True, mean_only=True, return_kl=True).kl
    dense = dense_kl_attention(*leaves, 0.43, self_mask=True)
    exact = (dense.beta * dense.divergence).sum(-1)
    assert_parity(ours, exact, atol=1e-11)
    pairs = zip(torch.autograd.grad(ours.sum(), leaves[:2]), torch.autograd.grad(exact.sum(), leaves[:2]), strict=True)
    for one, other in pairs:
        assert_parity(one, other, atol=1e-9)


def test_lines_in_the_format_of_the_seed():
    assert head_line(8, "ℓ2", 0.0684) == "Head 8 (ℓ2): row_std=0.0684 [⚠MEDIUM]"
    assert head_line(0, "ℓ0", 0.0243) == "Head 0 (ℓ0): row_std=0.0243 [❌UNIFORM]"
    assert head_line(1, "ℓ0", 0.2).endswith("[✓SHARP]")
    assert baselines(64) == "(N=64: uniform 0.0217, one-hot 0.1230)"
    assert averaged_line([0.02, 0.1]) == "Averaged: row_std=0.0600 [⚠MEDIUM]"
    assert [verdict(v) for v in (0.05, 0.0501, 0.1)] == ["❌UNIFORM", "⚠MEDIUM", "⚠MEDIUM"]
    values = {
        "n": 64,
        "mu_dist": 0.4962,
        "phi_std": 0.4827,
        "kl_std": 0.0134,
        "kl_min": 0.0002,
        "kl_max": 0.0896,
        "kl_mean": 0.0192,
        "sigma_min": 0.002629,
        "sigma_max": 6.713892,
        "sigma_mean": 1.005399,
    }
    assert diversity_line(values).splitlines() == [
        "[DIVERSITY] μ_dist: 0.4962 | φ_std: 0.4827 | KL_std: 0.0134",
        "            KL range: [0.0002, 0.0896] | mean: 0.0192",
        "            σ range: [0.002629, 6.713892] | mean: 1.005399",
        "            row_std at N=64: uniform 0.0217 | one-hot 0.1230",
    ]


def test_diversity_of_embeddings(beliefs):
    x = beliefs(1, n_batch=1, n_heads=1, n_tokens=9)
    kl = kl_statistics([prepare(x.mu, x.sigma, x.frames, 1.0)])
    values = diversity(x.mu[0, 0], x.sigma[0, 0], x.phi[0], kl)
    distances = [(x.mu[0, 0, i] - x.mu[0, 0, j]).norm().item() for i in range(9) for j in range(9) if i != j]
    assert values["mu_dist"] == pytest.approx(sum(distances) / 72)
    assert values["phi_std"] == pytest.approx(sum(x.phi[0, :, a].std().item() for a in range(3)) / 3)
    assert (values["sigma_min"], values["sigma_max"]) == (x.sigma.min().item(), x.sigma.max().item())
    assert (values["n"], values["kl_mean"]) == (9, kl.mean)


@pytest.mark.slow
def test_8192_tokens_without_their_matrix():
    generator = torch.Generator().manual_seed(0)
    mu = 0.081 * torch.randn(1, 1, 8192, 1, generator=generator, dtype=F64)
    got = sharpness(mu, torch.ones_like(mu), None, 0.0086, self_mask=True)
    square, rows = torch.empty(8192, dtype=F64), torch.empty(8192, dtype=F64)
    for i in range(8192):  # one row at a time
        past = mu[0, 0, : max(i, 1), 0]
        beta = (-0.5 * (past - mu[0, 0, i, 0]).square() / 0.0086).softmax(0)
        square[i] = beta.square().sum()
        rows[i] = math.sqrt(max(square[i].item() / 8191 - 1 / 8191**2, 0)) if i else 0
    assert got.participation.item() == pytest.approx(square.mean().item(), rel=1e-10)
    assert got.row_std.item() == pytest.approx(rows.mean().item(), abs=1e-10)
    statistics = kl_statistics([prepare(mu, torch.ones_like(mu), None, 0.0086)])
    assert statistics.mean == pytest.approx(0.081**2, rel=0.05)
