"""All models: causality, decoding, parameters, initialisation, optimiser groups, overfitting, golden losses."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gauge_attn.config import PRESETS, ModelConfig, OptimConfig
from gauge_attn.generate import generate
from gauge_attn.models import build_model, build_optimizer
from gauge_attn.models.gpt import matched_width, parameter_count
from gauge_attn.models.layers import bounded_log_sigma, declare
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity, golden
from torch.nn import functional as F

VOCAB, WINDOW = 12, 10
MODELS = ("faithful", "practical", "gpt")
VARIANTS = (*MODELS, "faithful-vfe", "practical-seeing-itself", "practical-scalars", "practical-no-scalar-heads")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_changes_no_bit_of_the_past(name, make, tokens):
    model, x = make(name), tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % VOCAB
    assert torch.equal(model(x).logits_BNV[:, :6], model(changed).logits_BNV[:, :6])
    assert not torch.equal(model(x).logits_BNV[:, 6:], model(changed).logits_BNV[:, 6:])


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_is_the_full_forward(name, make, tokens):
    model, x = make(name).eval(), tokens()
    with torch.no_grad():
        full = model(x).logits_BNV
        cache = model.new_cache()
        pieces = [model(part, cache=cache).logits_BNV for part in x.split([1, 4, 1, 1, 3], dim=1)]
    assert_parity(torch.cat(pieces, 1), full, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_beyond_the_window_is_an_error(name, make, tokens):
    model = make(name)
    with pytest.raises(ValueError, match="do not fit the model's window of 10"):
        model(tokens(n=WINDOW + 1))


def test_parameter_counts(make):
    count = {name: sum(p.numel() for p in make(name).parameters()) for name in MODELS}
    k = 2 + 3 + 5
    assert count["faithful"] == VOCAB * (2 * k + 3) + WINDOW * k + VOCAB * k
    assert count["gpt"] == parameter_count(16, 2, VOCAB)
    s, c1, c2, m, v, heads = 8, 2, 2, 12, 2, 4
    invariants = s + c1 + c2
    embed = VOCAB * (s + 3 * c1 + 5 * c2 + 3)
    scalar_heads = 2 * 2 * s + 4 * s + 2 * v * s + 2 + 2
    vector_heads = sum(3 * c + 2 * s + v * s + 2 for c in (c1, c2))
    mixers = s * heads * v + c1 + c2
    mlp = c1**2 + c2**2 + m * invariants + invariants * m + c1**2 + c2**2
    block = 2 * invariants + scalar_heads + vector_heads + mixers + mlp
    assert count["practical"] == embed + 2 * block + invariants + c1**2 + c2**2 + VOCAB * invariants


def test_presets_of_equal_parameters():
    for kind, vocab in (("quick", 32), ("small", 256)):
        practical, gpt = PRESETS["quick" if kind == "quick" else "practical-small"][1], PRESETS[f"gpt-{kind}"][1]
        a, b = (sum(p.numel() for p in build_model(c.model, vocab, 64).parameters()) for c in (practical, gpt))
        assert abs(a - b) / a < 0.1
        assert gpt.model.d_model == matched_width(a, gpt.model.layers, vocab, gpt.model.heads)


def test_initialisation_is_the_modules_own():
    torch.manual_seed(0)
    config = ModelConfig(arch="faithful", kappa=0.09, frame_std=0.3)
    model = build_model(config, 2000, 16)
    assert model.mean_VK.std().item() == pytest.approx(0.3, rel=0.02)  # sqrt(kappa)
    assert model.phi_V3.std().item() == pytest.approx(0.3, rel=0.02)
    assert model.position_NK.std().item() == pytest.approx(0.3, rel=0.2)
    assert model.readout_VK.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.log_sigma_VK.any()
    assert build_model(replace(config, mean_std=0.02), 2000, 16).mean_VK.std().item() == pytest.approx(0.02, rel=0.02)
    practical = build_model(ModelConfig(), 2000, 16)
    assert practical.embeddings["1"].std().item() == pytest.approx(1.0, rel=0.02)
    assert practical.phi_V3.std().item() == pytest.approx(0.1, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1e4, 1e4))
def test_log_sigma_never_leaves_its_bounds(raw):
    bounded = bounded_log_sigma(torch.tensor(raw)).item()
    assert abs(bounded) <= math.log(1e3) + 1e-5
    assert (bounded > 0) == (raw > 0) or raw == 0 or abs(raw) < 1e-30


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group_and_unknown_ones_are_refused(name, make):
    model = make(name)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    roles = {p: p.role for p in model.parameters()}
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            assert {roles[p] for p in group["params"]} <= {"hidden", "readout"}
    with pytest.raises(ValueError, match="has role None"):
        build_optimizer(copy.deepcopy(model), OptimConfig())  # copies lose their roles
    declare(next(iter(model.parameters())), "banana")
    with pytest.raises(ValueError, match="has role 'banana'"):
        build_optimizer(model, OptimConfig())


def steps(make, tokens, name, n, lr=3.0, **optim):
    """Losses of n steps on one batch."""
    model = make(name)
    rates = {f"{role}_lr": lr * 0.01 for role in ("mean", "phi", "kappa", "sigma", "readout")}
    optimizer = build_optimizer(model, OptimConfig(lr=lr * 3e-3, **rates, **optim))
    x = torch.cat([tokens(2), tokens(2)[:, :1]], 1)
    losses = []
    for _ in range(n):
        loss = F.cross_entropy(model(x[:, :-1]).logits_BNV.flatten(0, 1), x[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_learnt_by_heart(name, make, tokens):
    losses = steps(make, tokens, name, 35, lr=4.0)
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert losses[-1] < 0.6


@pytest.mark.parametrize("name", MODELS)
def test_golden_losses(name, make, tokens):
    golden(Path(__file__).parent / "golden" / f"{name}.json", steps(make, tokens, name, 20, lr=1.0), rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generation_goes_on_beyond_the_window(name, make, tokens):
    model = make(name).eval()
    out = generate(model, tokens(1, 4)[0], 15, temperature=0)
    assert out.shape == (19,)
    assert torch.equal(out[:4], tokens(1, 4)[0])
    with torch.no_grad():  # the first tokens are those of the plain forward
        assert out[4] == model(out[None, :4]).logits_BNV[0, -1].argmax()
        assert out[9] == model(out[None, :9]).logits_BNV[0, -1].argmax()
