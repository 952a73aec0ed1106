"""Statistics of the oracle's fits: residuals, scores and coverage on simulated events."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from iceaggr.geometry import icecube86
from iceaggr.oracle.fit import maximise, sharpen
from iceaggr.oracle.hypothesis import Layout, double, frame
from iceaggr.oracle.likelihood import Likelihood, observe_all
from iceaggr.oracle.observed import observe
from iceaggr.oracle.truth import Known
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import detector
from iceaggr.sim.events import simulate_block

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


@pytest.mark.slow
def test_fits_of_clean_events_are_unbiased_at_the_truth() -> None:
    """Cascades of 20 to 30 TeV: the residuals of every parameter are centred on zero and of the predicted size."""
    config = replace(QUIET, track_fraction=0.0)
    pulses, truth = simulate_block(30, seed=4, config=config)
    known = Known.of(truth)
    layout, index = Layout(False), torch.arange(pulses.n_events)
    likelihood = Likelihood(observe(pulses, ARRAY, config), layout, ARRAY, config)
    rows = known.rows(index, layout, double(ARRAY), config)
    fit = maximise(likelihood, rows, index, steps=10)
    assert (fit.value_S >= likelihood.value(rows, index)).all()
    cosine = (fit.rows_RS[:3] * rows[:3]).sum(0).clamp(-1, 1)
    assert float(torch.rad2deg(cosine.acos()).median()) < 12
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
    rows = known.rows(index, layout, double(ARRAY), config)
    step = torch.zeros(layout.free, index.numel(), dtype=F64)
    step[0], step[2] = 0.03, 4.0
    displaced = layout.move(rows, frame(rows), step)
    fit = sharpen(likelihood, displaced, index, steps=12)
    cosine = (fit.rows_RS[:3] * rows[:3]).sum(0).clamp(-1, 1)
    assert float(torch.rad2deg(cosine.acos()).median()) < 0.5  # started 1.7 degrees away
    plain = maximise(likelihood, displaced, index, steps=12)
    assert float(fit.value_S.mean()) > float(plain.value_S.mean())  # the blur is what gets it there


@pytest.mark.slow
@pytest.mark.parametrize("is_track", [False, True], ids=["cascades", "tracks"])
def test_the_score_at_the_truth_has_mean_zero_and_the_informations_variance(is_track: bool) -> None:
    """Which it has for the density that the events were drawn from and for no other; direction and place and, for
    cascades, time and energy."""
    config = replace(CONFIG, track_fraction=float(is_track))
    pulses, truth = simulate_block(500, seed=5, config=config)
    known, layout = Known.of(truth), Layout(is_track, config.burst_slots if is_track else 0)
    index = (pulses.counts_E < 1000).nonzero().squeeze(1)
    seen = observe_all(pulses, ARRAY, config, known.chance(config))[index]
    score = Likelihood(seen, layout, ARRAY, config).score(
        known.rows(index, layout, double(ARRAY), config), torch.arange(index.numel())
    )
    free = 4 if is_track else 7
    slope, information = score.gradient_SK[:, :free], score.fisher_SKK.diagonal(dim1=1, dim2=2)[:, :free].sum(0)
    assert (slope.sum(0).abs() < 3.5 * information.sqrt()).all()
    ratio = slope.square().sum(0) / information
    assert (ratio > 0.4).all()
    assert (ratio < 1.6).all()


@pytest.mark.slow
def test_likelihood_ratio_regions_of_bright_cascades_cover_the_truth() -> None:
    config = replace(QUIET, track_fraction=0.0, noise_rate=CONFIG.noise_rate, burst_fraction=CONFIG.burst_fraction)
    pulses, truth = simulate_block(90, seed=12, config=config)
    index = (pulses.counts_E < 1000).nonzero().squeeze(1)
    known, layout, every = Known.of(truth), Layout(False), torch.arange(index.numel())
    likelihood = Likelihood(observe(pulses, ARRAY, config)[index], layout, ARRAY, config)
    rows = known.rows(index, layout, double(ARRAY), config)
    gain = 2 * (maximise(likelihood, rows, every, steps=25).value_S - likelihood.value(rows, every))
    share = [float((gain < quantile).double().mean()) for quantile in (6.346, 12.017)]  # chi-square, 7 degrees
    error = [math.sqrt(p * (1 - p) / index.numel()) for p in (0.5, 0.9)]
    assert abs(share[0] - 0.5) < 3 * error[0]
    assert abs(share[1] - 0.9) < 3 * error[1]
