import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gauge_attn.compiled import compiled_model
from gauge_attn.config import PRESETS, ModelConfig, OptimConfig
from gauge_attn.data import induction
from gauge_attn.generate import generate
from gauge_attn.measure import attention_maps, calibrate, diversity_of, head_records, kl_std_per_head, matrix_sharpness
from gauge_attn.models import Practical, build_model, build_optimizer
from gauge_attn.models.faithful import turned
from gauge_attn.models.gpt import matched_width, parameter_count
from gauge_attn.models.layers import Temperature, bounded_log_sigma, declare
from gauge_attn.models.practical import attend_heads
from gauge_attn.so3 import frames_for
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.dist import init
from lab_shared.errors import UserError
from lab_shared.graphs import StepGraph
from lab_shared.optim import clip_grads
from lab_shared.testing import assert_equivariant, assert_parity, golden
from torch.nn import functional as F

VOCAB, WINDOW = 12, 10
SPEC = "2x0e+1x1e+1x2e"
TINY = {
    "faithful": ModelConfig(arch="faithful", spec=SPEC, layers=2, kappa=0.5),
    "practical": ModelConfig(
        arch="practical", spec=SPEC, layers=2, scalars=8, copies=2, hidden=12, value_scalars=2, kappa_mode="learnable"
    ),
    "gpt": ModelConfig(arch="gpt", layers=2, d_model=16, heads=2),
}
VARIANTS = {
    **TINY,
    "faithful-vfe": replace(TINY["faithful"], vfe_step=True),
    "practical-seeing-itself": replace(TINY["practical"], self_mask=False),
    "practical-scalars": replace(TINY["practical"], spec="3x0e"),
    "practical-no-scalar-heads": replace(TINY["practical"], spec="1x1e+1x2e"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are smaller than the cost of sharing them between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name, alignment="none", **changes):
    torch.manual_seed(0)
    optim = OptimConfig(alignment=1.0, alignment_reduction=alignment)
    return build_model(replace(VARIANTS[name], **changes), VOCAB, WINDOW, optim)


def tokens(batch=3, n=WINDOW, seed=1):
    return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_changes_no_bit_of_the_past(name):
    model, x = make(name), tokens()
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % VOCAB
    assert torch.equal(model(x).logits_BNV[:, :6], model(changed).logits_BNV[:, :6])
    assert not torch.equal(model(x).logits_BNV[:, 6:], model(changed).logits_BNV[:, 6:])


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_is_the_full_forward(name):
    model, x = make(name).eval(), tokens()
    with torch.no_grad():
        full = model(x).logits_BNV
        cache = model.new_cache()
        pieces = [model(part, cache=cache).logits_BNV for part in x.split([1, 4, 1, 1, 3], dim=1)]
    assert_parity(torch.cat(pieces, 1), full, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_beyond_the_window_is_an_error(name):
    model = make(name)
    with pytest.raises(ValueError, match="do not fit the model's window of 10"):
        model(tokens(n=WINDOW + 1))


def test_parameter_counts():
    count = {name: sum(p.numel() for p in make(name).parameters()) for name in TINY}
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


def rotated_practical(model, x, frames, g_BN3):
    """Stream and frames after turning every token's frame by its own g."""
    turn = frames_for(model.irreps, g_BN3)
    stream = {l: v if l == 0 else turn[l] @ v for l, v in x.items()}
    return stream, {l: turn[l] @ frame for l, frame in frames.items()}


@pytest.mark.parametrize("rope", [True, False])
def test_practical_block_is_equivariant_and_logits_are_invariant(rope):
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


def test_an_untransported_stream_would_be_noticed():
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


def test_gauge_rope_sees_differences_of_positions_only():
    heads = make("practical", alibi=False).blocks[0].heads["1"]
    h = {0: torch.zeros(1, WINDOW, 8), 1: torch.randn(1, 1, 3, 2).expand(1, WINDOW, 3, 2)}
    p = features_of(heads, h)
    logits = p.query[0, 0] @ p.key[0, 0].T
    for offset in range(1, 5):
        assert logits.diagonal(-offset).std() < 1e-5
    assert logits[:, 0].std() > 1e-2


def test_self_mask_and_values_against_a_dense_sum():
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


def test_practical_features_are_the_divergence_of_isotropic_gaussians():
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


@pytest.mark.parametrize("name", ["faithful", "practical"])
def test_alignment_is_the_sum_over_weights_and_divergences(name):
    expected = 0.0
    for m in range(2):  # per layer
        maps = [x for x in attention_maps(make(name), tokens(1)) if x["layer"] == m]
        expected += sum((x["beta"] * x["kl"]).sum() for x in maps) / len(maps) / 2
    assert make(name, "sum")(tokens(1)).alignment.item() == pytest.approx(expected, rel=1e-4)
    assert make(name, "mean")(tokens(1)).alignment.item() == pytest.approx(expected / WINDOW, rel=1e-4)
    assert make(name)(tokens(1)).alignment is None


def test_dense_route_equals_the_exact_one():
    exact, dense = make("faithful"), make("faithful", route="dense")
    dense.load_state_dict(exact.state_dict())
    assert_parity(dense(tokens()).logits_BNV, exact(tokens()).logits_BNV, atol=1e-5)
    a, b = head_records(exact, tokens()), head_records(dense, tokens())
    of_exact, of_dense = diversity_of(exact, tokens()), diversity_of(dense, tokens())
    assert of_dense == pytest.approx(of_exact, rel=1e-3, abs=1e-6)
    for x, y in zip(a, b, strict=True):
        for key in ("row_std", "entropy_ratio", "effective_keys", "attended_kl", "row_std_rescaled"):
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=1e-5), key


def test_dense_options_change_what_they_should():
    base = make("faithful", route="dense", layers=1, frame_std=0.6)
    logits = base(tokens()).logits_BNV
    for change in ({"covariance": "diag_approx"}, {"exponential": "taylor4"}, {"curvature": 0.5}):
        other = make("faithful", route="dense", layers=1, frame_std=0.6, **change)
        torch.nn.init.normal_(other.log_sigma_VK, std=0.3)
        base.load_state_dict(other.state_dict())
        logits = base(tokens()).logits_BNV
        assert (other(tokens()).logits_BNV - logits).abs().max() > 1e-5, change


def test_options_that_exclude_each_other_are_user_errors():
    with pytest.raises(UserError, match=r"needs --model\.route dense"):
        make("faithful", curvature=0.1)
    with pytest.raises(UserError, match="free-energy step is made of exact features"):
        make("faithful-vfe", route="dense")
    with pytest.raises(UserError, match="whole covariances"):
        make("faithful", gauge_fixed=True, vfe_step=True)
    with pytest.raises(UserError, match="no multiple of 2 heads"):
        make("gpt", d_model=18)


def test_gauge_fixed_beliefs_have_no_divergence():
    model = make("faithful", gauge_fixed=True, frame_std=1.0)
    torch.nn.init.normal_(model.log_sigma_VK, std=0.5)
    assert max(abs(r["attended_kl"]) for r in head_records(model, tokens())) < 1e-4
    mu, sigma = torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 3) + 0.5
    assert_parity(turned((mu, sigma), None)[1], torch.diag_embed(sigma), atol=0)


