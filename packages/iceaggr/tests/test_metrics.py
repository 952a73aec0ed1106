import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.metrics import opening_angle_deg, summary
from lab_shared.testing import assert_equivariant, assert_parity

azimuths = st.floats(0, 2 * np.pi, exclude_max=True)
zeniths = st.floats(0, np.pi)


@given(azimuths, zeniths)
@settings(deadline=None)
def test_angles_round_trip(azimuth, zenith):
    vector = angles_to_vector(np.array([azimuth]), np.array([zenith]))
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-14)
    az, zen = vector_to_angles(3.7 * vector)
    assert 0 <= az[0] < 2 * np.pi
    assert 0 <= zen[0] <= np.pi
    assert zen[0] == pytest.approx(zenith, abs=1e-12)
    if 1e-6 < zenith < np.pi - 1e-6:
        assert np.cos(az[0] - azimuth) == pytest.approx(1, abs=1e-12)


def test_azimuth_never_reaches_two_pi():
    az, zen = vector_to_angles(np.array([[1.0, -1e-300, 0], [1.0, -1e-17, 0], [1, 0.0, 0], [-1, -0.0, 0], [0, 0, -2]]))
    assert ((az >= 0) & (az < 2 * np.pi)).all()
    assert_parity(zen, np.array([np.pi / 2] * 4 + [np.pi]), atol=1e-15)


def test_the_kaggle_convention():
    # zenith 0 looks straight up; azimuth counts from x to y
    assert_parity(angles_to_vector(np.array([0.3]), np.array([0.0])), np.array([[0.0, 0, 1]]), atol=1e-15)
    up_y = angles_to_vector(np.array([np.pi / 2]), np.array([np.pi / 2]))
    assert_parity(up_y, np.array([[0.0, 1, 0]]), atol=1e-15)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.5, np.pi / 2, 3.0, np.pi - 1e-9, np.pi])
def test_opening_angle_is_exact_everywhere(angle):
    a = np.array([[0.0, 0.0, 2.0]])
    b = np.array([[np.sin(angle), 0, np.cos(angle)]]) * 0.1
    assert_parity(opening_angle_deg(a, b), np.rad2deg([angle]), atol=1e-13, rtol=1e-13)


def test_opening_angle_equals_the_kaggle_formula_and_ignores_rotations():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 500, 3))
    cos = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert_parity(opening_angle_deg(a, b), np.rad2deg(np.arccos(cos)), atol=1e-6)
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert_equivariant(
        lambda ab: opening_angle_deg(*ab),
        (a, b),
        lambda ab: (ab[0] @ q.T, ab[1] @ q.T),
        lambda y: y,
        atol=1e-10,
    )


def test_torch_in_torch_out_in_float64():
    a = torch.randn(5, 3)
    angle = opening_angle_deg(a, a.roll(1, 0))
    assert isinstance(angle, torch.Tensor)
    assert angle.dtype == torch.float64
    assert isinstance(opening_angle_deg(a.numpy(), a.roll(1, 0).numpy()), np.ndarray)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_no_perfect_prediction(bad):
    a = np.ones((3, 3))
    b = a.copy()
    b[1] = bad
    with pytest.raises(ValueError, match=r"vector 1 is .* has no direction"):
        opening_angle_deg(a, b)


def test_summary_agrees_with_numpy_and_brackets_the_truth():
    rng = np.random.default_rng(1)
    errors = np.minimum(rng.exponential(40, size=3000), 180)
    zenith, n_pulses = np.arccos(rng.uniform(-1, 1, 3000)), rng.integers(10, 20_000, 3000)
    kind = np.array(["track", "cascade"])[rng.integers(0, 2, 3000)]
    s = summary(errors, zenith=zenith, n_pulses=n_pulses, event_type=kind, resamples=200)
    assert s["n"] == 3000
    assert s["mean_deg"]["value"] == pytest.approx(errors.mean())
    assert s["median_deg"]["value"] == pytest.approx(np.median(errors))
    for p in (10, 25, 75, 90):
        assert s[f"p{p}"]["value"] == pytest.approx(np.percentile(errors, p))
        assert s[f"p{p}"]["low"] < s[f"p{p}"]["value"] < s[f"p{p}"]["high"]
    standard_error = errors.std() / np.sqrt(3000)
    assert s["mean_deg"]["high"] - s["mean_deg"]["low"] == pytest.approx(2 * 1.96 * standard_error, rel=0.2)
    for rows in s["by"].values():
        assert sum(row["n"] for row in rows) == 3000
    track = next(row for row in s["by"]["type"] if row["bin"] == "track")
    assert track["mean_deg"]["value"] == pytest.approx(errors[kind == "track"].mean())
    steep = next(row for row in s["by"]["zenith"] if row["bin"] == "0-30 deg")
    assert steep["mean_deg"]["value"] == pytest.approx(errors[zenith < np.pi / 6].mean())
    bright = next(row for row in s["by"]["n_pulses"] if row["bin"] == ">=10000")
    assert bright["n"] == (n_pulses >= 10_000).sum()
    assert json.loads(json.dumps(s)) == s


def test_small_groups_have_no_interval_and_empty_ones_no_row():
    s = summary(np.linspace(1, 50, 30), n_pulses=np.array([40] * 25 + [100_000] * 5), resamples=100)
    assert [row["bin"] for row in s["by"]["n_pulses"]] == ["0-49", ">=10000"]
    assert s["by"]["n_pulses"][1]["mean_deg"] == {
        "value": pytest.approx(np.linspace(1, 50, 30)[25:].mean()),
        "low": None,
        "high": None,
    }
    assert s["by"]["n_pulses"][0]["mean_deg"]["low"] is not None


@pytest.mark.parametrize(
    ("errors", "options", "message"),
    [
        ([], {}, "at least one event"),
        ([1.0, np.nan], {}, "error 1 is nan"),
        ([1.0, 181.0], {}, "error 1 is 181"),
        ([1.0, 2.0], {"zenith": np.zeros(3)}, "zenith has shape"),
    ],
)
def test_summary_refuses(errors, options, message):
    with pytest.raises(ValueError, match=message):
        summary(errors, **options)
