"""What v3 adds to v2: features, interval bias, mixture head, moving average, rotations."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.config import V3_PARTS, ModelConfig, TrainConfig, with_parts
from iceaggr.data.cache import EventCache
from iceaggr.data.features import (
    AGGREGATES,
    SUMMARY_FEATURES,
    Tables,
    build_tokens,
    dom_summary,
    feature_width,
    rotate_z,
)
from iceaggr.data.features_v3 import ICE_SPEED, fourier_features
from iceaggr.data.grouping import group_doms
from iceaggr.ema import Ema
from iceaggr.losses import angle_loss, mean_vector, mixture_nll, pointing
from iceaggr.metrics import opening_angle_deg
from iceaggr.models import blocks
from iceaggr.models.build import build_model, not_hidden
from iceaggr.models.v3 import SCALE, interval_scores, places
from iceaggr.predict import predict_events, predict_outputs
from iceaggr.train import training_parts
from lab_shared.attention import Mask, attend
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.optim import split_params
from lab_shared.testing import assert_parity, golden

TINY = TrainConfig(model=ModelConfig(slots=2, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16))
V3 = with_parts(TINY, *V3_PARTS).model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def awake(config, seed=0):
    """A model whose zero-initialised weights are random too; its head stays as it is."""
    torch.manual_seed(seed)
    model = build_model(config)
    for name, p in model.named_parameters():
        if p.detach().abs().max() == 0 and "head" not in name:
            torch.nn.init.normal_(p, std=0.2 if p.ndim == 2 else 1.0)
    return model


def inputs(batch):
    total = batch.features_TF.shape[0]
    return batch.features_TF, Mask.segments(batch.offsets_E1, total), batch.cls_E


# --- features ---------------------------------------------------------------------------------------


@given(waves=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_fourier_features_match_the_definition(waves, seed):
    rng = np.random.default_rng(seed)
    xyz, time, charge = rng.uniform(-600, 600, (5, 3)), rng.integers(5000, 200_000, 5), rng.uniform(0.025, 2000, 5)
    found = fourier_features(torch.tensor(xyz).float(), torch.tensor(time), torch.tensor(charge).float(), waves)
    xyz, charge = np.float32(xyz).astype(float), np.float32(charge).astype(float)
    angles = [
        [2 * math.pi * 2**k * u / longest for k in range(waves)]
        for u, longest in [
            *((xyz[:, i], 4000) for i in range(3)),
            ((time - 1e4) * ICE_SPEED, 4000),
            (np.log10(charge), 8),
        ]
    ]
    angle_DF = np.concatenate([np.stack(a, 1) for a in angles], 1)
    assert found.shape == (5, 10 * waves)
    assert_parity(found, np.concatenate([np.sin(angle_DF), np.cos(angle_DF)], 1), atol=1e-4)


def test_features_stand_side_by_side_in_the_width_that_is_said(make_pulses, tables):
    pulses = make_pulses([5, 40, 12])
    plain = build_tokens(pulses, TINY.model, tables)
    for parts in ([], ["fourier"], ["aggregates"], ["ice"], ["fourier", "aggregates", "ice"]):
        config = with_parts(TINY, *parts).model
        batch = build_tokens(pulses, config, tables)
        assert batch.features_TF.shape[1] == feature_width(config)
        assert torch.equal(batch.features_TF[:, : feature_width(TINY.model)], plain.features_TF)
        assert torch.isfinite(batch.features_TF).all()
        assert not batch.features_TF[batch.cls_E].any()


def test_aggregates_are_the_summaries_and_ice_is_the_dom_s(make_pulses, tables):
    pulses = make_pulses([5, 40, 12])
    doms = group_doms(pulses)
    at = doms.sensor_D
    summary = dom_summary(
        pulses, doms, tables.xyz_S3[at], scattering_D=tables.scattering_S[at], efficiency_D=tables.efficiency_S[at]
    )
    batch = build_tokens(pulses, with_parts(TINY, "aggregates", "ice").model, tables)
    is_dom = torch.ones(len(batch.features_TF), dtype=torch.bool).index_fill_(0, batch.cls_E, False)
    extra = batch.features_TF[is_dom][:, feature_width(TINY.model) :]
    assert torch.equal(extra[:, : len(AGGREGATES)], summary[:, list(AGGREGATES)])
    names = [SUMMARY_FEATURES[i] for i in AGGREGATES]
    assert {"x", "y", "z", "scattering", "efficiency"} == set(SUMMARY_FEATURES) - set(names)
    expected = torch.stack(
        [
            (tables.scattering_S[at] / 30).log(),
            (tables.absorption_S[at] / 100).log(),
            (tables.efficiency_S[at] - 1) / 0.35,
        ],
        1,
    )
    assert_parity(extra[:, len(AGGREGATES) :], expected, atol=1e-6)


def test_aggregates_beside_summaries_are_refused():
    with pytest.raises(ValueError, match="aggregates repeats"):
        feature_width(ModelConfig(features="summary", aggregates=True))
    with pytest.raises(ValueError, match="fourier is -1"):
        feature_width(ModelConfig(fourier=-1))


# --- interval bias ----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["seed", "summary"])
def test_places_are_read_back_from_the_features(make_pulses, tables, features):
    """Positions exactly, times up to a common shift per event."""
    pulses, config = make_pulses([6, 9]), replace(TINY.model, features=features)
    batch = build_tokens(pulses, config, tables)
    doms = group_doms(pulses)
    is_cls = torch.zeros(len(batch.features_TF), dtype=torch.bool).index_fill_(0, batch.cls_E, True)
    place = places(batch.features_TF, is_cls, config)
    assert not place[is_cls].any()
    assert_parity(place[~is_cls][:, :3] * SCALE, tables.xyz_S3[doms.sensor_D], atol=1e-3)
    metres = pulses.time_P[doms.order_P[doms.start_D]].double() * ICE_SPEED
    for event in range(2):
        mine = doms.event_D == event
        shift = place[~is_cls][mine, 3].double() * SCALE - metres[mine]
        near = shift - shift.median()  # the summary's times are limited to 25 x 200 m
        assert near.abs().median() < 0.1


def naive_bias(place, side, cone):
    n = len(place)
    bias = torch.zeros(len(side), n, n, dtype=torch.float64)
    for h in range(len(side)):
        for i in range(n):
            for j in range(n):
                if place[i, 4] and place[j, 4]:
                    d = (place[i] - place[j]).double()
                    s = d[3] ** 2 - d[0] ** 2 - d[1] ** 2 - d[2] ** 2
                    u = s / (1 + abs(s))
                    bias[h, i, j] = side[h] * u + cone[h] * (1 - abs(u))
    return bias


def test_interval_scores_match_the_definition_with_gradients():
    g = torch.Generator().manual_seed(0)
    lengths = [5, 9, 1]
    total = sum(lengths) + 3  # padding
    offsets = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    place = torch.cat([torch.randn(total, 4, generator=g) * 2, torch.ones(total, 1)], 1)
    place[[0, 5, 14]] = 0
    q, k, v = (torch.randn(total, 2, 8, generator=g) for _ in range(3))
    side, cone = (torch.randn(2, generator=g).requires_grad_() for _ in range(2))
    out = attend(q, k, v, Mask.segments(offsets, total), score_mod=interval_scores(place, side, cone))
    weights = torch.randn(out.shape, generator=g)
    found = torch.autograd.grad((out * weights).sum(), [side, cone])
    bias, expected = naive_bias(place, side, cone), torch.zeros(total, 2, 8, dtype=torch.float64)
    for a, b in zip([0, 5, 14], [5, 14, 15], strict=True):
        scores = torch.einsum("ihd,jhd->hij", q[a:b].double(), k[a:b].double()) / math.sqrt(8) + bias[:, a:b, a:b]
        expected[a:b] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[a:b].double())
    assert_parity(out, expected.float(), atol=1e-5)
    wanted = torch.autograd.grad((expected * weights).sum(), [side, cone])
    for one, other in zip(found, wanted, strict=True):
        assert_parity(one, other, atol=1e-4)


def test_a_fresh_interval_bias_changes_nothing_and_then_something(make_pulses, tables):
    batch = build_tokens(make_pulses([20, 30]), TINY.model, tables)
    torch.manual_seed(0)
    plain = build_model(TINY.model)
    biased = awake(replace(TINY.model, interval=True))
    biased.load_state_dict(plain.state_dict(), strict=False)
    for block in [*plain.blocks, *biased.blocks]:
        torch.nn.init.eye_(block.attention.c_proj.weight)
    with torch.no_grad():
        for block in biased.blocks:
            block.attention.side_H.zero_()
            block.attention.cone_H.zero_()
        assert_parity(biased(*inputs(batch)), plain(*inputs(batch)), atol=1e-5)
        biased.blocks[0].attention.cone_H.fill_(2.0)
        assert (biased(*inputs(batch)) - plain(*inputs(batch))).abs().max() > 1e-5


def test_an_analysis_cannot_forget_the_places(make_pulses, tables):
    model, batch = awake(V3), build_tokens(make_pulses([8, 5]), V3, tables)
    features, mask, cls = inputs(batch)
    x0 = model.embed(features, mask)
    with pytest.raises(ValueError, match="place_T5"):
        model.blocks[0](x0, x0, mask)
    x, place = x0, model.place(features, mask)
    for block in model.blocks:
        x = block(x, x0, mask, place_T5=place)
    assert_parity(model.head(model.norm(x[cls])), model(features, mask, cls), atol=1e-5)


def test_interval_weights_are_no_hidden_matrices():
    model = awake(V3)
    split = split_params(model, not_hidden=not_hidden(model))
    assert sum("side_H" in name or "cone_H" in name for name in split.no_decay) == 2 * V3.layers


@pytest.mark.slow
def test_the_graph_a_gpu_compiles_is_one(monkeypatch, make_pulses, tables):
    """With FlexAttention, which has no backward on a CPU."""
    model = awake(V3).requires_grad_(False)
    batches = [
        build_tokens(make_pulses(counts, seed=i), V3, tables, token_capacity=256, event_capacity=6)
        for i, counts in enumerate([[20, 60], [80, 9, 30]])
    ]
    expected = [model(*inputs(batch)) for batch in batches]
    monkeypatch.setattr(blocks, "attend", partial(attend, backend="flex"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for i, (batch, eager) in enumerate(zip(batches, expected, strict=True)):
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            found = compiled(*inputs(batch))
        assert_parity(found[: batch.n_events], eager[: batch.n_events], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_compiled_training_on_gpu_matches_the_cpu(make_pulses, tables, dtype, atol):
    model, pulses = awake(V3), make_pulses([20, 60, 90, 9])
    batch = build_tokens(pulses, V3, tables, token_capacity=256, event_capacity=8)
    expected = model(*inputs(batch))
    mixture_nll(expected, batch.target_E3, batch.valid_E)[0].backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    on_gpu = Tables(*(x.cuda() for x in vars(tables).values()))
    batch = build_tokens(pulses.to("cuda"), V3, on_gpu, token_capacity=256, event_capacity=8)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        found = torch.compile(model, fullgraph=True)(*inputs(batch))
    mixture_nll(found, batch.target_E3, batch.valid_E)[0].backward()
    assert_parity(found[:4], expected[:4].detach(), atol=atol * (1 + expected.abs().max().item()))
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), name
        if dtype == torch.float32:
            assert_parity(p.grad, wanted[name], atol=5e-3 * (1 + wanted[name].abs().max().item()), name=name)


# --- moving average, rotations ----------------------------------------------------------------------


def test_ema_is_the_recursion_and_survives_a_checkpoint():
    model = torch.nn.Linear(3, 2)
    ema, shadow = Ema(model, 0.9), {k: v.detach().clone() for k, v in model.named_parameters()}
    for n in range(25):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        shadow = {k: d * shadow[k] + (1 - d) * p.detach() for k, p in model.named_parameters()}
    own = model.weight.detach().clone()
    with ema.applied():
        assert_parity(model.weight.detach(), shadow["weight"], atol=1e-5)
    assert torch.equal(model.weight, own)
    other = torch.nn.Linear(3, 2)
    again = Ema(other, 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.steps == 25
    again.copy_to_model()
    assert_parity(other.bias.detach(), shadow["bias"], atol=1e-5)
    with pytest.raises(ValueError, match="'bias' is in one only"):
        Ema(torch.nn.Linear(3, 2, bias=False), 0.9).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match=r"optim.ema is 1.0"):
        Ema(model, 1.0)


@pytest.mark.parametrize("parts", [[], ["mixture", "interval"]])
def test_averaged_rotations_are_equivariant(make_pulses, tables, parts):
    """Turning the array by a step of the average turns the answer by it, whatever the model."""
    config = replace(with_parts(TINY, *parts), tta=3)
    cache = EventCache.in_memory(make_pulses([30, 12, 44, 7]))
    model, index = awake(config.model), np.array([2, 0, 3])
    v = predict_events(model, cache, index, config, tables)
    step = torch.full((1,), 2 * math.pi / 3)
    turned = replace(tables, xyz_S3=rotate_z(tables.xyz_S3, step.expand(len(tables.xyz_S3))))
    expected = rotate_z(torch.from_numpy(v), step.expand(3))
    assert_parity(predict_events(model, cache, index, config, turned), expected, atol=1e-3 * np.abs(v).max())
    once = predict_events(model, cache, index, replace(config, tta=1), tables)
    assert np.abs(once - v).max() > 1e-3 * np.abs(v).max()
    raw = torch.from_numpy(predict_outputs(model, cache, index, config, tables))
    assert_parity(mean_vector(raw), once, atol=1e-6)


# --- the whole --------------------------------------------------------------------------------------


def plane_waves(tables, n_events=32, doms=14, seed=0):
    """Events of single pulses at the times of a plane wave, so that the direction is plain to see."""
    from iceaggr.data.pulses import Pulses

    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(n_events, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    sensor = np.stack([rng.choice(5160, doms, replace=False) for _ in range(n_events)])
    xyz = tables.xyz_S3.numpy()[sensor].astype(np.float64)
    time = np.rint(11_000 - np.einsum("edk,ek->ed", xyz, direction) / 0.2998).astype(np.int32)
    order = np.argsort(time, 1)
    sensor, time = np.take_along_axis(sensor, order, 1), np.take_along_axis(time, order, 1)
    n = n_events * doms
    return Pulses(
        event_id_E=torch.arange(n_events),
        offsets_E1=torch.arange(n_events + 1) * doms,
        sensor_P=torch.from_numpy(sensor.ravel().astype(np.int32)),
        time_P=torch.from_numpy(time.ravel()),
        charge_P=torch.ones(n),
        auxiliary_P=torch.zeros(n, dtype=torch.bool),
        azimuth_E=torch.from_numpy(np.arctan2(direction[:, 1], direction[:, 0]) % (2 * np.pi)),
        zenith_E=torch.from_numpy(np.arccos(direction[:, 2])),
    )


def train(batch, steps, lr=3e-3):
    torch.manual_seed(0)
    model = build_model(V3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        out = model(*inputs(batch))
        nll, n = mixture_nll(out, batch.target_E3)
        loss = (nll + 0.3 * angle_loss(pointing(out), batch.target_E3)[0]) / n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    error = opening_angle_deg(mean_vector(model(*inputs(batch))).detach(), batch.target_E3)
    return losses, error


def test_v3_overfits_a_few_events(tables):
    batch = build_tokens(plane_waves(tables, n_events=16), V3, tables)
    losses, error = train(batch, 60, lr=1e-2)
    assert error.mean() < 8
    assert losses[-1] < 0 < losses[0]


def test_golden_losses(tables):
    batch = build_tokens(plane_waves(tables, seed=4), V3, tables)
    losses, _ = train(batch, 12)
    golden(Path(__file__).parent / "golden" / "v3.json", losses, rtol=5e-6)


def test_constant_column_keeps_the_scale_of_raw_features(make_pulses, tables):
    raw = replace(TINY.model, input="none")
    proper = replace(raw, input_norm="none")
    batch = build_tokens(make_pulses([9, 6]), raw, tables)
    features, mask, cls = inputs(batch)
    is_dom = torch.ones(len(features), dtype=torch.bool).index_fill_(0, cls, False)
    for scale in (1.0, 0.5):
        x = build_model(proper).embed(features * scale, mask)[is_dom]
        assert torch.equal(x[:, : features.shape[1]], (features * scale)[is_dom])
        assert (x[:, features.shape[1]] == 1).all()
        assert not x[:, features.shape[1] + 1 :].any()
    same = [build_model(raw).embed(features * scale, mask)[is_dom] for scale in (1.0, 0.5)]
    assert_parity(same[0], same[1], atol=1e-3)
    with pytest.raises(ValueError, match="free column"):
        build_model(replace(proper, d_model=10))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (with_parts(TINY, "mixture"), "vmf_weight"),
        (replace(TINY, tta=0), "tta = 0"),
        (replace(TINY, model=ModelConfig(arch="hierarchical", interval=True)), "flat models"),
        (
            replace(TINY, model=replace(TINY.model, arch="hierarchical"), data=replace(TINY.data, data="stream")),
            "folder",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(make_pulses, tables, config, says):
    cache = EventCache.in_memory(make_pulses([9, 6]))
    with pytest.raises(UserError, match=says):
        training_parts(config, cache, np.arange(2), tables, Dist())
