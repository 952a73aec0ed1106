"""iceaggr.analysis: studies of features, of the residual stream, of the head and of errors."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.analysis import direction_head, errors, features, residuals
from iceaggr.analysis.columns import columns_of
from iceaggr.analysis.inside import look_inside, token_batches
from iceaggr.analysis.rank import effective_rank, participation_ratio, singular_values
from iceaggr.config import ModelConfig, TrainConfig
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.heads import DirectionalHead
from torch import nn

TINY = ModelConfig(slots=3, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16)
V1 = replace(TINY, arch="v1", features="summary")
UNPROJECTED = replace(TINY, input="none", layers=3)
pytestmark = pytest.mark.usefixtures("one_thread")


def events_of(batch):
    """Slices of the token rows of each event; the first row is CLS."""
    ends = batch.offsets_E1.tolist()
    return [slice(a, b) for a, b in pairwise(ends[: batch.n_events + 1])]


# --- studies of features --------------------------------------------------------------------------


class OneColumn(nn.Module):
    """Points along the mean over an event's DOMs of (column a, column b, 1)."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, features_TF, mask, cls_E):
        event_T = torch.searchsorted(cls_E, torch.arange(len(features_TF)), right=True) - 1
        sums = torch.zeros(len(cls_E), 3)
        rows = torch.stack([features_TF[:, self.a], features_TF[:, self.b], torch.ones(len(features_TF))], 1)
        return sums.index_add(0, event_T, rows)


def test_permutation_changes_only_what_a_model_reads(store, tables):
    config = TrainConfig(model=replace(TINY, features="summary"))
    columns = columns_of(config.model)
    batches = list(token_batches(store, np.arange(store.n_events), config, tables))
    z, event_charge = columns.names.index("z"), columns.names.index("event_charge")
    model = OneColumn(z, event_charge)
    groups = {"x": [0], "z": [z], "event_charge": [event_charge], "both": [z, event_charge]}
    whole, shuffled = features.permuted_errors(model, batches, groups, columns, seed=0)
    v = torch.cat([model(b.features_TF, None, b.cls_E) for b in batches])
    true = torch.cat([b.target_E3 for b in batches])
    np.testing.assert_allclose(whole, opening_angle_deg(v, true), atol=1e-6)
    np.testing.assert_array_equal(shuffled["x"], whole)
    assert all((shuffled[name] != whole).mean() > 0.8 for name in ("z", "event_charge", "both"))
    again = features.permuted_errors(model, batches, groups, columns, seed=0)[1]
    np.testing.assert_array_equal(again["both"], shuffled["both"])


def test_event_level_columns_stay_equal_within_an_event(store, tables):
    config = TrainConfig(model=replace(TINY, features="summary"))
    columns = columns_of(config.model)
    batches = list(token_batches(store, np.arange(store.n_events), config, tables))
    column, seen = columns.names.index("event_doms"), []

    class Look(OneColumn):
        def forward(self, features_TF, mask, cls_E):
            seen.append(features_TF[:, column])
            return super().forward(features_TF, mask, cls_E)

    features.permuted_errors(Look(0, 1), batches, {"event_doms": [column]}, columns, seed=1)
    before, after = seen
    new = {after[rows][1].item() for rows in events_of(batches[0])}
    assert all(len(after[rows][1:].unique()) == 1 for rows in events_of(batches[0]))
    assert new == {before[rows][1].item() for rows in events_of(batches[0])}
    assert not torch.equal(before, after)


def test_column_norms(store, tables, awake):
    model, columns = awake(TINY), columns_of(TINY)
    with torch.no_grad():
        model.input.layers[0].weight[:, columns.names.index("t1")] = 3 / 32**0.5
    study = features.column_norms(model, columns, np.full(len(columns.names), 2.0))
    norm = {name: model.input.layers[0].weight[:, i].norm().item() for i, name in enumerate(columns.names)}
    by_feature = study.tables["by feature"]
    assert dict(zip(by_feature["feature"], by_feature["norm"], strict=True)) == pytest.approx(norm, rel=1e-5)
    assert norm["t1"] == pytest.approx(3)
    assert study.tables["by type"]["share"].sum() == pytest.approx(1)
    time = sum(norm[f"t{i}"] for i in (1, 2, 3)) / sum(norm.values())
    assert study.scalars["share of time"] == pytest.approx(time, rel=1e-5)
    slot = np.sqrt(norm["t2"] ** 2 + norm["q2"] ** 2 + norm["a2"] ** 2)
    assert study.tables["by pulse slot"]["norm"][1] == pytest.approx(slot, rel=1e-5)
    assert "no projection" in features.column_norms(awake(UNPROJECTED), columns, np.ones(13)).reason