def test_a_free_energy_step_descends_the_free_energy():
    """Its direction is minus sigma times the gradient of the free energy that its docstring states."""
    from gauge_attn.models.faithful import vfe_step

    torch.manual_seed(0)
    mu = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    sigma = torch.rand_like(mu) + 0.5
    frame = frames_for(make("faithful").irreps, torch.randn(1, 6, 3, dtype=torch.float64))[1]
    prior = (torch.randn_like(mu), torch.rand_like(mu) + 0.5)
    kappa_H = torch.tensor([0.5, 1.5], dtype=torch.float64)
    i = 4
    probe = mu[:, :, i].clone().requires_grad_()
    moved = mu.clone()
    moved[:, :, i] = 0
    query = moved + F.one_hot(torch.tensor(i), 6).view(1, 1, 6, 1) * probe[:, :, None]
    omega = frame[:, :, None] @ frame[:, None].mT
    keys = (omega[:, None, i] @ mu[..., None])[..., 0]
    cov = omega[:, None, i] @ torch.diag_embed(sigma) @ omega[:, None, i].mT
    delta = query[:, :, i, None] - keys
    quad = (delta[..., None, :] @ torch.linalg.inv(cov) @ delta[..., None])[..., 0, 0]
    trace = (torch.linalg.inv(cov) @ torch.diag_embed(sigma[:, :, i, None])).diagonal(dim1=-2, dim2=-1).sum(-1)
    kl = 0.5 * (quad + trace - 3 + cov.logdet() - sigma[:, :, i, None].log().sum(-1))[:, :, : i + 1]
    free = -(kappa_H[:, None] * torch.logsumexp(-kl / kappa_H[:, None], -1, keepdim=True)).sum()
    free = free + 0.5 * ((probe - prior[0][:, :, i]).square() / prior[1][:, :, i]).sum()
    (gradient,) = torch.autograd.grad(free, probe)
    stepped = vfe_step(mu, sigma, prior, frame, kappa_H, torch.tensor(0.1, dtype=torch.float64), self_mask=False)
    assert_parity(stepped[:, :, i], mu[:, :, i] - 0.1 * sigma[:, :, i] * gradient, atol=1e-9)


