"""Mixtures of von Mises-Fisher distributions, and the calibration of what a model says with them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.calibrate import (
    CALIBRATION,
    calibrate_run,
    curves,
    fit_arrays,
    halves,
    load_calibration,
    predicted_components,
)
from iceaggr.calibration import Levels, containment_deg, expected_error_deg, fit_temperature, judge, pull
from iceaggr.cli import main
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.losses import mean_vector, mixture_nll
from iceaggr.metrics import opening_angle_deg
from iceaggr.uncertainty import (
    DEG2_PER_SR,
    Mixture,
    containment,
    credible_regions,
    log_density,
    log_outside,
    mean_direction,
    points,
    sphere_grid,
)
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity

TWO = Mixture([[0.7, 0.3]], [[[3.0, 20.0, 10.0], [-2.0, -12.0, -4.0]]])


def outputs(n, components, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (n, 4 * components)).astype(np.float32)


def drawn(mixture, seed=0):
    """One direction per event, drawn from its own distribution: a turn about the mean of a component."""
    rng = np.random.default_rng(seed)
    n = len(mixture)
    component = (rng.random((n, 1)) > mixture.weight_EK.cumsum(axis=1)[:, :-1]).sum(axis=1)
    v = mixture.vector_EK3[np.arange(n), component]
    kappa = np.linalg.norm(v, axis=1)
    u = rng.random(n)
    cosine = 1 + np.log(u + (1 - u) * np.exp(-2 * kappa)) / kappa
    across = np.cross(v, rng.normal(size=(n, 3)))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return cosine[:, None] * v / kappa[:, None] + np.sqrt(1 - cosine**2)[:, None] * across


@given(st.floats(0, 200), st.floats(0, 200), st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_densities_integrate_to_one(a, b, weight):
    mixture = Mixture([[weight, 1 - weight]], [[[0, 0.6 * a, 0.8 * a], [b, 0, 0]]])
    grid = sphere_grid(40_000)
    assert np.exp(log_density(mixture, grid)).mean() * 4 * np.pi == pytest.approx(1, abs=2e-3)


def test_density_and_mean_are_those_of_the_loss():
    out, target = outputs(50, 3), sphere_grid(50)
    mixture = Mixture.of_output(out)
    nll, _ = mixture_nll(torch.from_numpy(out), torch.from_numpy(target).float())
    assert -log_density(mixture, target[:, None]).sum() == pytest.approx(float(nll), rel=1e-5)
    vector = mean_vector(torch.from_numpy(out)).numpy()
    assert_parity(mean_direction(mixture), vector / np.linalg.norm(vector, axis=1, keepdims=True), atol=1e-4)


def test_points_follow_the_distribution():
    x = points(TWO, 4096)[0]
    assert_parity(np.linalg.norm(x, axis=1), np.ones(4096), atol=1e-12)
    first = x @ np.array([3.0, 20, 10]) > 0
    assert first.mean() == pytest.approx(0.7, abs=0.01)
    grid = sphere_grid(100_000)
    density = np.exp(log_density(TWO, grid)[0])
    assert_parity(x.mean(axis=0), (density[:, None] * grid).sum(axis=0) / density.sum(), atol=2e-3)
    isotropic = points(Mixture.single(np.zeros((1, 3))), 4096)[0]
    assert np.abs(isotropic.mean(axis=0)).max() < 0.01


@pytest.mark.parametrize("kappa", [0.3, 5.0, 1e4])
def test_one_component_as_two_halves_of_itself(kappa):
    v = np.array([[0.0, 0.6 * kappa, 0.8 * kappa]])
    one, two = Mixture.single(v), Mixture([[0.5, 0.5]], np.repeat(v[:, None], 2, axis=1))
    truth = np.array([[0.0, np.sin(0.7), np.cos(0.7)]])
    assert_parity(containment(two, truth), containment(one, truth), atol=5e-3)
    threshold, area = credible_regions(one)
    assert_parity(area[0], credible_regions(two)[1][0], atol=0, rtol=0.01)
    cap = [2 * np.pi * (1 - np.cos(np.deg2rad(containment_deg(kappa, p)[0]))) * DEG2_PER_SR for p in (0.5, 0.9)]
    assert_parity(area[0], np.array(cap), atol=0, rtol=1e-6)
    assert_parity(threshold[0], credible_regions(two)[0][0], atol=0.03)
    assert_parity(expected_error_deg(two), expected_error_deg(one), atol=0, rtol=0.01)


def test_regions_match_a_grid():
    grid = sphere_grid(200_000)
    log = log_density(TWO, grid)[0]
    order = np.argsort(-log)
    mass = np.exp(log[order]).cumsum() * 4 * np.pi / len(grid)
    threshold, area = credible_regions(TWO, (0.5, 0.9))
    for level, t, a in zip((0.5, 0.9), threshold[0], area[0], strict=True):
        inside = int(np.searchsorted(mass, level))
        assert a == pytest.approx(inside / len(grid) * 4 * np.pi * DEG2_PER_SR, rel=0.01)
        assert t == pytest.approx(log[order[inside]], abs=0.03)
    here = grid[order[1000]]
    assert containment(TWO, here[None])[0] == pytest.approx(mass[1000], abs=1e-2)


@pytest.mark.parametrize("components", [1, 2])
def test_containment_of_drawn_directions_is_uniform(components):
    out = outputs(3000, components)
    mixture = Mixture.single(out[:, :3]) if components == 1 else Mixture.of_output(out)
    truth = drawn(mixture)
    u = np.sort(containment(mixture, truth))
    assert np.abs(u - (np.arange(3000) + 0.5) / 3000).max() < 1.63 / np.sqrt(3000)
    assert np.median(pull(u)) == pytest.approx(1.1774, abs=0.05)
    verdict = judge(mixture, truth)
    assert verdict["ece"] < 1.6 * verdict["ece_if_calibrated"]
    assert all(row["low"] - 0.01 <= row["level"] <= row["high"] + 0.01 for row in verdict["coverage"])


def test_pull_at_large_kappa_is_the_angle_times_its_root():
    psi = np.array([0.001, 0.01, 0.02])
    truth = np.stack((np.sin(psi), 0 * psi, np.cos(psi)), axis=1)
    mixture = Mixture.single(np.tile([0, 0, 1e4], (3, 1)))
    assert_parity(pull(containment(mixture, truth)), psi * 100, atol=0, rtol=1e-4)
    assert log_outside(mixture, -truth[:1])[0] < -1e4, "where 1 - u is 0 in double precision"


@pytest.mark.parametrize("wrong", [0.25, 3.0])
def test_temperature_recovers_a_wrong_scale(wrong):
    mixture = Mixture.single(outputs(8000, 1)[:, :3] * 3)
    temperature, error = fit_temperature(mixture.tempered(1 / wrong), drawn(mixture))
    assert abs(np.log(temperature / wrong)) < 4 * error < 0.1


def test_temperature_of_pure_noise_is_refused():
    mixture = Mixture.single(outputs(500, 1)[:, :3] * 50)
    with pytest.raises(UserError, match="no confidence"):
        fit_temperature(mixture, sphere_grid(500))


def test_levels_mend_what_a_temperature_cannot():
    # a narrow core and a wide tail, told as one kappa in between; the sharper half too wide, the other too narrow
    rng = np.random.default_rng(1)
    n = 12_000
    mean = sphere_grid(n)[rng.permutation(n)]
    claimed = np.where(np.arange(n) % 2, 30.0, 3.0)
    actual = np.where(rng.random(n) < 0.6, 10 * claimed, claimed / 10)
    truth = drawn(Mixture.single(actual[:, None] * mean))
    told = Mixture.single((claimed * rng.uniform(0.9, 1.1, n))[:, None] * mean)
    fit, rest = slice(0, n // 2), slice(n // 2, n)
    levels = Levels.fit(told[fit], truth[fit])
    before, after = judge(told[rest], truth[rest]), judge(told[rest], truth[rest], levels)
    assert before["ece"] > 0.15
    assert after["ece"] < 0.03
    assert levels.wanted(0.5, 3.0) < 0.3
    assert levels.actual(np.array([levels.wanted(0.5, 3.0)]), np.array([3.0]))[0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("n", [2000, 12_000])
def test_chance_with_fitted_levels_is_that_of_repeated_samples(n):
    """Calibrated answers; the levels' own noise is as large as that of the events they are judged on."""
    found = []
    for seed in range(12):
        mixture = Mixture.single(outputs(2 * n, 1, seed)[:, :3])
        truth = drawn(mixture, seed)
        levels = Levels.fit(mixture[:n], truth[:n])
        found.append(judge(mixture[n:], truth[n:], levels, n_fit=n))
    mean = {key: np.mean([x[key] for x in found]) for key in ("ece", "ece_if_calibrated")}
    assert mean["ece"] == pytest.approx(mean["ece_if_calibrated"], rel=0.1)
    assert np.mean([x["ks"] < x["ks_critical"] for x in found]) > 0.8
    alone = judge(mixture[n:], truth[n:])
    assert alone["ece_if_calibrated"] < 0.85 * mean["ece_if_calibrated"]
    assert found[0]["ks_critical"] == pytest.approx(2**0.5 * alone["ks_critical"])