# --- studies of the residual stream and the head --------------------------------------------------


def test_residual_scales(awake):
    model = awake(TINY)
    with torch.no_grad():
        model.blocks[1].scale_x.fill_(0.25)
    table = residuals.scales(model).tables["by layer"]
    assert table["scale_x"].tolist() == [1, 0.25]
    assert table["scale_x0"] == pytest.approx([0.1, 0.1])
    assert "v1" in residuals.scales(awake(V1)).reason


def test_padding_is_empty_before_the_first_block(store, tables, awake):
    config = TrainConfig(model=UNPROJECTED)
    model = awake(config.model)
    inside = look_inside(model, store, np.arange(20), config, tables)
    study = residuals.padded_dimensions(model, inside, "generated data")
    table = study.tables["by stage"]
    ratio = table["DOM features"][1] / table["DOM padding"][1]
    assert study.scalars["features / padding, block 0"] == pytest.approx(ratio)
    assert table["DOM padding"][0] == 0
    assert table["DOM features"][0] == pytest.approx(32**0.5, rel=1e-5)
    assert (table["DOM padding"][1:] > 0).all()
    assert "input projection" in residuals.padded_dimensions(awake(TINY), inside, "").reason
    assert "starts as 1" not in residuals.padded_dimensions(model, inside, "").caption
    plain = awake(replace(UNPROJECTED, input_norm="none"))
    assert "one that starts as 1" in residuals.padded_dimensions(plain, inside, "").caption


@given(st.integers(1, 12), st.floats(0.1, 10))
@settings(max_examples=20)
def test_ranks_of_equal_and_of_single_directions(n, size):
    s = singular_values(size * np.linalg.qr(np.random.default_rng(n).normal(size=(15, n)))[0])
    assert effective_rank(s) == pytest.approx(n)
    assert participation_ratio(s) == pytest.approx(n)
    single = singular_values(np.outer(np.arange(1, 6), np.arange(1, n + 1)))
    assert effective_rank(single) == pytest.approx(1, abs=1e-5)


def test_ranks_match_their_formulas():
    matrix = np.random.default_rng(1).normal(size=(7, 4))
    s = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix), s, rtol=1e-9)
    np.testing.assert_allclose(singular_values(matrix.T), s, rtol=1e-9)
    p = s / s.sum()
    assert effective_rank(s) == pytest.approx(np.prod(p**-p))


@pytest.mark.parametrize("components", [1, 2])
def test_direction_head(components):
    torch.manual_seed(0)
    head = DirectionalHead(8, 16, components)
    with torch.no_grad():
        head.fc1.bias[:3] = -1e4
        head.fc1.bias[3:] = 1e4
        head.fc2.weight[:2] = torch.eye(2, 16) * 5
        hidden = head.fc1(torch.randn(50, 8)).numpy()
    hidden[:25, -1] *= -1  # on for half of the events: no dead unit
    scalars = direction_head.direction_head(head, hidden, "generated data").scalars
    of = " of component 1" if components > 1 else ""
    assert scalars["dead units"] == 3
    assert scalars["mean activation rate"] == pytest.approx(12.5 / 16)
    assert scalars[f"norm of row x{of}"] == pytest.approx(5)
    assert scalars[f"cosine of rows x and y{of}"] == 0
    assert ("norm of row w of component 2" in scalars) == (components == 2)
    assert scalars["effective rank of activations"] <= 16


# --- errors and bias ------------------------------------------------------------------------------


def test_bias_matches_a_loop():
    rng = np.random.default_rng(5)
    true, v = rng.normal(size=(2, 400, 3))
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    predictions = errors.Predictions(v, true, rng.integers(20, 300, 400))
    study = errors.bias(predictions, "generated data")
    residual = v / np.linalg.norm(v, axis=1, keepdims=True) - true
    np.testing.assert_allclose(study.tables["overall"]["bias"], residual.mean(0))
    np.testing.assert_allclose(study.tables["overall"]["se"], residual.std(0, ddof=1) / 20)
    up = np.degrees(np.arccos(true[:, 2])) < 30
    assert study.tables["z by true zenith"]["z bias"][0] == pytest.approx(residual[up, 2].mean())
    few = predictions.n_pulses_E < 50
    assert study.tables["z by pulses"]["se"][0] == pytest.approx(residual[few, 2].std(ddof=1) / few.sum() ** 0.5)
    assert study.tables["z by pulses"]["events"].sum() == 400
    percentiles = errors.error_percentiles(predictions, "generated data")
    assert percentiles.scalars["P25 (°)"] == pytest.approx(np.quantile(opening_angle_deg(v, true), 0.25))