@pytest.mark.parametrize(("mode", "expected"), [("shared", [2, 2]), ("dim", [2, 10]), ("sqrt_dim", [2, 2 * 5**0.5])])
def test_temperature_modes(mode, expected):
    assert Temperature([1, 5], 2.0, mode)().tolist() == pytest.approx(expected)


def test_standardised_temperatures_give_every_head_the_same_logit_std():
    model = make("faithful", kappa_mode="standardised", kappa=0.5)
    calibrate(model, tokens(8))
    for layer, stds in zip(model.layers, kl_std_per_head(model, tokens(8)), strict=True):
        for l, std_H in stds.items():
            assert (std_H / layer[str(l)].temperature()).tolist() == pytest.approx([2.0] * len(std_H), rel=1e-4)


def test_kl_std_is_that_of_the_dense_matrix():
    model = make("faithful", layers=1)
    stds = kl_std_per_head(model, tokens(1))[0]
    for x in attention_maps(model, tokens(1)):
        rows = [x["kl"][i, :i].std() for i in range(2, WINDOW)]
        l = int(x["label"][1:])
        index = model.irreps.by_l()[l].heads.index(x["head"])
        assert float(stds[l][index]) == pytest.approx(sum(rows) / len(rows), rel=1e-3)


@pytest.mark.parametrize("name", ["faithful", "practical", "gpt", "practical-seeing-itself"])
def test_head_records_are_those_of_the_weights(name):
    model = make(name)
    maps = {(x["layer"], x["head"]): x for x in attention_maps(model, tokens(1))}
    records = head_records(model, tokens(1))
    assert len(records) == len(maps) == 2 * (2 if name == "gpt" else 4)
    for r in records:
        beta = torch.from_numpy(maps[r["layer"], r["head"]]["beta"])[None, None]
        self_mask = name != "gpt" and model_self_mask(model)
        expected = matrix_sharpness(beta, self_mask=self_mask)
        for key, value in expected.items():
            assert r[key] == pytest.approx(value.item(), rel=2e-3, abs=1e-5), (key, r)
        off = beta[0, 0][~torch.eye(WINDOW, dtype=torch.bool)].view(WINDOW, WINDOW - 1)
        assert r["row_std"] == pytest.approx(off.std(1, correction=0).mean().item(), rel=2e-3)


def model_self_mask(model):
    return model.blocks[0].heads["0"].self_mask if isinstance(model, Practical) else model.config.self_mask


