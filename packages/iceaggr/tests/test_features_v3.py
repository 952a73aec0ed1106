"""The features that v3 adds to a DOM's vector."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.config import ModelConfig, TrainConfig, with_parts
from iceaggr.data.features import AGGREGATES, SUMMARY_FEATURES, dom_summary, feature_width
from iceaggr.data.features_v3 import ICE_SPEED, fourier_features
from iceaggr.data.grouping import group_doms
from iceaggr.data.tokens import build_tokens
from lab_shared.testing import assert_parity

TINY = TrainConfig(model=ModelConfig(slots=2, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16))


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
