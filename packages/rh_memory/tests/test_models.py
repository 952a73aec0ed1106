"""The models against slow versions, and what they may and may not see."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lab_shared.attention import Mask
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity
from rh_memory.config import PRESETS, ModelConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.models import Context, build_model
from rh_memory.models.backbone import HEIGHT_CENTRE, running_standard
from rh_memory.models.rotary import index_turns, log_frequencies

TINY = ModelConfig(context=48, d_model=32, layers=2, heads=2, dropout=0.0, n_memory=4, sigma_floor=1e-3)
EXPLICIT = replace(TINY, pos="rope", inputs="height", values="prime_rotary")


def windows(n=3, width=49, seed=0):
    s = torch.rand(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    gamma = (s.double().cumsum(1) - s[:, :1]) * (2 * math.pi / HEIGHT_CENTRE)
    return WindowBatch(s, torch.full_like(s, 11.0), gamma)


def awake(config, seed=0):
    """A model whose every part matters: at its small initial weights attention would hardly move anything."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.15 * torch.randn_like(p))
    return model.eval()


# --- sizes ----------------------------------------------------------------------------------------


def test_e0_has_the_seed_s_number_of_parameters():
    d, layers, positions, k = 256, 6, 256, 8
    block = 4 * d * d + 8 * d * d + 2 * d
    expected = (d + d) + positions * d + layers * block + d + (d * 3 * k + 3 * k)
    found = sum(p.numel() for p in build_model(PRESETS["e0"][1].model).parameters())
    assert found == expected == 4_794_136


@pytest.mark.parametrize(("preset", "count"), [("explicit", 4_730_392), ("e3", 4_732_704), ("e2", 4_800_280)])
def test_parameter_counts_of_presets(preset, count):
    assert sum(p.numel() for p in build_model(PRESETS[preset][1].model).parameters()) == count


# --- the backbone against a slow one --------------------------------------------------------------


