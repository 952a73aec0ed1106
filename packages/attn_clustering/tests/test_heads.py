"""Head kinds on made-up patterns, and ablations on a small model."""

import math

import pytest
import torch
from attn_clustering.analysis.ablation import ablate, ablation_hooks, mean_outputs, random_heads_like, top_heads
from attn_clustering.analysis.heads import KINDS, head_scores, repeated_random
from attn_clustering.analysis.passes import attention_pass, example_patterns, residuals
from attn_clustering.config import ModelConfig
from attn_clustering.model import build_model, next_token_targets
from lab_shared.testing import assert_parity


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab=50, d_model=24, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=32)
    model = build_model(config, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.fixture
def tokens():
    return torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0))


def looking_back(lag, t):
    index = torch.arange(t)
    pattern = torch.zeros(1, 1, t, t)
    pattern[..., index, (index - lag).clamp_min(0)] = 1
    return pattern


def test_each_kind_of_head_has_its_own_score():
    n = 8
    patterns = torch.cat([looking_back(lag, 2 * n) for lag in (1, n, n - 1)], 1)
    assert_parity(head_scores(patterns), torch.eye(3), atol=0)
    assert KINDS == ("previous_token", "duplicate_token", "induction")
    uniform = torch.ones(1, 1, 512, 512).tril() / torch.arange(1, 513)[:, None]
    assert_parity(head_scores(uniform)[:, 0], torch.full((3,), math.log(2) / 256), atol=1e-5)


def test_repeated_sequences_repeat(tokens):
    repeated = repeated_random(tokens, 10, 5)
    assert repeated.shape == (5, 20)
    assert torch.equal(repeated[:, :10], repeated[:, 10:])
    assert torch.isin(repeated, tokens).all()


@torch.no_grad()
def test_a_mean_ablated_head_says_the_same_in_every_sequence(model, tokens):
    means = mean_outputs(model, [tokens[:4], tokens[4:]])
    seen = {}
    hooks = ablation_hooks([(0, 1), (1, 2), (1, 3)], means)
    watch = [(f"blocks.{i}.attn.hook_z", lambda z, point: seen.__setitem__(point.layer(), z)) for i in range(2)]
    ablated = model.run_with_hooks(tokens, [*hooks, *watch])
    assert_parity(seen[0][:, :, 1], means[0][None, :, 1].expand(6, -1, -1), atol=1e-6)
    assert_parity(seen[1][:, :, 2:], means[1][None, :, 2:].expand(6, -1, -1, -1), atol=1e-6)
    _, cache = model.run_with_cache(tokens, ["blocks.0.attn.hook_z"])
    whole = cache["z", 0]
    assert torch.equal(seen[0][:, :, [0, 2, 3]], whole[:, :, [0, 2, 3]])
    assert (ablated - model(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_ablation_of_one_sequence_changes_nothing_and_of_several_does(model, tokens):
    """The mean over one sequence is the sequence itself."""
    topics = torch.randint(3, tokens.shape, generator=torch.Generator().manual_seed(1))
    weight, bias = torch.randn(24, 3, generator=torch.Generator().manual_seed(2)), torch.zeros(3)
    score = torch.arange(8.0).view(2, 4)

    def run(n):
        part = (tokens[:n], next_token_targets(tokens[:n]), topics[:n])
        return ablate(model, [part], score, weight, bias, torch.arange(3, 16, 4), 2)

    alone, several = run(1), run(6)
    assert alone["heads"] == [[1, 3], [1, 2]]
    assert alone["top"]["loss"] == pytest.approx(alone["whole"]["loss"], abs=1e-5)
    assert abs(several["top"]["loss"] - several["whole"]["loss"]) > 1e-4
    assert several["whole"]["loss"] == pytest.approx(float(model(tokens, next_token_targets(tokens))), abs=1e-5)
    assert len(several["random_draws"]) == 4


def test_random_heads_are_others_of_the_same_layers():
    generator = torch.Generator().manual_seed(0)
    chosen = top_heads(torch.tensor([[5.0, 1, 4, 0], [0, 0, 0, 3]]), 3)
    assert chosen == [(0, 0), (0, 2), (1, 3)]
    drawn = random_heads_like(chosen, 4, generator)
    assert not set(drawn) & set(chosen)
    assert sorted(layer for layer, _ in drawn) == [0, 0, 1]
    assert random_heads_like([(0, 0), (0, 1), (0, 2)], 4, generator) == [(0, 3)]


@torch.no_grad()
def test_passes_see_what_the_cache_holds(model, tokens, monkeypatch):
    from attn_clustering.analysis import legacy, passes
    from attn_clustering.analysis.attention import AttentionStats

    topics = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(3)).repeat_interleave(4, 1)
    monkeypatch.setitem(passes.ELEMENTS, "cpu", 2 * 4 * 16 * 16)  # batches of two
    got = attention_pass(model, tokens, topics, 3)
    _, cache = model.run_with_cache(tokens)
    stats = AttentionStats(topics, 2, 4)
    for layer in range(2):
        stats.add(layer, slice(0, 6), cache["pattern", layer])
    for name, value in stats.result().items():
        assert_parity(got[name].nan_to_num(7), value.nan_to_num(7), atol=1e-5, name=name)
    q, k = (cache[name, 1].transpose(1, 2) for name in ("rot_q", "rot_k"))
    expected = legacy.legacy_metrics(legacy.noncausal_pattern(q, k), topics, 3)
    assert_parity(got["legacy_within_noncausal"][1], expected["legacy_within"], atol=1e-5)
    assert not torch.allclose(got["legacy_within_noncausal"], got["legacy_within_causal"])

    positions = torch.tensor([3, 9])
    features = residuals(model, tokens, positions)
    assert_parity(features[0], cache["hook_embed"][:, positions], atol=0)
    assert_parity(features[2], cache["resid_post", 1][:, positions], atol=1e-6)
    shown = example_patterns(model, tokens[0])
    assert shown.shape == (2, 4, 16, 16)
    assert (shown.amax(-1) == 255).all()
