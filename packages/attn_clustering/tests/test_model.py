"""The model against its formula, a naive float64 reference, and the properties attention must have."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attn_clustering.config import ORDERINGS, ModelConfig
from attn_clustering.experiments import EXPERIMENTS, run_config, with_attention
from attn_clustering.model import IGNORE, Transformer, build_model, n_parameters, next_token_targets, rotate, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity

TINY = ModelConfig(vocab=23, d_model=24, layers=2, heads=4, kv_heads=4, head_dim=6, mlp=40)
TOKENS = torch.arange(2 * 11).reshape(2, 11) * 7 % 23


def tiny(attention="mha", seed=0, **changes):
    """A tiny float64 model whose gains are not all one."""
    model = build_model(replace(with_attention(TINY, attention), **changes), seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            else:
                p *= 10.0  # so that attention is far from uniform
    return model


@pytest.mark.parametrize(
    ("experiment", "attention", "expected"),
    [
        ("faithful-v1", "mha", 27_403_776),
        ("faithful-v1", "gqa", 25_306_624),
        ("sanity", "mha", 3_296_000),
        ("v2", "mha", 97_538_304),
        ("v2", "gqa", 90_460_416),
    ],
)
def test_parameter_counts_are_the_published_ones(experiment, attention, expected):
    assert n_parameters(with_attention(EXPERIMENTS[experiment][1].model, attention)) == expected


@pytest.mark.parametrize("config", [TINY, with_attention(TINY, "gqa"), EXPERIMENTS["sanity"][1].model])
def test_the_parameter_formula_counts_the_model(config):
    assert sum(p.numel() for p in Transformer(config).parameters()) == n_parameters(config)


def naive_logits(model, tokens_T):
    """One sequence, one token and one head at a time, in numpy."""
    config = model.config
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def norm(x, gain):
        return x / np.sqrt((x**2).mean() + config.norm_eps) * gain

    def rotated(x, t):
        half = config.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = t * config.rope_theta ** (-2 * i / config.head_dim)
            a, b = x[i], x[i + half]
            out[i], out[i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return out if model.rope_on else x

    rows = [w["embed.weight"][token].copy() for token in tokens_T]
    for i in range(config.layers):
        at = f"blocks.{i}."
        normed = [norm(x, w[at + "attn_norm.weight"]) for x in rows]

        def heads(name, x, at=at):
            return (w[f"{at}attn.{name}_proj.weight"] @ x).reshape(-1, config.head_dim)

        q = [[rotated(norm(h, w[at + "attn.q_norm.weight"]), t) for h in heads("q", x)] for t, x in enumerate(normed)]
        k = [[rotated(norm(h, w[at + "attn.k_norm.weight"]), t) for h in heads("k", x)] for t, x in enumerate(normed)]
        v = [heads("v", x) for x in normed]
        for t in range(len(rows)):
            mixed = []
            for h in range(config.heads):
                g = h * config.kv_heads // config.heads
                scores = np.array([q[t][h] @ k[s][g] for s in range(t + 1)]) / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                mixed.append(sum(a * v[s][g] for s, a in enumerate(weights / weights.sum())))
            rows[t] = rows[t] + w[at + "attn.o_proj.weight"] @ np.concatenate(mixed)
        for t, x in enumerate(rows):
            x = norm(x, w[at + "mlp_norm.weight"])
            gate = w[at + "mlp.gate_proj.weight"] @ x
            hidden = gate / (1 + np.exp(-gate)) * (w[at + "mlp.up_proj.weight"] @ x)
            rows[t] = rows[t] + w[at + "mlp.down_proj.weight"] @ hidden
    return np.stack([w["embed.weight"] @ norm(x, w["norm.weight"]) for x in rows])


@pytest.mark.parametrize("attention", ["mha", "gqa"])
@pytest.mark.parametrize("rope", [True, False])
def test_equal_to_the_naive_reference(attention, rope):
    model = tiny(attention, rope=rope)
    with torch.no_grad():
        logits = model(TOKENS)
    for tokens_T, logits_TV in zip(TOKENS, logits, strict=True):
        # The angles are computed in float32.
        assert_parity(logits_TV, naive_logits(model, tokens_T.tolist()), atol=2e-4 if rope else 1e-9)


@settings(max_examples=10, deadline=None)
@given(position=st.integers(0, 10), token=st.integers(0, 22), gqa=st.booleans())
def test_a_token_changes_nothing_before_it(position, token, gqa):
    model = tiny("gqa" if gqa else "mha")
    changed = TOKENS.clone()
    changed[:, position] = token
    with torch.no_grad():
        difference = (model(changed) - model(TOKENS)).abs().amax((0, 2))
    assert difference[:position].eq(0).all()


def test_gqa_is_mha_with_repeated_keys_and_values():
    gqa = tiny("gqa")
    mha = tiny("mha")
    state = gqa.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
    mha.load_state_dict(state)
    assert_parity(mha(TOKENS), gqa(TOKENS), atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(shift=st.integers(0, 30), seed=st.integers(0, 1000))
def test_rotary_scores_depend_on_the_distance_alone(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 8, generator=generator, dtype=torch.float64)
    cos, sin = rotation(64, 8, 100.0, torch.device("cpu"))

    def at(x, t):
        return rotate(x, (cos[t], sin[t]))

    assert_parity((at(q, 9 + shift) * at(k, 4 + shift)).sum(), (at(q, 9) * at(k, 4)).sum(), atol=1e-5)
    assert_parity(at(q, shift).norm(), q.norm(), atol=1e-6)


def test_the_last_position_has_no_target_and_gets_no_gradient():
    model = tiny()
    targets = next_token_targets(TOKENS.int())
    assert targets.dtype == torch.int64
    assert targets[:, -1].eq(IGNORE).all()
    assert targets[:, :-1].equal(TOKENS[:, 1:])
    short = torch.nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
    assert_parity(model(TOKENS, targets), short, atol=1e-12)
    logits = model(TOKENS).detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
    assert logits.grad[:, -1].eq(0).all()
    assert logits.grad[:, :-1].ne(0).any()


def test_a_loss_is_ln_vocab_at_the_start():
    config = EXPERIMENTS["smoke"][1].model
    tokens = torch.randint(config.vocab, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = build_model(config, 0)(tokens, next_token_targets(tokens))
    assert loss.item() == pytest.approx(np.log(config.vocab), abs=0.1)


def test_orderings_are_paired_in_weights_and_data():
    experiment = EXPERIMENTS["smoke"][1]
    runs = [run_config(experiment, "gqa", ordering, 3) for ordering in ORDERINGS]
    assert all(replace(run, ordering="shuffled") == runs[0] for run in runs)
    a, b = (build_model(runs[i].model, runs[i].seed).state_dict() for i in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = build_model(runs[0].model, 4).state_dict()
    assert not torch.equal(a["embed.weight"], other["embed.weight"])


def test_matrices_start_with_the_configured_spread():
    model = build_model(replace(TINY, vocab=5000), 0)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(p.eq(1).all() for p in model.parameters() if p.ndim == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_loss_and_gradients_agree_with_eager(mode):
    model = build_model(EXPERIMENTS["sanity"][1].model, 0).cuda()
    tokens = torch.randint(512, (8, 256), device="cuda", dtype=torch.int32)
    targets = next_token_targets(tokens)
    expected = model(tokens, targets)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, dynamic=False, mode=mode)
    for _ in range(3):  # the third is a replayed graph
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        loss = compiled(tokens, targets)
        loss.backward()
    assert_parity(loss, expected, atol=1e-4)
    for name, p in model.named_parameters():
        assert_parity(p.grad, grads[name], atol=2e-4, name=name)


@pytest.mark.gpu
def test_bf16_is_close_to_float32():
    model = build_model(EXPERIMENTS["sanity"][1].model, 0).cuda()
    tokens = torch.randint(512, (8, 256), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        low = model(tokens)
    assert_parity(low.float(), model(tokens), atol=3e-2)
