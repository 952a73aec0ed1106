"""The oracle's laws of delay and charge against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from iceaggr.oracle.charge import MOST_STEPS, charge_law, dispersion, log_counts, mean_charge
from iceaggr.oracle.delay import blurred_delay_log_density, delay_cdf
from iceaggr.sim.config import SimConfig
from iceaggr.sim.light import delay_log_density
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
