"""The oracle's laws of delay and charge against slow references."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from iceaggr.oracle.charge import MOST_STEPS, charge_law, dispersion, log_counts, mean_charge
from iceaggr.oracle.delay import blurred_delay_log_density, delay_cdf
from iceaggr.sim import hits, photons
from iceaggr.sim.config import SimConfig
from iceaggr.sim.light import Light, delay_log_density
from iceaggr.sim.photons import charge
from iceaggr.sim.rng import Rng

CONFIG = SimConfig()
F64 = torch.float64


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


@pytest.mark.parametrize("sigma", [2.0, 30.0])
def test_no_light_comes_long_before_straight_light(sigma: float) -> None:
    """Noise microseconds ahead of an event must not look like its light, whatever the ice absorbs."""
    early = torch.tensor([-20_000.0, -6000.0, -2500.0, -10 * sigma], dtype=F64)
    for shape, rate in ((0.05, 0.0128), (1.0, 0.0128), (20.0, 0.05)):
        found = blurred_delay_log_density(early, torch.full_like(early, shape), torch.full_like(early, rate), sigma)
        assert (found < -30).all()
        assert (found.diff() >= 0).all()


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


def test_the_charge_of_a_pulse_is_the_simulators() -> None:
    law = charge_law(CONFIG)
    assert law.sum() == pytest.approx(1.0)
    drawn = charge(torch.ones(40_000), CONFIG, Rng(torch.device("cpu"), 1, 0, 0)).mul(40).round().clamp(min=1)
    assert float(drawn.mean() / 40) == pytest.approx(mean_charge(CONFIG), rel=0.01)
    assert float(drawn.square().mean() / drawn.mean() ** 2) == pytest.approx(dispersion(CONFIG), rel=0.02)
    counts = np.bincount(drawn.int().numpy(), minlength=MOST_STEPS + 1)[: MOST_STEPS + 1] / 40_000
    assert abs(counts.cumsum() - law.cumsum()).max() < 0.01
    # Poisson(L) further photo-electrons: sum over n of p(q | n) L^(n-1) / (n-1)!, with p by repeated convolution.
    amount, steps, law_n, total, slope = 0.7, 90, law, 0.0, 0.0
    for further in range(12):
        part = law_n[steps] * amount**further / math.factorial(further)
        total, slope, law_n = total + part, slope + further * part, np.convolve(law_n, law)[: MOST_STEPS + 1]
    value, mean = log_counts(torch.tensor([amount], dtype=F64), torch.tensor([steps]), CONFIG)
    assert float(value) == pytest.approx(math.log(total))
    assert float(mean) == pytest.approx(slope / total)


def rate_of_one_dom(time: torch.Tensor, mu: float, shape: float, rate: float) -> torch.Tensor:
    """Photo-electrons per ns, by the simulator's steps; straight light arrives at 0 ns."""

    def density(delay: torch.Tensor, a: float, b: float) -> torch.Tensor:
        sigma = math.sqrt(CONFIG.jitter**2 + 1 / 12)
        return blurred_delay_log_density(delay, torch.full_like(delay, a), torch.full_like(delay, b), sigma).exp()

    early, late = CONFIG.early_fraction, CONFIG.late_fraction
    mean, variance = shape / rate + CONFIG.late_delay, shape / rate**2 + CONFIG.late_delay**2
    return mu * (
        (1 - early - late) * density(time, shape, rate)
        + early * density(time + CONFIG.early_advance, shape, rate)
        + late * density(time, mean**2 / variance, mean / variance)
    )


@pytest.mark.parametrize(("mu", "shape", "rate"), [(1.6, 0.45, 0.006), (2.5, 1.7, 0.005)])
def test_the_simulator_draws_what_the_likelihood_says(mu, shape, rate, monkeypatch) -> None:
    """One DOM in many events: how often it is dark, and when and how bright it is where it has one pulse."""
    monkeypatch.setattr(photons, "MIN_DOMS", 0)
    config, n, blocks = replace(CONFIG, afterpulse_fraction=0.0), 16_000, 3
    dark, single = 0, []
    for block in range(blocks):
        light = Light(*(torch.full((n,), x) for x in (mu, 0.0, shape, rate)))
        every, sensor = torch.arange(n), torch.zeros(n, dtype=torch.int64)
        drawn = photons.sample_photons(every, sensor, every >= 0, light, n, config, Rng(torch.device("cpu"), 5, block))
        pulses = photons.merge(hits.sort_int64(drawn), config)
        number = torch.bincount(hits.event(pulses), minlength=n)
        dark += int((number == 0).sum())
        alone = pulses[number[hits.event(pulses)] == 1]
        bright = (hits.steps(alone) / 40) ** 2 / config.saturation
        linear = (bright + (bright**2 + 4 * (hits.steps(alone) / 40) ** 2).sqrt()) / 2  # before it saturated
        single.append(torch.stack((hits.time(alone) - hits.TIME_OFFSET, (linear * 40).round()), 1))
    events = n * blocks
    assert dark / events == pytest.approx(math.exp(-mu), abs=4 * math.sqrt(math.exp(-mu) / events))

    # ln L of one pulse at t: ln lambda(t) R(L) - mu, L = the integral of lambda over the rest of its bin.
    time = torch.arange(-100, 4000, dtype=F64)
    rest = 9.5 * torch.stack([rate_of_one_dom(time + 9.5 * (i + 0.5) / 8, mu, shape, rate) for i in range(8)]).mean(0)
    steps = torch.arange(1, MOST_STEPS + 1)
    log_r = log_counts(rest.repeat_interleave(len(steps)), steps.repeat(len(time)), config)[0].view(len(time), -1)
    density = rate_of_one_dom(time, mu, shape, rate)[:, None] * (log_r - mu).exp()
    times, charges = [-100, 4, 10, 20, 40, 80, 160, 320, 4000], [1, 20, 32, 40, 48, 70, 100, 241]
    expected = [
        [float(density[a + 100 : b + 100, low - 1 : high - 1].sum()) * events for low, high in pairwise(charges)]
        for a, b in pairwise(times)
    ]
    edges = [torch.tensor(x, dtype=F64) - 0.5 for x in (times, charges)]
    found = torch.histogramdd(torch.cat(single).double(), edges).hist
    wanted = torch.tensor(expected, dtype=F64)
    many = wanted > 15
    chi_square = float(((found - wanted).square() / wanted)[many].sum())
    assert int(many.sum()) > 25
    assert chi_square < int(many.sum()) + 4 * math.sqrt(2 * int(many.sum()))