def test_bad_mixtures_and_levels():
    with pytest.raises(ValueError, match="weights"):
        Mixture(np.ones((2, 1)), np.ones((2, 2, 3)))
    with pytest.raises(ValueError, match="sum to one"):
        Mixture([[0.5, 0.6]], np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        credible_regions(TWO, (1.0,))
    with pytest.raises(ValueError, match="one component"):
        log_outside(TWO, np.eye(3)[:1])


@pytest.fixture
def run(tmp_path):
    """A run folder whose model claims four times the kappa it has, with two components beside."""
    mixture = Mixture.of_output(outputs(1500, 2, seed=3))
    vector = mean_vector(torch.from_numpy(outputs(1500, 2, seed=3))).numpy()
    truth = drawn(Mixture.single(vector))
    azimuth, zenith = vector_to_angles(truth)
    pred_azimuth, pred_zenith = vector_to_angles(vector)
    arrays = {"azimuth": azimuth, "zenith": zenith, "pred_azimuth": pred_azimuth, "pred_zenith": pred_zenith,
              "kappa": 4 * np.linalg.norm(vector, axis=1), "error_deg": np.full(1500, 10.0), "n_pulses": np.ones(1500),
              **{f"out_{i}": column for i, column in enumerate(outputs(1500, 2, seed=3).T)}}  # fmt: skip
    np.savez(tmp_path / "predictions.npz", **arrays)
    (tmp_path / "config.json").write_text("{}")
    assert len(mixture) == 1500
    return tmp_path


def test_calibrate_command(run, capsys):
    assert load_calibration(run) is None
    assert main(["calibrate", str(run)]) == 0
    assert "all 2 components" in capsys.readouterr().out
    assert main(["calibrate", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / CALIBRATION).read_text())
    assert result["low"] < 4 < result["high"]
    assert result["calibrated"]["nll"] < result["raw"]["nll"]
    calibration, of_mixture = load_calibration(run), load_calibration(run, mixture=True)
    assert calibration is not None
    assert of_mixture is not None
    assert calibration.temperature == pytest.approx(result["temperature"])
    assert of_mixture.temperature == pytest.approx(result["mixture"]["temperature"])
    (run / CALIBRATION).write_text('{"temperature": 2}')
    with pytest.raises(UserError, match="is no calibration"):
        load_calibration(run)


def test_curves_are_distributions(run):
    with np.load(run / "predictions.npz") as file:
        arrays = dict(file)
    components = predicted_components(arrays)
    assert components is not None
    assert components.weight_EK.shape == (1500, 2)
    fitted = fit_arrays(arrays)
    columns = curves(fitted)
    fit, rest = halves(1500)
    assert sorted([*fit, *rest]) == list(range(1500)), "no event is fitted and judged"
    np.testing.assert_array_equal(fitted.true_E3, angles_to_vector(arrays["azimuth"], arrays["zenith"])[rest])
    error = opening_angle_deg(fitted.mixture.vector_EK3[:, 0], fitted.true_E3)
    bins = np.array_split(np.argsort(arrays["kappa"][rest]), 10)
    np.testing.assert_allclose(columns["promised"]["mean"], [error[rows].mean() for rows in bins])
    for name in ("raw", "temperature", "temperature and levels"):
        assert columns["coverage"][name][-1] == 1
        assert (np.diff(columns["coverage"][name]) >= 0).all()
        assert columns["pit"][name].mean() == pytest.approx(1)
    assert columns["promised"]["events"].sum() == 750
    width = columns["pull"]["high"] - columns["pull"]["low"]
    sure = arrays | {"kappa": 10 * arrays["kappa"]}
    assert (curves(fit_arrays(sure))["pull"]["raw"] * width).sum() == pytest.approx(1), "none is off the axis"


def test_calibrating_what_cannot_be(run):
    with np.load(run / "predictions.npz") as file:
        arrays = {name: values[:300] for name, values in file.items()}
    with pytest.raises(UserError, match="300 held-out events are too few"):
        fit_arrays(arrays)
    with pytest.raises(UserError, match="no kappa"):
        fit_arrays({name: values for name, values in arrays.items() if name != "kappa"})
    (run / "predictions.npz").unlink()
    with pytest.raises(UserError, match=r"no predictions\.npz"):
        calibrate_run(run)
