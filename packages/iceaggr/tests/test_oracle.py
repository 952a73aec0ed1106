"""The oracle's likelihood against the formula, and its steps on events of known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS, icecube86
from iceaggr.oracle.charge import log_counts
from iceaggr.oracle.delay import blurred_delay_log_density, delay_cdf
from iceaggr.oracle.fit import higher, maximise, scan_and_climb, sphere
from iceaggr.oracle.hypothesis import Layout, double, frame
from iceaggr.oracle.likelihood import Likelihood, observe_all
from iceaggr.oracle.observed import observe
from iceaggr.oracle.run import fit_events
from iceaggr.oracle.truth import Known
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import detector
from iceaggr.sim.events import simulate_block
from iceaggr.sim.light import shower_light, shower_pairs, track_light, track_pairs

CONFIG = SimConfig()
F64 = torch.float64
ARRAY = detector(icecube86(), torch.device("cpu"))


class Case:
    """Events of one type with their likelihood and their truth as hypotheses."""

    def __init__(self, pulses, truth, is_track: bool, most: int, config: SimConfig) -> None:
        known = Known.of(truth)
        seen = observe_all(pulses, ARRAY, config, known.chance(config))
        index = ((truth.is_track_E == is_track) & (pulses.counts_E < 600)).nonzero().squeeze(1)[:most]
        assert index.numel() == most
        self.layout = Layout(is_track, config.burst_slots if is_track else 0)
        self.likelihood = Likelihood(seen[index], self.layout, ARRAY, config)
        self.truth_RX = known.rows(index, self.layout, double(ARRAY), config)
        self.event_X = torch.arange(most)
        self.pulses, self.index = pulses, index


@pytest.fixture(scope="module")
def block():
    return simulate_block(128, seed=8)


@pytest.fixture(scope="module", params=[False, True], ids=["cascades", "tracks"])
def case(request, block) -> Case:
    return Case(*block, request.param, 6, CONFIG)


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
    bright = {int(k) % N_SENSORS: float(x) for k, x in zip(seen.bright_D, seen.bright_share_D, strict=True)
              if int(k) // N_SENSORS == column}  # fmt: skip
    end, value = float(seen.end_E[column]), 0.0
    for light, doms in zip(lights, seen_by, strict=True):
        reported = light.expected_Q.clone()
        for sensor in doms.tolist():
            spread, arrival = (light.shape_Q[sensor], light.rate_Q[sensor]), light.time_Q[sensor]
            share = 1.0
            if sensor in first:
                begin, finish = (float(delay_cdf(first[sensor] + t - arrival, *spread)) for t in (75, 2450))
                share += begin - finish
            if end - arrival < 4 * (spread[0] + 1) / spread[1]:
                share += float(delay_cdf(end - arrival, *spread)) - 1
            reported[sensor] *= share * bright.get(sensor, 1.0)
        value -= float(reported[doms].sum())  # the simulator culls the rest

    def rate_at(sensors: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(times)
        for light in lights:
            a, b = light.shape_Q[sensors], light.rate_Q[sensors]
            delay, sigma = times - light.time_Q[sensors], math.sqrt(config.jitter**2 + 1 / 12)
            late_mean, late_variance = a / b + config.late_delay, a / b**2 + config.late_delay**2
            prompt = 1 - config.early_fraction - config.late_fraction
            density = prompt * blurred_delay_log_density(delay, a, b, sigma).exp()
            early = blurred_delay_log_density(delay + config.early_advance, a, b, sigma).exp()
            late = blurred_delay_log_density(
                delay, late_mean**2 / late_variance, late_mean / late_variance, sigma
            ).exp()
            density = density + config.early_fraction * early + config.late_fraction * late
            total += light.expected_Q[sensors] * density
        return total

    plain = seen.background_W + rate_at(seen.sensor_W, seen.time_W)
    node_rate = seen.node_background_U + rate_at(seen.sensor_W[seen.pulse_V[seen.crowd_U]], seen.node_U)
    for w in range(int(seen.offsets_E1[column]), int(seen.offsets_E1[column + 1])):
        rate = float(plain[w])
        if float(seen.companion_W[w]) > 0:  # the pulse before was noise with this probability
            rate += float(seen.companion_W[w]) * float(seen.noise_W[w]) / float(plain[w - 1])
        value += float(seen.weight_W[w]) * math.log(rate)
    for v in range(int(seen.crowd_offsets_E1[column]), int(seen.crowd_offsets_E1[column + 1])):
        w, nodes = int(seen.pulse_V[v]), seen.crowd_U == v
        amount = float(seen.close_V[v] * seen.noise_W[w] / plain[w] + (seen.span_U * node_rate)[nodes].sum())
        power = float(seen.power_V[v])
        one = log_counts(torch.tensor([amount], dtype=F64), seen.steps_V[v : v + 1], config)[0]
        value += power * math.log(amount) if power > 0 else float(one)
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
    dim = ~torch.isin(torch.arange(pulses.n_events), seen.bright_D // N_SENSORS)
    total = torch.zeros(pulses.n_events, dtype=F64).index_add(0, seen.event_W, seen.weight_W)
    torch.testing.assert_close(total[dim], pulses.counts_E[dim].double())  # every pulse once, whatever its charge
    assert dim.any()
    assert not dim.all()
    assert (total >= 0.5 * single).all()
    assert not pulses.auxiliary_P.all()
    assert seen.isolated_D.numel() < dom.numel()


def test_what_a_dom_saw_before_explains_its_pulses() -> None:
    """Noise, companions of noise and after-pulses of three pulses of one DOM, by their laws."""
    time, charge, sensor = np.array([10_000, 10_020, 10_700]), np.array([0.9, 2.5, 0.9]), 2000
    pulses = Pulses(
        event_id_E=torch.tensor([1]),
        offsets_E1=torch.tensor([0, 3]),
        sensor_P=torch.full((3,), sensor, dtype=torch.int32),
        time_P=torch.from_numpy(time).int(),
        charge_P=torch.from_numpy(charge).float(),
        auxiliary_P=torch.ones(3, dtype=torch.bool),
    )
    seen = observe(pulses, ARRAY, CONFIG)
    noise = 1e-9 * 495 * 1.2  # a fifth of the noise has a companion; a standard DOM
    assert float(seen.noise_W[0]) == pytest.approx(noise)
    mean = 0.02 * 0.027 + 0.08 * 0.383 + 0.9 * 0.93
    linear = (charge**2 / 50 + np.sqrt(charge**4 / 2500 + 4 * charge**2)) / 2  # q = x / sqrt(1 + x / 50)
    np.testing.assert_allclose(charge, linear / np.sqrt(1 + linear / 50))

    def gauss(x: float, centre: float, width: float) -> float:
        return math.exp(-(((x - centre) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))

    groups = ((0.35, 700, 250), (0.2, 2000, 700), (0.45, 8000, 1300))
    for w in range(3):
        if w < 2:  # after-pulses of one pulse; those of several are spread as their mean and variance say
            echoes = sum(
                0.059 * linear[v] / mean * share * gauss(time[w] - time[v], after, width)
                for v in range(w)
                for share, after, width in groups
            )
            assert float(seen.background_W[w]) == pytest.approx(noise + echoes, rel=1e-4)
        gap = time[w] - time[w - 1]
        pair = (0.3 / 25 * math.exp(-gap / 25) + 0.7 / 6000 * math.exp(-gap / 6000)) * 0.2 / 1.2
        assert float(seen.companion_W[w]) == pytest.approx(pair if w else 0.0)
    exact = sum(
        0.059 * linear[v] / mean * share * gauss(time[2] - time[v], after, width)
        for v in range(2)
        for share, after, width in groups
    )
    assert float(seen.background_W[2]) == pytest.approx(noise + exact, rel=0.02)
    assert seen.pulse_V.tolist() == [1]  # the only one above a photo-electron
    span = 10 - 0.5  # it begins the third bin of 10 ns, whose last rounded time is half a ns earlier
    close = (0.3 * (1 - math.exp(-span / 25)) + 0.7 * (1 - math.exp(-span / 6000))) * 0.2 / 1.2
    assert float(seen.close_V[0]) == pytest.approx(close)
    assert float(seen.span_U.sum()) == pytest.approx(span)


def test_the_higher_of_two_climbs_is_taken_and_the_held_fit_keeps_its_direction(case: Case) -> None:
    local = maximise(case.likelihood, case.truth_RX, case.event_X, steps=4)
    scanned = scan_and_climb(case.likelihood, case.truth_RX, scan=2, steps=2)
    best, won = higher(local, scanned)
    assert (best.value_S >= torch.maximum(local.value_S, scanned.value_S) - 0.011).all()
    torch.testing.assert_close(best.value_S[~won], local.value_S[~won])
    torch.testing.assert_close(best.value_S, case.likelihood.value(best.rows_RS, case.event_X))
    held = maximise(case.likelihood, case.truth_RX, case.event_X, steps=3, fixed_direction=True)
    torch.testing.assert_close(held.rows_RS[:3], case.truth_RX[:3])
    assert (held.steps_S <= 3).all()


def test_scan_directions_cover_the_sphere() -> None:
    direction = sphere(50, torch.zeros(1, dtype=F64))
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(50, dtype=F64))
    assert float(direction.mean(0).abs().max()) < 0.02


@pytest.mark.gpu
def test_the_gpu_finds_the_same_maxima(block) -> None:
    pulses, truth = block
    known = Known.of(truth)
    here = fit_events(pulses, known, icecube86(), CONFIG, scan=0)
    moved = Known(**{name: x.cuda() for name, x in vars(known).items()})
    there = fit_events(pulses.to("cuda"), moved, icecube86(), CONFIG, scan=0)
    assert np.median(abs(here["error_deg"] - there["error_deg"])) < 0.1
