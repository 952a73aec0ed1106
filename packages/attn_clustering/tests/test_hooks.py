"""Hooks see what the model computes, change it when asked, and are not there otherwise."""

import json

import pytest
import safetensors.torch
import torch
from attn_clustering.config import ModelConfig
from attn_clustering.hooks import Hook, hook_names, save_activations
from attn_clustering.model import build_model
from lab_shared.testing import assert_parity

TOKENS = torch.arange(3 * 9).reshape(3, 9) * 5 % 19


@pytest.fixture(scope="module")
def model():
    model = build_model(ModelConfig(vocab=19, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24), 0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= 20
    return model.eval()


def test_cache_holds_every_name_and_the_logits_are_those_of_training(model):
    logits, cache = model.run_with_cache(TOKENS)
    assert list(cache) == hook_names(model)
    assert_parity(logits, model(TOKENS), atol=1e-4)
    assert cache["pattern", 1].shape == (3, 4, 9, 9)
    assert cache["q", 0].shape == (3, 9, 4, 4)
    assert cache["k", 0].shape == (3, 9, 2, 4)
    assert cache["post", 1] is cache["blocks.1.mlp.hook_post"]
    assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])
    with pytest.raises(KeyError, match="hook_nothing"):
        cache["nothing", 0]


def test_the_pattern_is_causal_and_explains_z(model):
    _, cache = model.run_with_cache(TOKENS, lambda name: name.startswith("blocks.1.attn"))
    assert all(name.startswith("blocks.1.attn") for name in cache)
    pattern = cache["pattern", 1]
    assert pattern.triu(1).eq(0).all()
    assert_parity(pattern.sum(-1), torch.ones(3, 4, 9), atol=1e-6)
    assert_parity(cache["attn_scores", 1].softmax(-1), pattern, atol=1e-6)
    v = cache["v", 1].repeat_interleave(2, 2)
    assert_parity(torch.einsum("bhqk,bkhc->bqhc", pattern, v), cache["z", 1], atol=1e-5)


def test_scores_are_products_of_the_rotated_queries_and_keys(model):
    _, cache = model.run_with_cache(TOKENS)
    q, k = cache["rot_q", 0], cache["rot_k", 0].repeat_interleave(2, 2)
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / 2
    seen = cache["attn_scores", 0]
    assert_parity(seen.masked_fill(seen.isinf(), 0), scores.tril(), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.attn.hook_q", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]
)
def test_a_replacement_changes_the_output(model, name):
    zeroed = model.run_with_hooks(TOKENS, [(name, lambda x, point: torch.zeros_like(x))])
    left = model.run_with_hooks(TOKENS, [(name, lambda x, point: None)])
    assert (zeroed - model(TOKENS)).abs().max() > 1e-3
    assert torch.equal(left, model(TOKENS))


def test_patterns_and_scores_can_be_replaced(model):
    def own_token_only(pattern, point):
        assert point.layer() == 0
        return torch.eye(pattern.size(-1)).expand_as(pattern)

    def own_token_scores(scores, point):
        return scores.masked_fill(~torch.eye(scores.size(-1), dtype=torch.bool), -torch.inf)

    by_pattern = model.run_with_hooks(TOKENS, [("blocks.0.attn.hook_pattern", own_token_only)])
    by_scores = model.run_with_hooks(TOKENS, [("blocks.0.attn.hook_attn_scores", own_token_scores)])
    assert (by_pattern - model(TOKENS)).abs().max() > 1e-3
    assert_parity(by_scores, by_pattern, atol=1e-4)
    kept = []
    both = [
        ("blocks.0.attn.hook_attn_scores", own_token_scores),
        ("blocks.0.attn.hook_pattern", lambda pattern, point: kept.append(pattern)),
    ]
    model.run_with_hooks(TOKENS, both)
    assert_parity(kept[0], torch.eye(9).expand(3, 4, 9, 9), atol=0)


def test_watching_sees_what_hooks_see_and_makes_no_logits(model, monkeypatch):
    names = ["hook_embed", "blocks.0.attn.hook_pattern", "blocks.1.hook_resid_post"]
    _, cache = model.run_with_cache(TOKENS, names)
    monkeypatch.setattr(model, "head", lambda *_: pytest.fail("logits were made"))
    seen = {}
    model.watch(TOKENS, [(name, lambda x, point: seen.__setitem__(point.name, x)) for name in names])
    assert list(seen) == names
    assert all(torch.equal(seen[name], cache[name]) for name in names)
    with pytest.raises(ValueError, match="after the last block"):
        model.watch(TOKENS, [("ln_final.hook_normalized", lambda x, point: None)])


def test_without_hooks_there_are_none(model, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a hook ran in a plain forward pass")

    monkeypatch.setattr(Hook, "run", forbidden)
    model(TOKENS)
    with pytest.raises(AssertionError, match="plain forward"):
        model.run_with_cache(TOKENS)


def test_a_misspelt_name_is_refused_with_the_likely_one(model):
    with pytest.raises(ValueError, match=r"blocks.0.attn.hook_pattern"):
        model.run_with_cache(TOKENS, ["blocks.0.attn.hook_patern"])
    with pytest.raises(ValueError, match="belongs to no layer"):
        model.run_with_hooks(TOKENS, [("hook_embed", lambda x, point: point.layer())])


def test_activations_on_disk_are_those_of_the_cache(model, tmp_path):
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
    topics = TOKENS % 3
    path = save_activations(model, TOKENS, tmp_path, names, topics_NT=topics, first_id=100, batch=2)
    index = json.loads(path.read_text())
    assert [(f["first_id"], f["sequences"]) for f in index["files"]] == [(100, 2), (102, 1)]
    assert index["shapes"]["blocks.0.attn.hook_z"] == [9, 4, 4]
    shards = [safetensors.torch.load_file(tmp_path / f["file"]) for f in index["files"]]
    _, cache = model.run_with_cache(TOKENS, names)
    for name in names:
        assert_parity(torch.cat([s[name] for s in shards]), cache[name], atol=1e-5)
    assert torch.cat([s["topics"] for s in shards]).equal(topics.int())
