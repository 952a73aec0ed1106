"""The oracle's likelihood against slow references, its fits on events of known truth, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.cli import main
from iceaggr.geometry import N_SENSORS, icecube86
from iceaggr.oracle import Known, fit_events, folder_simulation, held_out_errors, read_known
from iceaggr.oracle_delay import blurred_delay_log_density, delay_cdf
from iceaggr.oracle_fit import maximise, maximise_globally, sharpen, sphere
from iceaggr.oracle_likelihood import Layout, Likelihood, double, frame, observe
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import detector
from iceaggr.sim.events import simulate_block
from iceaggr.sim.light import delay_log_density, shower_light, shower_pairs, track_light, track_pairs
from iceaggr.sim.photons import AFTERPULSES
from iceaggr.sim.write import simulate_folder
from lab_shared.errors import UserError

CONFIG = SimConfig()
QUIET = replace(
    CONFIG,
    noise_rate=1.0,
    burst_fraction=0.0,
    coincident_rate=0.0,
    index=1.01,
    energy_min=2e4,
    energy_max=3e4,
    hard_fraction=0.0,
    radius=300.0,
    half_height=250.0,
    neutral_current_fraction=0.0,
)
"""Bright events inside the array and hardly any noise: what the likelihood leaves out hardly matters."""
F64 = torch.float64
ARRAY = detector(icecube86(), torch.device("cpu"))


class Case:
    """Events of one type with their likelihood and their truth as hypotheses."""

    def __init__(self, pulses, truth, is_track: bool, most: int, config: SimConfig) -> None:
        known = Known.of(truth)
        seen = observe(pulses, ARRAY, config, known.chance(config))
        index = ((truth.is_track_E == is_track) & (pulses.counts_E < 600)).nonzero().squeeze(1)[:most]
        assert index.numel() == most
        self.layout = Layout(is_track, config.burst_slots if is_track else 0)
        self.likelihood = Likelihood(seen[index], self.layout, ARRAY, config)
        self.truth_RX = known.rows(index, self.layout, config)
        self.event_X = torch.arange(most)
        self.pulses, self.index = pulses, index


@pytest.fixture(scope="module")
def block():
    return simulate_block(128, seed=8)


@pytest.fixture(scope="module", params=[False, True], ids=["cascades", "tracks"])
def case(request, block) -> Case:
    return Case(*block, request.param, 6, CONFIG)


@pytest.mark.parametrize("shape", [0.05, 0.4, 1.0, 2.5])
def test_the_blurred_density_is_the_simulators_law_plus_jitter(shape: float) -> None:
    rate, sigma = 0.006, 2.0
    at = torch.tensor([-6.0, -2.0, 0.0, 1.0, 5.0, 20.0, 23.9, 24.1, 80.0, 600.0], dtype=F64)
    edge = 120_001
    u = (torch.arange(edge, dtype=F64) + 0.5) / edge  # delay = longest * u^(1/a): equal steps of the singular part
    power = max(1 / shape, 1.0)
    longest = 4000.0
    delay = longest * u**power
    step = longest * power * u ** (power - 1) / edge
    log_density = shape * math.log(rate) + (shape - 1) * delay.log() - rate * delay - math.lgamma(shape)
    law = delay_log_density(delay, torch.full_like(delay, shape), torch.full_like(delay, rate))
    torch.testing.assert_close(log_density[delay > 1e-3], law[delay > 1e-3])  # which cuts the edge there
    density = log_density.exp()
    blur = torch.exp(-((at[:, None] - delay) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    expected = (density * step * blur).sum(1)
    found = blurred_delay_log_density(at, torch.full_like(at, shape), torch.full_like(at, rate), sigma)
    torch.testing.assert_close(found, expected.log(), atol=0.01, rtol=0)


def test_the_delay_cdf_is_close_to_the_incomplete_gamma_function() -> None:
    delay, shape, rate = (
        x.reshape(-1)
        for x in torch.meshgrid(
            torch.tensor([-5.0, 40.0, 75.0, 300.0, 2450.0], dtype=F64),
            torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=F64),
            torch.tensor([0.003, 0.01], dtype=F64),
            indexing="ij",
        )
    )
    exact = torch.special.gammainc(shape, (rate * delay).clamp(min=0))
    torch.testing.assert_close(delay_cdf(delay, shape, rate), exact, atol=0.03, rtol=0)


def naive_log_likelihood(case: Case, column: int) -> float:
    """One event by the formula: every DOM of the array, every pulse by itself, sources one after the other."""
    seen, layout, config = case.likelihood.seen, case.layout, case.likelihood.config
    row = case.truth_RX[:, column : column + 1].expand(-1, N_SENSORS)
    every, array = torch.arange(N_SENSORS), double(ARRAY)
    one = case.truth_RX[:, column : column + 1]
    lights, seen_by = [], []
    for slot in range(layout.showers):
        lights.append(shower_light(layout.shower(row, slot), None, every, array, config))
        seen_by.append(shower_pairs(layout.shower(one, slot), array, config)[1])
    if layout.is_track:
        lights.append(track_light(layout.muon(row, config), None, every, array, config))
        seen_by.append(track_pairs(layout.muon(one, config), array, config)[1])
    first = {int(k) % N_SENSORS: float(t) for k, t in zip(seen.isolated_D, seen.isolated_time_D, strict=True)
             if int(k) // N_SENSORS == column}  # fmt: skip
    share = 1 + config.afterpulse_fraction * sum(s for s, after, _ in AFTERPULSES if after < 6000)
    value = 0.0
    for light, doms in zip(lights, seen_by, strict=True):
        reported = light.expected_Q * share
        for sensor, time in first.items():
            spread = (light.shape_Q[sensor], light.rate_Q[sensor])
            begin, end = (float(delay_cdf(time + t - light.time_Q[sensor], *spread)) for t in (75, 2450))
            reported[sensor] *= 1 + begin - end
        value -= float(reported[doms].sum())  # the simulator culls the rest
    for w in range(int(seen.offsets_E1[column]), int(seen.offsets_E1[column + 1])):
        sensor, time, rate = int(seen.sensor_W[w]), float(seen.time_W[w]), float(seen.background_W[w])
        for light in lights:
            a, b = light.shape_Q[sensor], light.rate_Q[sensor]
            delay = time - light.time_Q[sensor]
            density = (1 - config.early_fraction) * blurred_delay_log_density(delay, a, b, config.jitter).exp()
            early = blurred_delay_log_density(delay + config.early_advance, a, b, config.jitter).exp()
            density = density + config.early_fraction * early
            for part, after, width in AFTERPULSES:
                sigma = math.sqrt(width**2 + float(a / b**2))
                pull = float(delay - a / b - after) / sigma
                density = density + 0.059 * part * math.exp(-pull * pull / 2) / (math.sqrt(2 * math.pi) * sigma)
            rate += float(light.expected_Q[sensor] * density)
        value += float(seen.weight_W[w]) * math.log(rate)
    return value


def test_the_batched_likelihood_is_the_formula(case: Case) -> None:
    found = case.likelihood.value(case.truth_RX, case.event_X)
    for column in range(3):
        assert float(found[column]) == pytest.approx(naive_log_likelihood(case, column), abs=1e-3)


def test_slopes_are_those_of_finite_differences(case: Case) -> None:
    score = case.likelihood.score(case.truth_RX, case.event_X)
    torch.testing.assert_close(score.value_S, case.likelihood.value(case.truth_RX, case.event_X))
    axes, n = frame(case.truth_RX), case.event_X.numel()
    for k, scale in enumerate(case.layout.scale):
        step = torch.zeros(case.layout.free, n, dtype=F64)
        step[k] = 1e-5 * scale
        ahead, behind = (
            case.likelihood.value(case.layout.move(case.truth_RX, axes, s), case.event_X) for s in (step, -step)
        )
        slope = (ahead - behind) / (2e-5 * scale)
        difference = (slope - score.gradient_SK[:, k]).abs() * scale / (1 + score.gradient_SK[:, k].abs() * scale)
        assert float(difference.median()) < 1e-5, k  # the ice is layered: here and there a difference spans a step
    eigenvalues = torch.linalg.eigvalsh(score.fisher_SKK)
    assert (eigenvalues >= -1e-6 * eigenvalues.amax()).all()


def test_an_event_does_not_depend_on_its_company(case: Case) -> None:
    together = case.likelihood.score(case.truth_RX, case.event_X)
    for column in (0, 4):
        alone = Likelihood(case.likelihood.seen[torch.tensor([column])], case.layout, ARRAY, CONFIG)
        score = alone.score(case.truth_RX[:, column : column + 1], torch.zeros(1, dtype=torch.int64))
        torch.testing.assert_close(score.value_S[0], together.value_S[column])
        torch.testing.assert_close(score.gradient_SK[0], together.gradient_SK[column])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.booleans())
def test_moving_keeps_directions_unit_and_tracks_on_their_plane(seed: int, is_track: bool) -> None:
    layout = Layout(is_track, 3 if is_track else 0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(layout.width, 5, dtype=F64, generator=generator)
    rows[:3] /= rows[:3].norm(dim=0)
    step = torch.randn(layout.free, 5, dtype=F64, generator=generator)
    moved = layout.move(rows, frame(rows), step)
    assert moved.shape == rows.shape
    torch.testing.assert_close(moved[:3].norm(dim=0), torch.ones(5, dtype=F64))
    if is_track:
        along = ((moved[3:6] - rows[3:6]) * rows[:3]).sum(0)
        torch.testing.assert_close(along, torch.zeros(5, dtype=F64), atol=1e-9, rtol=0)
    still = layout.move(rows, frame(rows), torch.zeros_like(step))
    torch.testing.assert_close(still, rows)


def test_all_charge_and_every_dom_is_kept(block) -> None:
    pulses, _ = block
    seen = observe(pulses, ARRAY, CONFIG)
    event = pulses.event_of_pulse_P()
    dom = torch.unique(event * N_SENSORS + pulses.sensor_P)
    assert torch.equal(torch.unique(seen.event_W * N_SENSORS + seen.sensor_W), dom)
    assert torch.equal(seen.offsets_E1.diff(), torch.bincount(seen.event_W, minlength=pulses.n_events))
    single = torch.bincount(event[pulses.charge_P < 1.3], minlength=pulses.n_events)
    total = torch.zeros(pulses.n_events, dtype=F64).index_add(0, seen.event_W, seen.weight_W)
    assert (total >= single).all()
    assert (total >= pulses.counts_E - 1e-6).all()
    assert not pulses.auxiliary_P.all()
    assert seen.isolated_D.numel() < dom.numel()


@pytest.mark.slow
def test_fits_of_clean_events_are_unbiased_at_the_truth() -> None:
    """Cascades of 20 to 30 TeV: the residuals of every parameter are centred on zero and of the predicted size."""
    config = replace(QUIET, track_fraction=0.0)
    pulses, truth = simulate_block(30, seed=4, config=config)
    known = Known.of(truth)
    layout, index = Layout(False), torch.arange(pulses.n_events)
    likelihood = Likelihood(observe(pulses, ARRAY, config), layout, ARRAY, config)
    rows = known.rows(index, layout, config)
    fit = maximise(likelihood, rows, index, steps=10)
    assert (fit.value_S >= likelihood.value(rows, index)).all()
    cosine = (fit.rows_RS[:3] * rows[:3]).sum(0).clamp(-1, 1)
    assert float(torch.rad2deg(cosine.acos()).median()) < 20
    residual = fit.rows_RS[3:] - rows[3:]
    error = residual.std(dim=1) / math.sqrt(pulses.n_events)
    assert (residual.mean(dim=1).abs() < 4 * error + torch.tensor([1.0, 1.0, 1.0, 3.0, 0.05])).all()
    assert float(residual[4].abs().median()) < 0.1  # the energy to 10%


@pytest.mark.slow
def test_a_displaced_start_finds_the_truth_again() -> None:
    config = replace(QUIET, track_fraction=1.0, upstream_fraction=1.0)
    pulses, truth = simulate_block(8, seed=6, config=config)
    known = Known.of(truth)
    index = torch.arange(pulses.n_events)
    layout = Layout(True, config.burst_slots)
    likelihood = Likelihood(observe(pulses, ARRAY, config), layout, ARRAY, config)
    rows = known.rows(index, layout, config)
    step = torch.zeros(layout.free, index.numel(), dtype=F64)
    step[0], step[2] = 0.03, 4.0
    displaced = layout.move(rows, frame(rows), step)
    fit = sharpen(likelihood, displaced, index, steps=12)
    cosine = (fit.rows_RS[:3] * rows[:3]).sum(0).clamp(-1, 1)
    assert float(torch.rad2deg(cosine.acos()).median()) < 0.9  # started 1.7 degrees away
    plain = maximise(likelihood, displaced, index, steps=12)
    assert float(fit.value_S.mean()) > float(plain.value_S.mean())  # the blur is what gets it there


def test_the_global_fit_is_at_least_as_high_and_the_held_fit_keeps_its_direction(case: Case) -> None:
    local = maximise(case.likelihood, case.truth_RX, case.event_X, steps=4)
    best, won = maximise_globally(case.likelihood, case.truth_RX, scan=3, steps=4)
    assert (best.value_S >= local.value_S - 1e-9).all()
    torch.testing.assert_close(best.value_S[~won], local.value_S[~won])
    torch.testing.assert_close(best.value_S, case.likelihood.value(best.rows_RS, case.event_X))
    held = maximise(case.likelihood, case.truth_RX, case.event_X, steps=3, fixed_direction=True)
    torch.testing.assert_close(held.rows_RS[:3], case.truth_RX[:3])
    assert (held.steps_S <= 3).all()


def test_scan_directions_cover_the_sphere() -> None:
    direction = sphere(50, torch.zeros(1, dtype=F64))
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(50, dtype=F64))
    assert float(direction.mean(0).abs().max()) < 0.02


FAINT = replace(CONFIG, energy_max=3e3, hard_fraction=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return simulate_folder(tmp_path_factory.mktemp("oracle") / "events", 4, seed=3, config=FAINT)


@pytest.mark.slow
def test_a_folder_knows_what_the_simulation_knew(folder: Path) -> None:
    from iceaggr.data.kaggle import KaggleFolder
    from iceaggr.sim.stream import iter_events

    geometry, config = folder_simulation(folder)
    assert config == FAINT
    np.testing.assert_array_equal(geometry.xyz, icecube86().xyz)
    pulses = KaggleFolder(folder).read_batch(1)
    found = read_known(folder, pulses.event_id_E.numpy(), config, torch.device("cpu"))
    _, truth = next(iter_events(4, seed=3, stream=1, config=FAINT))
    expected = Known.of(truth)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values, msg=name)

    first = held_out_errors(folder, pulses, torch.device("cpu"))
    assert ((first >= 0) & (first <= 180)).all()
    (folder / "truth.parquet").rename(folder / "away")  # what is known is not computed again
    np.testing.assert_array_equal(held_out_errors(folder, pulses, torch.device("cpu")), first)
    (folder / "oracle.npz").unlink()
    with pytest.raises(UserError, match=r"no truth\.parquet"):
        held_out_errors(folder, pulses, torch.device("cpu"))
    (folder / "away").rename(folder / "truth.parquet")


def test_missing_truth_has_a_named_error(folder: Path, tmp_path: Path) -> None:
    import polars as pl

    with pytest.raises(UserError, match=r"no simulation\.json"):
        folder_simulation(tmp_path)
    old = pl.read_parquet(folder / "truth.parquet").drop("chance_time")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "batch_1.parquet").write_bytes((folder / "train" / "batch_1.parquet").read_bytes())
    old.write_parquet(tmp_path / "truth.parquet")
    with pytest.raises(UserError, match="lacks chance_time"):
        read_known(tmp_path, old["event_id"].to_numpy(), CONFIG, torch.device("cpu"))


@pytest.mark.slow
def test_the_command_says_what_it_measured(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "oracle.json"
    argv = ["oracle", "--data", str(folder), "--events", "3", "--scan", "1", "--device", "cpu", "--out", str(out)]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["all"]["n"] == 3
    assert printed["label"] == "simulated data"
    assert printed["settings"]["scan"] == 1
    assert 0 <= printed["self_test"]["direction"]["within 90%"] <= 1


@pytest.mark.gpu
def test_the_gpu_finds_the_same_maxima(block) -> None:
    pulses, truth = block
    known = Known.of(truth)
    here = fit_events(pulses, known, icecube86(), CONFIG, scan=0)
    moved = Known(**{name: x.cuda() for name, x in vars(known).items()})
    there = fit_events(pulses.to("cuda"), moved, icecube86(), CONFIG, scan=0)
    assert np.median(abs(here["error_deg"] - there["error_deg"])) < 0.1