def slow_states(model, batch):
    """Final states by loops over heads and tokens, with complex numbers for every rotation, float64."""
    config, b = model.config, batch.inputs()
    double = {name: x.double() for name, x in model.state_dict().items()}
    s, lh, gamma = b.s_BW.double(), b.log_height_BW.double(), b.gamma_BW
    heads, c = config.heads, config.d_model // config.heads
    t = s.size(1)
    x = s[..., None] if config.inputs == "spacing" else torch.stack([s - 1, lh - HEIGHT_CENTRE], -1)
    x = x @ double["backbone.embed_data.weight"].T + double["backbone.embed_data.bias"]
    if config.pos == "learned":
        x = x + double["backbone.position.weight"][:t]
    log_q = torch.from_numpy(log_frequencies(config)).view(-1, heads).T  # (H, F)
    rate = 10_000.0 ** (-torch.arange(c // 2, dtype=torch.float64) / (c // 2))

    def turned(x, angle):  # (N, T, C) by (N or 1, T, F)
        z = torch.complex(x[..., ::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(z).flatten(-2)

    for i in range(config.layers):
        w = {name.removeprefix(f"backbone.blocks.{i}."): x for name, x in double.items() if f"blocks.{i}." in name}
        normed = F.layer_norm(x, (config.d_model,), w["norm_attention.weight"])
        out = torch.zeros_like(x)
        for h in range(heads):
            part = slice(h * c, (h + 1) * c)
            q = normed @ w["attention.qk.weight"][: config.d_model][part].T
            k = normed @ w["attention.qk.weight"][config.d_model :][part].T
            v = normed @ w["attention.v.weight"][part].T
            if config.values == "prime_rotary":
                v = turned(v + w["attention.v.bias"][part], -gamma[..., None] * log_q[h])
            if config.pos == "rope":
                angle = torch.arange(t, dtype=torch.float64)[None, :, None] * rate
                q, k = turned(q, angle), turned(k, angle)
            for token in range(t):
                a = (k[:, : token + 1] @ q[:, token, :, None])[..., 0].div(math.sqrt(c)).softmax(-1)
                out[:, token, part] = (a[..., None] * v[:, : token + 1]).sum(1)
            if config.values == "prime_rotary":
                out[..., part] = turned(out[..., part], gamma[..., None] * log_q[h])
        x = x + out @ w["attention.out.weight"].T
        normed = F.layer_norm(x, (config.d_model,), w["norm_mlp.weight"])
        x = x + F.gelu(normed @ w["up.weight"].T) @ w["down.weight"].T
    return F.layer_norm(x, (config.d_model,), double["backbone.norm.weight"])


@pytest.mark.parametrize("config", [TINY, replace(TINY, pos="rope"), EXPLICIT], ids=["e0", "rope", "explicit"])
def test_backbone_matches_the_slow_version(config):
    model, batch = awake(config), windows(2, 20)
    fast = model.states(Context.of(batch), Mask.causal())
    assert_parity(fast, slow_states(model, batch), atol=2e-4)


def test_frozen_height_forgets_where_the_window_is():
    model, here = awake(replace(EXPLICIT, height="frozen")), windows()
    elsewhere = WindowBatch(here.s_BW, here.log_height_BW - 3, here.gamma_BW * 1.4)
    assert_parity(model.predict(here).loc, model.predict(elsewhere).loc, atol=0)
    told = awake(EXPLICIT)
    assert (told.predict(here).loc - told.predict(elsewhere).loc).abs().max() > 1e-3


def test_running_standard_is_causal_and_standardises():
    s = torch.rand(1, 400, generator=torch.Generator().manual_seed(1)) * 1.6 + 0.2
    x = running_standard(s)
    changed = s.clone()
    changed[:, 200:] = 0
    assert torch.equal(running_standard(changed)[:, :200], x[:, :200])
    assert abs(float(x[:, 300:].mean())) < 0.3
    assert float(x[:, 300:].std()) == pytest.approx(1, abs=0.15)
    assert abs(float(running_standard(2 * s)[:, 300:].mean())) < 0.3


# --- no leakage -----------------------------------------------------------------------------------

CASES = {
    "e0": TINY,
    "explicit": EXPLICIT,
    "frozen": replace(EXPLICIT, height="frozen"),
    "block_norm": replace(TINY, block_norm=True),
    "prefix": replace(TINY, memory="prefix"),
    "postfix": replace(EXPLICIT, memory="postfix", readouts=4, seed_slots=True, block_norm=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_target_does_not_change_its_own_prediction(name):
    model, batch = awake(CASES[name]), windows()
    before = model.predict(batch, "all")
    for target in (1, 17, 48):  # predicted from spacings 0 .. target - 1
        s, gamma, log_height = batch.s_BW.clone(), batch.gamma_BW.clone(), batch.log_height_BW.clone()
        s[:, target:] *= 3
        gamma[:, target:] += 7
        log_height[:, target:] += 1
        after = model.predict(WindowBatch(s, log_height, gamma), "all")
        assert_parity(after.loc[:, :target], before.loc[:, :target], atol=1e-6)
        assert_parity(after.scale[:, :target], before.scale[:, :target], atol=1e-6)
        if target < 48:
            assert (after.loc[:, target:] - before.loc[:, target:]).abs().max() > 1e-3


def test_positions_last_is_the_last_of_all():
    model, batch = awake(EXPLICIT), windows()
    # kernels differ in the last bit with the shape
    assert_parity(model.predict(batch, "last").loc, model.predict(batch).loc[:, -1], atol=2e-6)
    with pytest.raises(ValueError, match="readouts"):
        model.predict(batch, "readouts")


# --- prefix memory --------------------------------------------------------------------------------


def test_prefix_slots_cannot_see_the_data():
    model = awake(replace(TINY, memory="prefix"))
    assert_parity(model.slot_states(windows(seed=1)), model.slot_states(windows(seed=2)), atol=1e-6)
    batch = windows()
    batch.s_BW.requires_grad_(True)
    model.slot_states(batch).sum().backward()
    assert batch.s_BW.grad is None or not batch.s_BW.grad.any()


def test_slots_in_front_that_see_earlier_slots_need_no_mask_but_causality():
    """Any other kind of mask would keep a GPU's fast kernels from dropping attention weights."""
    model = awake(replace(TINY, memory="prefix"))
    data, cpu = Context.of(windows(3)), torch.device("cpu")
    mask = model.training_mask(48, cpu)
    assert mask.kind == "causal"
    written = Mask.memory_prefix(model.n_memory, 48, causal_slots=True, device=cpu)
    assert_parity(model(data, mask).mixture[1], model(data, written).mixture[1], atol=1e-5)


@pytest.mark.parametrize("causal_slots", [True, False])
def test_removing_a_prefix_slot_equals_a_model_without_it(causal_slots):
    """The last slot: no other slot depends on it in the causal order, and rope makes its place not matter."""
    config = replace(TINY, memory="prefix", pos="rope", causal_slots=causal_slots)
    model, batch = awake(config), windows()
    smaller = build_model(replace(config, n_memory=3)).eval()
    weights = dict(model.state_dict())
    for name in ("slots.content_MD", "slots.identity_MD"):
        weights[name] = weights[name][1:]
    smaller.load_state_dict(weights)
    remove = torch.tensor([True, False, False, False])
    assert_parity(model.predict(batch, remove=remove).loc, smaller.predict(batch).loc, atol=1e-5)


def test_prefix_profile_is_what_data_pays_to_slots():
    model = awake(replace(TINY, memory="prefix"))
    profile = model.attention_profile(windows())
    assert profile.shape == (2, 2, 4, 48)
    assert 0 < float(profile.sum(2).min()) <= float(profile.sum(2).max()) < 1


# --- mistakes and compilation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.d_model = 32 is no multiple of 2 x model.heads = 6"),
        ({"layers": 0}, "model.layers is 0"),
        ({"memory": "postfix", "readouts": 5}, "model.readouts = 5 does not divide model.context = 48"),
        ({"memory": "prefix", "slot_dropout": 1.0}, "model.slot_dropout is 1.0"),
        ({"memory": "prefix", "slot_id_mode": "off", "eval_slot_id_mode": "fixed"}, "leaves none"),
        ({"memory": "prefix", "slot_dropout": 0.1}, "model.slot_dropout = 0.1 would change nothing: .* postfix, here"),
        ({"norm_cap": 1.0}, "model.norm_cap = 1.0 would change nothing: .* prefix or postfix, here it is none"),
        ({"frequencies": "even"}, "model.frequencies = even would change nothing"),
        ({"frequency_count": 4}, "model.frequency_count = 4 would change nothing"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build_model(replace(TINY, **changes))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.15)])
def test_compiled_on_gpu_matches_the_cpu(name, dtype, atol):
    config = CASES[name]
    model, batch = awake(config), windows(4)
    expected = model(Context.of(batch), model.training_mask(48, torch.device("cpu")))
    model.cuda()
    mask = model.training_mask(48, torch.device("cuda")).prepare("flex")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for i, seed in enumerate((0, 1)):
        on_gpu = Context.of(windows(4, seed=seed).to("cuda"))
        with (
            torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"),
            torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            output = compiled(on_gpu, mask)
        if i == 0:
            assert_parity(output.mixture[1], expected.mixture[1], atol=atol)
        model.zero_grad()
        output.mixture[1].sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_index_turns_are_those_of_rotary_positions():
    turns = index_turns(torch.arange(5), 4)
    assert_parity(turns[3] * 2 * math.pi, 3 * 10_000.0 ** (-np.arange(4) / 4), atol=1e-6)
