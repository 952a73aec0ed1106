"""iceaggr.analysis, what happens inside a model: every definition against a loop over events."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.analysis import features, heads
from iceaggr.analysis.columns import columns_of, permuted_groups, pulses_of_doms
from iceaggr.analysis.inside import BUCKETS, MIN_DOMS, cls_attention, look_inside, token_batches, walk
from iceaggr.analysis.ranks import ranks_within, spearman_within
from iceaggr.config import ModelConfig, TrainConfig
from iceaggr.data.features import Tables, feature_width
from iceaggr.data.grouping import group_doms
from iceaggr.data.tokens import build_tokens
from iceaggr.predict import token_mask
from lab_shared.attention import attend
from lab_shared.testing import assert_parity

TINY = ModelConfig(slots=3, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16)
CONFIGS = {
    "v2": TINY,
    "v1": replace(TINY, arch="v1", features="summary"),
    "none": replace(TINY, input="none", layers=3),
    "interval": replace(TINY, interval=True, ice=True, aggregates=True),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CONFIGS)
def walked(request, store, tables, awake):
    """(model, config, inside, batch): all events in one batch, in the order of the walk."""
    config = TrainConfig(model=CONFIGS[request.param])
    model, index = awake(config.model), np.arange(store.n_events)
    (batch,) = token_batches(store, index, config, tables)
    return model, config, look_inside(model, store, index, config, tables), batch


def events_of(batch):
    """Slices of the token rows of each event; the first row is CLS."""
    ends = batch.offsets_E1.tolist()
    return [slice(a, b) for a, b in pairwise(ends[: batch.n_events + 1])]


# --- rank correlation -----------------------------------------------------------------------------


def naive_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def naive_spearman(a, b):
    a, b = (x - x.mean() for x in (naive_ranks(a), naive_ranks(b)))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return (a * b).sum() / scale if scale > 0 else np.nan


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 999), kinds=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_spearman_within_events_matches_a_loop(lengths, seed, kinds):
    rng = np.random.default_rng(seed)
    event = np.repeat(np.arange(len(lengths)), lengths)
    a, b = rng.integers(0, kinds, (len(event), 2)), rng.integers(0, kinds, (len(event), 3)).astype(float)
    event_R = torch.from_numpy(event)
    ranks_a, ranks_b = ranks_within(torch.from_numpy(a), event_R), ranks_within(torch.from_numpy(b), event_R)
    rho = spearman_within(ranks_a, ranks_b, event_R, len(lengths)).numpy()
    for e in range(len(lengths)):
        rows = event == e
        np.testing.assert_array_equal(ranks_a[rows, 0], naive_ranks(a[rows, 0]))
        naive = [[naive_spearman(a[rows, i], b[rows, j]) for j in range(3)] for i in range(2)]
        np.testing.assert_allclose(rho[e], naive, atol=1e-12)


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS.values(),
        replace(TINY, fourier=2),
        replace(TINY, slots=1),
        replace(TINY, features="summary", fourier=3),
    ],
)
def test_columns_describe_every_feature_once(config):
    columns = columns_of(config)
    assert len(columns.names) == feature_width(config)
    assert sorted(i for members in columns.types.values() for i in members) == list(range(len(columns.names)))
    groups = permuted_groups(columns)
    assert {i for members in groups.values() for i in members} == set(range(len(columns.names)))
    assert len(groups) < 40


@pytest.mark.parametrize("config", [TINY, CONFIGS["v1"]], ids=["seed", "summary"])
def test_columns_hold_what_they_say(config, store, tables):
    """The columns read as t1, z, q1 and n_pulses order the DOMs of an event as the pulses themselves do."""
    pulses = store.gather(np.arange(3, 12))
    pulses = replace(pulses, time_P=pulses.time_P // 2)  # summaries stop at 17 us from the event's reference time
    doms = group_doms(pulses)
    batch = build_tokens(pulses, config, tables)
    columns = columns_of(config)
    first_P = doms.order_P[doms.start_D]
    raw = {
        "t1": pulses.time_P[first_P].double(),
        "z": tables.xyz_S3[doms.sensor_D, 2],
        "q1": pulses.charge_P[first_P],
        "n_pulses": doms.count_D,
    }
    rows = features.dom_rows(batch)
    assert torch.equal(pulses_of_doms(batch.features_TF[rows], config, columns), doms.count_D)
    for name, values in raw.items():
        read = ranks_within(batch.features_TF[rows, columns.properties[name]][:, None], doms.event_D)
        assert_parity(read, ranks_within(values[:, None], doms.event_D), atol=0, name=name)


# --- the walk -------------------------------------------------------------------------------------


@torch.no_grad()
def test_walk_ends_where_the_model_does(walked):
    model, _, inside, batch = walked
    stages = list(walk(model, batch))
    v_E3 = model.head(stages[-1].x_TD[batch.cls_E])
    assert_parity(v_E3, model(batch.features_TF, token_mask(batch), batch.cls_E), atol=1e-5)
    assert [stage.name for stage in stages] == inside.stages == ["input", *inside.stages[1:-1], "final norm"]
    assert len(stages) == len(model.blocks) + 2
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


@torch.no_grad()
def test_attention_of_cls_is_the_row_of_the_whole_matrix(walked):
    """Against the reference back end's T x T weights, with whatever the model adds to the scores."""
    model, _, _, batch = walked
    mask = token_mask(batch)
    place_T5 = model.place(batch.features_TF, mask)
    length_E = batch.offsets_E1.diff().long()
    event_T = torch.repeat_interleave(torch.arange(batch.n_events), length_E)
    for stage in walk(model, batch):
        if stage.attention is not None:
            q, k, v = stage.attention.project(stage.attended_TD)
            mod = stage.attention.score_mod(place_T5)
            _, whole = attend(q, k, v, mask, score_mod=mod, backend="reference", return_weights=True)
            weight_TH = cls_attention(stage.attention, stage.attended_TD, batch.cls_E, event_T)
            for e, rows in enumerate(events_of(batch)):
                assert_parity(weight_TH[rows], whole[:, batch.cls_E[e], rows].T, atol=1e-6)