@settings(max_examples=20, deadline=None)
@given(st.floats(-1e4, 1e4))
def test_log_sigma_never_leaves_its_bounds(raw):
    bounded = bounded_log_sigma(torch.tensor(raw)).item()
    assert abs(bounded) <= math.log(1e3) + 1e-5
    assert (bounded > 0) == (raw > 0) or raw == 0 or abs(raw) < 1e-30


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_in_one_group_and_unknown_ones_are_refused(name):
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


def steps(name, n, lr=3.0, **optim):
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


@pytest.mark.parametrize("name", TINY)
def test_a_batch_is_learnt_by_heart(name):
    losses = steps(name, 35, lr=4.0)
    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert losses[-1] < 0.6


@pytest.mark.parametrize("name", TINY)
def test_golden_losses(name):
    golden(Path(__file__).parent / "golden" / f"{name}.json", steps(name, 20, lr=1.0), rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_generation_goes_on_beyond_the_window(name):
    model = make(name).eval()
    out = generate(model, tokens(1, 4)[0], 15, temperature=0)
    assert out.shape == (19,)
    assert torch.equal(out[:4], tokens(1, 4)[0])
    with torch.no_grad():  # the first tokens are those of the plain forward
        assert out[4] == model(out[None, :4]).logits_BNV[0, -1].argmax()
        assert out[9] == model(out[None, :9]).logits_BNV[0, -1].argmax()


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


def test_split_bf16_is_near_float32_and_blind_to_the_future():
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


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_without_breaks(name):
    model = make(name, layers=1)
    model(tokens())  # tables are made outside the graph
    forward = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert_parity(forward(tokens()).logits_BNV, model(tokens()).logits_BNV, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it, and hides the warning otherwise
def test_the_blocks_share_one_compiled_code_and_only_training_uses_it(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr("gauge_attn.tables.could_be_tf32", lambda x: x.dtype == torch.float32)  # as on CUDA
    model = make("practical", layers=3)
    plain = model(tokens()).logits_BNV
    gradient = torch.autograd.grad(plain.square().sum(), model.phi_V3)[0]
    counter = CompileCounter()
    model.compile_regions(lambda part: torch.compile(part, backend=counter, fullgraph=True, dynamic=False))
    fast = model(tokens()).logits_BNV
    assert_parity(fast, plain, atol=1e-6)
    assert_parity(torch.autograd.grad(fast.square().sum(), model.phi_V3)[0], gradient, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model(tokens(2, 5))
        model(tokens(1, 4), cache=model.new_cache())
    model(tokens(2), record=[])
    assert counter.frame_count == 3  # embedding, block, readout
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_compiled_model_on_cuda(name):
    with init("cuda") as dist:
        model = make(name).to(dist.device)
        x = tokens().to(dist.device)
        plain = model(x).logits_BNV
        forward = compiled_model(model, x)
        assert_parity(forward(x).logits_BNV, plain, atol=1e-4)
        forward(x).logits_BNV.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["faithful", "practical", "gpt"])
def test_a_recorded_step_gives_the_losses_of_plain_ones(name):
    """Several optimiser steps: parameters change under the graph, and nothing of a step is left over."""

    def losses(recorded):
        with init("cuda") as dist:
            model = make(name).to(dist.device)
            x = torch.cat([tokens(2), tokens(2)[:, :1]], 1).to(dist.device)
            forward = compiled_model(model, x[:, :-1]) if recorded else model

            def loss_of(y):
                return F.cross_entropy(forward(y[:, :-1]).logits_BNV.flatten(0, 1), y[:, 1:].flatten())

            optimizer = build_optimizer(model, OptimConfig())
            if recorded:
                step = StepGraph(loss_of, model, optimizer, clip=1.0)
                return [step(x.roll(i, 0))[0].item() for i in range(6)]
            found = []
            for i in range(6):
                loss = loss_of(x.roll(i, 0))
                loss.backward()
                clip_grads(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                found.append(loss.item())
            return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
