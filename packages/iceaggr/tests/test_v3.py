"""What v3 adds to v2: interval bias, moving average, rotations."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from iceaggr.config import V3_PARTS, ModelConfig, TrainConfig, with_parts
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables, rotate_z
from iceaggr.data.features_v3 import ICE_SPEED
from iceaggr.data.grouping import group_doms
from iceaggr.data.tokens import build_tokens
from iceaggr.losses import mean_vector, mixture_nll
from iceaggr.models import blocks
from iceaggr.models.build import build_model, not_hidden
from iceaggr.models.v3 import SCALE, interval_scores, places
from iceaggr.predict import predict_events, predict_outputs
from lab_shared.attention import Mask, attend
from lab_shared.optim import split_params
from lab_shared.testing import assert_parity

TINY = TrainConfig(model=ModelConfig(slots=2, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16))
V3 = with_parts(TINY, *V3_PARTS).model
pytestmark = pytest.mark.usefixtures("one_thread")


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


# --- rotations ----------------------------------------------------------------------


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
