"""The practical model: equivariance, gauge RoPE, features, precision."""

import math

import pytest
import torch
from gauge_attn.config import ModelConfig, OptimConfig
from gauge_attn.data import induction
from gauge_attn.models import build_model, build_optimizer
from gauge_attn.models.layers import bounded_log_sigma
from gauge_attn.models.practical import attend_heads
from gauge_attn.so3 import frames_for
from lab_shared.testing import assert_equivariant, assert_parity
from torch.nn import functional as F

VOCAB, WINDOW = 12, 10


def rotated_practical(model, x, frames, g_BN3):
    """Stream and frames after turning every token's frame by its own g."""
    turn = frames_for(model.irreps, g_BN3)
    stream = {l: v if l == 0 else turn[l] @ v for l, v in x.items()}
    return stream, {l: turn[l] @ frame for l, frame in frames.items()}


@pytest.mark.parametrize("rope", [True, False])
def test_practical_block_is_equivariant_and_logits_are_invariant(rope, make, tokens):
    model = make("practical", rope=rope).double()
    x, frames = model.embed(tokens())
    g_BN3 = torch.randn(3, WINDOW, 3, dtype=torch.float64)
    turn = frames_for(model.irreps, g_BN3)

    def forward(state):
        stream, its_frames = state
        for block in model.blocks:
            stream, _ = block(stream, its_frames, None, 0, False, None)
        return stream

    for l in (0, 1, 2):
        assert_equivariant(
            lambda state, l=l: forward(state)[l],
            (x, frames),
            lambda state: rotated_practical(model, *state, g_BN3),
            lambda y, l=l: y if l == 0 else turn[l] @ y,
            atol=1e-10,
            name=f"blocks, l = {l}",
        )
    assert_equivariant(
        lambda state: model.invariants(model.norm(forward(state))),
        (x, frames),
        lambda state: rotated_practical(model, *state, g_BN3),
        lambda y: y,
        atol=1e-10,
        name="invariants",
    )


def test_an_untransported_stream_would_be_noticed(make, tokens):
    """The test above can fail: turning frames without the stream changes the logits."""
    model = make("practical")
    x, frames = model.embed(tokens())
    turn = frames_for(model.irreps, torch.randn(3, WINDOW, 3))
    turned_only = {l: turn[l] @ f for l, f in frames.items()}
    a, _ = model.blocks[0](x, frames, None, 0, False, None)
    b, _ = model.blocks[0](x, turned_only, None, 0, False, None)
    assert (a[0] - b[0]).abs().max() > 1e-4


def features_of(heads, h):
    record = {}
    attend_heads({heads.l: heads}, h, {}, None, 0, False, record)
    return record[heads.l]


def test_gauge_rope_sees_differences_of_positions_only(make):
    heads = make("practical", alibi=False).blocks[0].heads["1"]
    h = {0: torch.zeros(1, WINDOW, 8), 1: torch.randn(1, 1, 3, 2).expand(1, WINDOW, 3, 2)}
    p = features_of(heads, h)
    logits = p.query[0, 0] @ p.key[0, 0].T
    for offset in range(1, 5):
        assert logits.diagonal(-offset).std() < 1e-5
    assert logits[:, 0].std() > 1e-2


def test_self_mask_and_values_against_a_dense_sum(make, tokens):
    model = make("practical").double()
    heads = model.blocks[0].heads["1"]
    h = model.blocks[0].attention_norm(model.embed(tokens())[0])
    p = features_of(heads, h)
    logits = -0.5 * p.query @ p.biased_key.mT / p.kappa_H1[..., None]
    allowed = torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril(-1)
    allowed[0, 0] = True
    beta = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    value = F.linear(h[0], heads.value_scalar).unflatten(-1, (1, -1)).transpose(1, 2)
    scalars, _, _ = attend_heads({1: heads}, h, {}, None, 0, False, None)
    assert_parity(scalars, (beta @ value).transpose(1, 2).flatten(2), atol=1e-10)


def test_practical_features_are_the_divergence_of_isotropic_gaussians(make, tokens):
    from torch.distributions import Independent, Normal, kl_divergence

    model = make("practical", rope=False)
    heads = model.blocks[0].heads["2"]
    torch.nn.init.normal_(heads.log_sigma, std=0.3)
    x, _ = model.embed(tokens())
    p = features_of(heads, x)
    kl = 0.5 * p.query @ p.key.mT + p.to_reference_BHN[..., None]
    log_sigma = bounded_log_sigma(F.linear(x[0], heads.log_sigma))
    q_mean = torch.einsum("bndc,hc->bhnd", x[2], heads.query_HC)[0, 0]
    k_mean = torch.einsum("bndc,hc->bhnd", x[2], heads.key_HC)[0, 0]
    q = Independent(Normal(q_mean[:, None], log_sigma[0, :, :1, None].mul(0.5).exp()), 1)
    k = Independent(Normal(k_mean[None], log_sigma[0, None, :, 1:].mul(0.5).exp()), 1)
    assert_parity(kl[0, 0], kl_divergence(q, k), atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_practical_learns_to_look_back():
    """A small practical model passes what any predictor without memory can reach on the generated language."""
    torch.manual_seed(0)
    config = ModelConfig(spec="2x0e+2x1e", layers=2, scalars=32, hidden=32, kappa=1.0, kappa_mode="learnable")
    model = build_model(config, 8, 16)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", lr=5e-3))
    for step in range(200):
        x = induction.sample(4, 16, 64, seed=0, stream=0, index=step, device=torch.device("cpu"))
        loss = F.cross_entropy(model(x[:, :-1]).logits_BNV.flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert induction.optimal_loss(4, 16) < loss.item() < 0.93 * math.log(4)


def test_split_bf16_is_near_float32_and_blind_to_the_future(make, tokens):
    exact, split = make("practical"), make("practical", precision="bf16x3")
    x = tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % VOCAB
    logits = split(x).logits_BNV
    assert torch.equal(logits[:, :6], split(changed).logits_BNV[:, :6])
    assert not torch.equal(logits, exact(x).logits_BNV)
    assert_parity(logits, exact(x).logits_BNV, atol=5e-3)
    with torch.no_grad():
        cache = split.new_cache()
        pieces = [split(part, cache=cache).logits_BNV for part in x.split([1, 4, 5], dim=1)]
    assert_parity(torch.cat(pieces, 1), logits, atol=5e-3)
    wanted, found = (
        torch.cat([g.flatten() for g in torch.autograd.grad(m(x).logits_BNV.square().sum(), list(m.parameters()))])
        for m in (exact, split)
    )
    assert (found - wanted).norm() <= 0.01 * wanted.norm()