@torch.no_grad()
def test_inside_matches_a_loop_over_events(walked):
    model, config, inside, batch = walked
    columns = columns_of(config.model)
    edges = [*BUCKETS.values(), np.inf]
    layer = -1
    norms = {"cls": [], "dom": [], "max": [], "split": []}
    width = batch.features_TF.shape[1]
    for stage in walk(model, batch):
        x = stage.x_TD.double()
        is_dom = torch.ones(len(x), dtype=torch.bool).index_fill(0, batch.cls_E, False)
        norms["cls"].append(x[~is_dom].norm(dim=1).mean())
        norms["dom"].append(x[is_dom].norm(dim=1).mean())
        norms["max"].append(x[is_dom].norm(dim=1).max())
        norms["split"].append([x[is_dom, :width].norm(dim=1).mean(), x[is_dom, width:].norm(dim=1).mean()])
        if stage.attention is None:
            continue
        layer += 1
        q, k, _ = stage.attention.project(stage.attended_TD)
        for e, rows in enumerate(events_of(batch)):
            scores = torch.einsum("hk,thk->ht", q[rows][0], k[rows]) / q.shape[-1] ** 0.5
            weight = scores.softmax(-1).double().numpy()
            np.testing.assert_allclose(inside.self_ELH[e, layer], weight[:, 0], atol=1e-6)
            doms, values = weight[:, 1:], batch.features_TF[rows][1:]
            n = pulses_of_doms(values, config.model, columns).numpy()
            for i, (low, high) in enumerate(pairwise(edges)):
                inside_bucket = (n >= low) & (n < high)
                share = doms[:, inside_bucket].sum(1) / doms.sum(1)
                np.testing.assert_allclose(inside.mass_ELHM[e, layer, :, i], share, atol=1e-5)
                assert inside.share_EM[e, i] == pytest.approx(inside_bucket.mean())
            for head in range(doms.shape[0]):
                for v, column in enumerate(columns.properties.values()):
                    few = doms.shape[1] < MIN_DOMS
                    rho = np.nan if few else naive_spearman(doms[head].astype(np.float32), values[:, column].numpy())
                    # Two nearly equal weights may change places by float32 rounding.
                    np.testing.assert_allclose(inside.rho_ELHV[e, layer, head, v], rho, atol=2e-2)
    for name, values in (("cls", inside.cls_norm_S), ("dom", inside.dom_norm_S), ("max", inside.dom_max_S)):
        np.testing.assert_allclose(values, torch.stack(norms[name]), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(inside.occupancy_S4[:, :2], np.array(norms["split"]), rtol=1e-4, atol=1e-5)
    assert np.isnan(inside.rho_ELHV[-3:]).all(), "the three smallest events come last and have too few DOMs"
    assert inside.dom_share_M.sum() == pytest.approx(1)


def test_batches_of_any_size_give_the_same(store, tables, awake):
    config = TrainConfig(model=TINY)
    model, index = awake(TINY), np.arange(store.n_events)
    whole = look_inside(model, store, index, config, tables)
    halves = [look_inside(model, store, part, config, tables) for part in (index[::2], index[1::2])]
    n = [len(half.self_ELH) for half in halves]
    np.testing.assert_allclose(whole.cls_norm_S, np.average([h.cls_norm_S for h in halves], 0, n), rtol=1e-5)
    sums = sum(half.share_EM.sum(0) for half in halves)
    np.testing.assert_allclose(whole.share_EM.sum(0), sums, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_walk_on_a_gpu_matches_the_cpu(name, store, tables, awake):
    config, index = TrainConfig(model=CONFIGS[name]), np.arange(store.n_events)
    model = awake(config.model)
    on_cpu = look_inside(model, store, index, config, tables)
    there = Tables(*(x.cuda() for x in vars(tables).values()))
    on_gpu = look_inside(model.cuda(), store, index, config, there)
    order = np.argsort(-store.n_doms, kind="stable")  # a CPU takes the longest events first
    np.testing.assert_allclose(on_gpu.self_ELH[order], on_cpu.self_ELH, atol=1e-3)
    np.testing.assert_allclose(on_gpu.mass_ELHM[order], on_cpu.mass_ELHM, atol=1e-3)
    np.testing.assert_allclose(np.nanmean(on_gpu.rho_ELHV, 0), np.nanmean(on_cpu.rho_ELHV, 0), atol=0.02)
    np.testing.assert_allclose(on_gpu.dom_norm_S, on_cpu.dom_norm_S, rtol=1e-3)
    batches = list(token_batches(store, index, config, there))
    groups, columns = {"z": [2]}, columns_of(config.model)
    whole, shuffled = features.permuted_errors(model, batches, groups, columns, seed=0)
    assert whole.shape == shuffled["z"].shape == (store.n_events,)


# --- studies of heads -----------------------------------------------------------------------------


def test_mean_and_error_skip_what_is_unknown():
    values = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    values[:7, 1] = np.nan
    mean, error, n = heads.mean_and_error(values)
    assert n.tolist() == [30, 23]
    assert mean[1] == pytest.approx(values[7:, 1].mean(), abs=1e-6)
    assert error[1] == pytest.approx(values[7:, 1].std(ddof=1) / np.sqrt(23), rel=1e-5)


def test_uniform_attention_has_no_preference():
    share = np.random.default_rng(1).dirichlet(np.ones(4), 50)
    ratio, error = heads.relative_mass(share[:, None, :].copy(), share)
    np.testing.assert_allclose(ratio, 1)
    np.testing.assert_allclose(error, 0, atol=1e-12)


def test_error_of_the_attention_ratio_is_that_of_repeated_samples():
    rng = np.random.default_rng(2)

    def sample():
        share = rng.beta(2, 6, 200)
        mass = np.clip(2 * share + rng.normal(0, 0.1, 200), 0, 1)
        return heads.relative_mass(mass[:, None, None], share[:, None])

    ratios, error = zip(*(sample() for _ in range(400)), strict=True)
    assert np.mean(error) == pytest.approx(np.std(ratios), rel=0.15)


def test_head_studies_name_the_strongest_head(walked):
    _, _, inside, _ = walked
    rho = np.full_like(inside.rho_ELHV, 0.1)
    rho[:, 1, 0, 1] = -0.7
    study = heads.specialisation(replace(inside, rho_ELHV=rho), "generated data")
    assert study.scalars["strongest rho with z"] == "-0.700 ± 0.000 (L1.H0)"
    assert "generated data" in study.caption
    table = study.tables["by layer and head"]
    assert table["z rho"][(table["layer"] == 1) & (table["head"] == 0)] == pytest.approx(-0.7)
    study = heads.self_attention(inside, "generated data")
    assert study.tables["by layer and head"]["weight"].reshape(-1, 2) == pytest.approx(
        inside.self_ELH.mean(0), rel=1e-5
    )
    ratio = heads.multiplicity(inside, "generated data").tables["by layer"]["1 pulses"]
    naive = inside.mass_ELHM[..., 0].mean((0, 2)) / inside.share_EM[:, 0].mean()
    np.testing.assert_allclose(ratio, naive, rtol=1e-5)
