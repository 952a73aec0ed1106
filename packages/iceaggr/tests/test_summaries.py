"""The columns behind the report's figures against loops."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from iceaggr import summaries
from iceaggr.metrics import opening_angle_deg

errors = arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 180))


@given(errors)
@settings(max_examples=50)
def test_error_distribution_is_a_distribution(error):
    columns = summaries.error_distribution({"model": error})
    width = columns["high_deg"] - columns["low_deg"]
    assert np.isclose((columns["model density"] * width).sum(), 1)
    assert np.isclose((columns["random density"] * width).sum(), 1)
    naive = [(error < high).mean() if high < 180 else 1.0 for high in columns["high_deg"]]
    np.testing.assert_allclose(columns["model cumulative"], naive, atol=1e-12)


def test_random_law_matches_random_directions(isotropic):
    rng = np.random.default_rng(2)
    columns = summaries.error_distribution({"model": opening_angle_deg(isotropic(rng, 50_000), isotropic(rng, 50_000))})
    np.testing.assert_allclose(columns["model cumulative"], columns["random cumulative"], atol=0.01)


@given(arrays(np.int64, st.integers(1, 200), elements=st.integers(5, 40)))
@settings(max_examples=50)
def test_quantile_edges_hold_every_value(x):
    edges = summaries.quantile_edges(x, (0, 0.25, 0.5, 0.9, 1))
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= x.min()
    assert x.max() <= edges[-1]


def test_resolution_matches_a_loop():
    rng = np.random.default_rng(3)
    x, error = rng.integers(0, 51, 500), rng.uniform(0, 180, 500)
    edges = np.array([0.0, 10, 11, 30, 50])
    columns = summaries.resolution(x, {"model": error}, edges)
    row = 0
    for low, high in itertools.pairwise(edges):
        members = [e for v, e in zip(x, error, strict=True) if low <= v < high or v == high == 50]
        if len(members) < summaries.MIN_EVENTS:
            continue
        assert (columns["low"][row], columns["high"][row], columns["events"][row]) == (
            low,
            high,
            len(members),
        )
        assert columns["model median"][row] == np.median(members)
        assert columns["model p16"][row] == np.quantile(members, 0.16)
        row += 1
    assert row == len(columns["x"]) == 3, "the narrow bin has too few events"


def test_sharpness_matches_a_loop(predictions):
    error, kappa, n = predictions["error_deg"], predictions["kappa"], len(predictions["kappa"])
    columns = summaries.sharpness(kappa, {"model": error, "line fit": predictions["linefit_error_deg"]}, steps=7)
    ranked = sorted(range(n), key=lambda i: -kappa[i])
    for i, fraction in enumerate(columns["fraction"]):
        kept = ranked[: round(fraction * n)]
        assert np.isclose(columns["model"][i], np.mean(error[kept]))
        assert np.isclose(columns["line fit"][i], np.mean(predictions["linefit_error_deg"][kept]))
        assert columns["kappa"][i] == kappa[kept].min()
    assert (columns["ideal"] <= columns["model"] + 1e-9).all()
    assert np.isclose(columns["ideal"][-1], columns["model"][-1])


def test_sky_matches_a_loop(predictions):
    p = predictions
    columns = summaries.sky(p["azimuth"], p["zenith"], p["error_deg"], p["pred_zenith"])
    assert columns["events"].sum() == len(p["zenith"])
    azimuth, cos_zenith = np.degrees(p["azimuth"]), np.cos(p["zenith"])
    for i in range(0, len(columns["events"]), 7):
        inside = (azimuth >= columns["azimuth_low_deg"][i]) & (azimuth < columns["azimuth_high_deg"][i])
        inside &= (cos_zenith >= columns["cos_zenith_low"][i]) & (cos_zenith < columns["cos_zenith_high"][i])
        assert columns["events"][i] == inside.sum()
        if inside.sum() >= summaries.MIN_EVENTS:
            assert np.isclose(columns["mean error"][i], p["error_deg"][inside].mean())
            bias = np.degrees((p["pred_zenith"] - p["zenith"])[inside].mean())
            assert np.isclose(columns["zenith bias"][i], bias)
        else:
            assert np.isnan(columns["mean error"][i])


def test_sky_takes_the_poles_and_the_seam():
    azimuth = np.array([0.0, 2 * np.pi, -1e-18, np.pi])
    columns = summaries.sky(azimuth, np.array([0.0, np.pi, np.pi / 2, 0.0]), np.ones(4), np.ones(4))
    assert columns["events"].sum() == 4


def test_zenith_response_of_a_blind_and_of_a_perfect_predictor():
    rng = np.random.default_rng(4)
    zenith, blind = np.arccos(rng.uniform(-1, 1, (2, 60_000)))
    density = summaries.zenith_response(zenith, blind, bins=10)["density"]
    np.testing.assert_allclose(density, 0.5, atol=0.06)
    columns = summaries.zenith_response(zenith, zenith, bins=10)
    np.testing.assert_allclose(columns["density"].reshape(10, 10), 5 * np.eye(10))
    assert np.abs(summaries.zenith_bias(zenith, zenith)["model bias"]).max() == 0


def test_zenith_bias_sign_and_error():
    zenith = np.full(100, 2.0)
    up = np.arccos(np.cos(2.0) + np.tile([0.1, 0.3], 50))
    columns = summaries.zenith_bias(zenith, up)
    np.testing.assert_allclose(columns["model bias"], [0.2])
    np.testing.assert_allclose(columns["model standard error"], [0.1 * np.sqrt(100 / 99) / 10])


@given(arrays(np.float64, st.integers(1, 150), elements=st.floats(-1e3, 1e3)))
@settings(max_examples=50)
def test_smooth_matches_a_loop(values):
    reach = max(1, len(values) // 50)
    naive = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(summaries.smooth(values), naive, atol=1e-7)
