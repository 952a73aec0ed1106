"""Folded circuits against the model's own attention and against the matrices written out."""

import pytest
import torch
from attn_clustering.analysis.circuits import (
    Factored,
    alignment,
    circuit_statistics,
    circuits,
    effective_rank,
    mean_rotation,
    probe_subspace,
)
from attn_clustering.config import ModelConfig
from attn_clustering.model import build_model, rotate, rotation
from lab_shared.testing import assert_parity


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def model(request):
    config = ModelConfig(vocab=40, d_model=24, layers=2, heads=4, kv_heads=request.param, head_dim=8, mlp=32)
    model = build_model(config, 0).eval()
    with torch.no_grad():
        for block in model.blocks:  # gains that matter
            for gain in (block.attn_norm, block.attn.q_norm, block.attn.k_norm):
                gain.weight.copy_(torch.rand(gain.weight.shape) + 0.5)
            for weight in (block.attn.q_proj.weight, block.attn.k_proj.weight):
                weight.mul_(20)
    return model


def rms(x):
    return (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def test_qk_scores_are_q_dot_k_without_rope(model):
    model.rope_on = False
    tokens = torch.randint(40, (2, 10), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(tokens)
    qk, ov = circuits(model)
    for layer in range(2):
        x = cache["resid_pre", layer]
        x = x / rms(x)
        attn, gain = model.blocks[layer].attn, model.blocks[layer].attn_norm.weight
        q, k = ((x * gain @ w.weight.T).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (attn.q_proj, attn.k_proj))
        k = k.repeat_interleave(4 // k.size(1), 1)
        scores = (x[:, None] @ qk.left[layer]) @ (x[:, None] @ qk.right[layer]).mT / (rms(q) * rms(k).mT)
        rot_q, rot_k = (cache[name, layer].transpose(1, 2) for name in ("rot_q", "rot_k"))
        assert_parity(scores, rot_q @ rot_k.repeat_interleave(4 // rot_k.size(1), 1).mT, atol=1e-4)
        written = (cache["pattern", layer] @ (x[:, None] @ ov.right[layer]) @ ov.left[layer].mT).sum(1)
        assert_parity(written, cache["attn_out", layer], atol=1e-5)


def test_svd_from_factors_is_the_svd_of_the_product(model):
    for matrix in circuits(model):
        u, s, v = matrix.svd()
        product = matrix.left @ matrix.right.mT
        assert_parity(u * s[..., None, :] @ v.mT, product, atol=1e-4)
        assert_parity(s, torch.linalg.svdvals(product)[..., : s.size(-1)], atol=1e-4)
        assert_parity(u.mT @ u, torch.eye(8).expand(2, 4, 8, 8), atol=1e-5)


def test_mean_rotation_is_the_mean_over_lags():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=g), torch.randn(8, generator=g)
    cos_sin = rotation(6, 8, 100.0, torch.device("cpu"))
    rotated_q, rotated_k = (rotate(x.expand(1, 6, 1, 8), cos_sin)[0, :, 0] for x in (q, k))
    by_lag = torch.stack([rotated_q[5] @ rotated_k[5 - lag] for lag in range(6)])
    assert_parity(q @ mean_rotation(8, 100.0, 6) @ k, by_lag.mean(), atol=1e-5)
    assert_parity(mean_rotation(8, 100.0, 1), torch.eye(8), atol=1e-6)


def test_alignment_is_energy_inside_the_subspace(model):
    weight = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(1))
    space = probe_subspace(weight)
    assert space.shape == (3, 24, 4)
    shifted = probe_subspace(weight + torch.randn(3, 24, 1))
    assert_parity(shifted @ shifted.mT, space @ space.mT, atol=1e-4)  # a shift of all topics is no direction
    qk, _ = circuits(model)
    left, right = alignment(qk, space[:-1])
    product = qk.left @ qk.right.mT
    project = (space @ space.mT)[:-1, None]
    assert_parity(left, (project @ product).square().sum((-2, -1)) / product.square().sum((-2, -1)), atol=1e-4)
    assert_parity(right, (product @ project).square().sum((-2, -1)) / product.square().sum((-2, -1)), atol=1e-4)
    inside = Factored(space[:-1, None], torch.randn(2, 1, 24, 4))
    assert_parity(alignment(inside, space[:-1])[0], torch.ones(2, 1), atol=1e-5)


def test_effective_rank():
    assert_parity(effective_rank(torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0]])), torch.tensor([4.0, 1]), atol=1e-5)


def test_statistics_have_one_value_a_head(model):
    found = circuit_statistics(model, torch.randn(3, 24, 5), rope_lags=4)
    assert found["qk_singular_values"].shape == (2, 4, 8)
    assert found["alignment_chance"] == pytest.approx(4 / 24)
    for name in ("qk_query_topic", "qk_key_topic", "ov_read_topic", "ov_write_topic"):
        assert found[name].shape == (2, 4)
        assert ((found[name] >= 0) & (found[name] <= 1)).all()
