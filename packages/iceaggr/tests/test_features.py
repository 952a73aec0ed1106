"""Features against loops written from the definitions; token batches against their contract."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.config import ModelConfig
from iceaggr.data.features import SUMMARY_FEATURES, Tables, dom_summary, feature_width, rotate_z, seed_vectors
from iceaggr.data.grouping import group_doms
from iceaggr.data.kaggle import KaggleFolder, slice_events
from iceaggr.data.pulses import Pulses
from iceaggr.data.tokens import build_tokens, select_doms

SEED = ModelConfig(slots=3)
SUMMARY = ModelConfig(features="summary")
CONFIGS = {
    "seed": SEED,
    "summary": SUMMARY,
    "capped": replace(SUMMARY, dom_cap=5),
    "earliest": replace(SEED, dom_cap=4, dom_select="earliest"),
}


def doms_of(pulses: Pulses, event: int) -> list[tuple[int, list[int]]]:
    """(sensor, pulses in time order) of the DOMs of an event, by sensor."""
    found: dict[int, list[int]] = {}
    for pulse in range(int(pulses.offsets_E1[event]), int(pulses.offsets_E1[event + 1])):
        found.setdefault(int(pulses.sensor_P[pulse]), []).append(pulse)
    return sorted(found.items())


def naive_seed(pulses: Pulses, xyz: np.ndarray, slots: int, empty: str) -> list[list[float]]:
    rows = []
    for event in range(pulses.n_events):
        for sensor, members in doms_of(pulses, event):
            row = [*(xyz[sensor] / 500), math.log1p(len(members)) / 3 - 1]
            for k in range(slots):
                if k < len(members):
                    p = members[k]
                    charge = max(float(pulses.charge_P[p]), 1e-6)
                    row += [(int(pulses.time_P[p]) - 1e4) / 3e4, math.log10(charge) / 3]
                    row += [0.5 if pulses.auxiliary_P[p] else -0.5]
                else:
                    row += [-1, -1, 0] if empty == "marker" else [0, 0, 0]
            rows.append(row)
    return rows


def naive_summary(pulses: Pulses, tables: Tables) -> list[list[float]]:
    rows = []
    time, charge, hlc = pulses.time_P.tolist(), pulses.charge_P.tolist(), (~pulses.auxiliary_P).tolist()
    for event in range(pulses.n_events):
        doms = doms_of(pulses, event)
        mine = range(int(pulses.offsets_E1[event]), int(pulses.offsets_E1[event + 1]))
        chosen = [p for p in mine if hlc[p]] or list(mine)
        total, running = sum(charge[p] for p in chosen), 0.0
        for p in chosen:
            running += charge[p]
            if running >= total / 2 - 1e-6:
                reference = time[p]
                break
        weights = {s: math.sqrt(sum(charge[p] for p in members if p in chosen)) for s, members in doms}
        xyz = {s: tables.xyz_S3[s].double().numpy() for s, _ in doms}
        centre = sum(weights[s] * xyz[s] for s, _ in doms) / sum(weights.values())
        unit = 0.299792458 / 200
        for s, members in doms:
            q = np.array([charge[p] for p in members])
            t = np.array([time[p] for p in members], dtype=float)
            mean = (q * t).sum() / q.sum()
            spread = math.sqrt(max((q * (t - mean) ** 2).sum() / q.sum(), 0))
            hlc_time = next((time[p] for p in members if hlc[p]), time[members[0]])
            since = max(min((hlc_time - reference) * unit, 25), -25)
            named = {
                **dict(zip("xyz", xyz[s] / 500, strict=True)),
                **dict(zip(("dx", "dy", "dz"), (xyz[s] - centre) / 200, strict=True)),
                "first_time": max(min((t[0] - reference) * unit, 25), -25),
                "hlc_time": since,
                "near_time": 2 * math.tanh(since / 2),
                "delay": math.log1p((mean - t[0]) / 50) / 3,
                "spread": math.log1p(spread / 50) / 3,
                "charge": math.log10(q.sum()),
                "first_charge": math.log10(q[0]),
                "pulses": math.log1p(len(members)) - math.log(2),
                "hlc": sum(hlc[p] for p in members) / len(members),
                "efficiency": (float(tables.efficiency_S[s]) - 1) / 0.35,
                "scattering": math.log(float(tables.scattering_S[s]) / 30),
                "event_charge": math.log10(total) / 2 - 1,
                "event_doms": math.log(len(doms)) / 2 - 2,
            }
            rows.append([named[name] for name in SUMMARY_FEATURES])
    return rows


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    sensors=st.sampled_from([2, 12, 5160]),
    slots=st.integers(1, 5),
    empty=st.sampled_from(["marker", "zero"]),
    seed=st.integers(0, 2**20),
)
def test_seed_vectors_follow_their_definition(make_pulses, tables, counts, sensors, slots, empty, seed):
    pulses = make_pulses(counts, seed=seed, sensors=sensors)
    doms = group_doms(pulses)
    vectors = seed_vectors(pulses, doms, tables.xyz_S3[doms.sensor_D], slots=slots, empty=empty)
    assert vectors.shape == (doms.n_doms, feature_width(ModelConfig(slots=slots)))
    expected = naive_seed(pulses, tables.xyz_S3.double().numpy(), slots, empty)
    assert torch.allclose(vectors.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    sensors=st.sampled_from([2, 12, 5160]),
    auxiliary=st.sampled_from([None, True, False]),
    seed=st.integers(0, 2**20),
)
def test_summaries_follow_their_definition(make_pulses, tables, counts, sensors, auxiliary, seed):
    pulses = make_pulses(counts, seed=seed, sensors=sensors)
    if auxiliary is not None:
        pulses = replace(pulses, auxiliary_P=torch.full_like(pulses.auxiliary_P, auxiliary))
    summary = summarise(pulses, tables)
    expected = torch.tensor(naive_summary(pulses, tables), dtype=torch.float64)
    worst = (summary.double() - expected).abs().max(0).values
    assert (worst < 1e-5).all(), dict(zip(SUMMARY_FEATURES, worst.tolist(), strict=True))


def summarise(pulses: Pulses, tables: Tables) -> torch.Tensor:
    doms = group_doms(pulses)
    facts = {
        "scattering_D": tables.scattering_S[doms.sensor_D],
        "efficiency_D": tables.efficiency_S[doms.sensor_D],
    }
    return dom_summary(pulses, doms, tables.xyz_S3[doms.sensor_D], **facts)


def test_no_real_pulse_looks_like_an_absent_one(real_mini, tables):
    pulses = KaggleFolder(real_mini).read_batch(1)
    doms = group_doms(pulses)
    vectors = seed_vectors(pulses, doms, tables.xyz_S3[doms.sensor_D], slots=4, empty="marker")
    slots = vectors[:, 4:].view(-1, 4, 3)
    marked = (slots == torch.tensor([-1.0, -1.0, 0.0])).all(2)
    assert torch.equal(marked.sum(1), (4 - doms.count_D).clamp(min=0))
    assert (slots[~marked][:, 2].abs() == 0.5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_event_has_the_same_tokens_alone_and_in_a_batch(make_pulses, tables, name):
    pulses = make_pulses([20, 3, 50, 1, 8], seed=4)
    together = build_tokens(pulses, CONFIGS[name], tables)
    for event in range(5):
        alone = build_tokens(slice_events(pulses, event, event + 1), CONFIGS[name], tables)
        rows = slice(int(together.offsets_E1[event]), int(together.offsets_E1[event + 1]))
        assert torch.equal(together.features_TF[rows], alone.features_TF)
        assert torch.equal(together.target_E3[event], alone.target_E3[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("known", [True, False])
def test_token_batches_keep_their_contract(make_pulses, tables, name, known):
    config = CONFIGS[name]
    pulses = make_pulses([20, 3, 50, 1], seed=5)
    n_doms = group_doms(pulses).offsets_E1.diff().numpy()
    tokens = (n_doms if config.dom_cap is None else np.minimum(n_doms, config.dom_cap)) + 1
    tight = build_tokens(pulses, config, tables, n_doms_E=n_doms if known else None)
    wide = build_tokens(pulses, config, tables, n_doms_E=n_doms, token_capacity=100, event_capacity=7)
    assert tight.features_TF.shape == (tokens.sum(), feature_width(config))
    assert tight.offsets_E1.tolist() == [0, *tokens.cumsum()]
    assert tight.offsets_E1.dtype == torch.int32
    assert tight.cls_E.tolist() == tight.offsets_E1[:-1].tolist()
    assert (tight.features_TF[tight.cls_E] == 0).all()
    assert tight.valid_E.all()
    assert (wide.n_events, wide.n_tokens) == (tight.n_events, tight.n_tokens) == (4, tokens.sum())
    assert wide.features_TF.shape[0] == 100
    assert wide.features_TF.is_contiguous()
    assert torch.equal(wide.features_TF[: tokens.sum()], tight.features_TF)
    assert (wide.features_TF[tokens.sum() :] == 0).all()
    assert wide.offsets_E1.tolist() == [0, *tokens.cumsum(), *[tokens.sum()] * 3]
    assert wide.cls_E.tolist() == [*tight.cls_E.tolist(), 99, 99, 99]
    assert wide.valid_E.tolist() == [True] * 4 + [False] * 3
    assert torch.allclose(wide.target_E3.norm(dim=1), torch.ones(7))
    assert wide.index_E.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="exceed the capacity of 4 events and 10 tokens"):
        build_tokens(pulses, config, tables, token_capacity=10)


def test_targets_point_where_the_neutrino_came_from(make_pulses, tables):
    pulses = replace(
        make_pulses([3, 3, 3]),
        azimuth_E=torch.tensor([0.0, math.pi / 2, 1.0], dtype=torch.float64),
        zenith_E=torch.tensor([math.pi / 2, math.pi / 2, 0.0], dtype=torch.float64),
    )
    target = build_tokens(pulses, SEED, tables).target_E3
    assert target.dtype == torch.float32
    assert torch.allclose(target, torch.eye(3), atol=1e-7)
    unlabelled = replace(pulses, azimuth_E=None, zenith_E=None)
    assert build_tokens(unlabelled, SEED, tables).target_E3 is None


@given(angle=st.floats(-7, 7), x=st.floats(-1e3, 1e3), y=st.floats(-1e3, 1e3), z=st.floats(-1e3, 1e3))
def test_rotation_about_the_vertical(angle, x, y, z):
    vector, turn = torch.tensor([[x, y, z]], dtype=torch.float64), torch.tensor([angle], dtype=torch.float64)
    turned = rotate_z(vector, turn)
    assert torch.allclose(turned.norm(), vector.norm())
    assert float(turned[0, 2]) == z
    assert torch.allclose(rotate_z(turned, -turn), vector, atol=1e-9)
    assert torch.allclose(rotate_z(torch.tensor([[1.0, 0, 0]]), torch.tensor([math.pi / 2]))[0, 1], torch.tensor(1.0))


@pytest.mark.parametrize("name", CONFIGS)
def test_rotating_an_event_is_rotating_the_detector_and_the_target(make_pulses, tables, name):
    pulses = make_pulses([30, 12], seed=8)
    angle = 0.7
    turned_tables = replace(tables, xyz_S3=rotate_z(tables.xyz_S3, torch.full((5160,), angle)))
    turned_pulses = replace(pulses, azimuth_E=pulses.azimuth_E + angle)
    a = build_tokens(pulses, CONFIGS[name], tables, rotation_E=torch.full((2,), angle))
    b = build_tokens(turned_pulses, CONFIGS[name], turned_tables)
    assert torch.allclose(a.features_TF, b.features_TF, atol=1e-5)
    assert torch.allclose(a.target_E3, b.target_E3, atol=1e-6)
    unturned = build_tokens(pulses, CONFIGS[name], tables)
    assert not torch.allclose(a.features_TF, unturned.features_TF, atol=1e-2)
    assert torch.allclose(a.target_E3[:, 2], unturned.target_E3[:, 2])


@pytest.mark.parametrize("how", ["earliest", "hlc"])
@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    sensors=st.sampled_from([2, 12, 5160]),
    seed=st.integers(0, 2**20),
)
def test_selection_ranks_doms_as_it_says(make_pulses, how, counts, sensors, seed):
    pulses = make_pulses(counts, seed=seed, sensors=sensors)
    ranks = select_doms(pulses, group_doms(pulses), how).tolist()
    at = 0
    for event in range(len(counts)):
        doms = doms_of(pulses, event)

        def priority(dom: tuple[int, list[int]]) -> tuple[float, ...]:
            sensor, members = dom
            if how == "earliest":
                return (int(pulses.time_P[members[0]]), sensor)
            dark = bool(pulses.auxiliary_P[members].all())
            return (dark, -round(float(pulses.charge_P[members].double().sum()) * 40), sensor)

        best_first = sorted(doms, key=priority)
        assert [best_first.index(dom) for dom in doms] == ranks[at : at + len(doms)]
        at += len(doms)


def test_the_largest_real_event_makes_tokens(make_pulses, tables):
    pulses = make_pulses([178_250], seed=1, sensors=2256)
    for config in CONFIGS.values():
        batch = build_tokens(pulses, config, tables)
        assert batch.n_tokens == (2257 if config.dom_cap is None else config.dom_cap + 1)
        assert torch.isfinite(batch.features_TF).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_makes_the_same_tokens_without_waiting(make_pulses, tables, name):
    pulses = make_pulses([20, 300, 50, 1], seed=4)
    n_doms = group_doms(pulses).offsets_E1.diff().numpy()
    turn = torch.rand(4) * 6
    here = build_tokens(pulses, CONFIGS[name], tables, n_doms_E=n_doms, rotation_E=turn, token_capacity=400)
    device_tables = Tables(*(x.cuda() for x in vars(tables).values()))
    device_pulses, device_turn = pulses.to("cuda"), turn.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = build_tokens(
            device_pulses,
            CONFIGS[name],
            device_tables,
            n_doms_E=n_doms,
            rotation_E=device_turn,
            token_capacity=400,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(here.features_TF, there.features_TF.cpu(), atol=1e-5)
    assert torch.equal(here.offsets_E1, there.offsets_E1.cpu())
    assert torch.allclose(here.target_E3, there.target_E3.cpu(), atol=1e-6)
