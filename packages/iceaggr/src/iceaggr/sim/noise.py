"""Dark noise of the DOMs, mostly from decays in their glass; much of it comes in pairs on one DOM."""

from __future__ import annotations

import torch
from torch import Tensor

from iceaggr.sim import hits
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector
from iceaggr.sim.photons import charge
from iceaggr.sim.rng import Rng


def sample_noise(from_N: Tensor, until_N: Tensor, detector: Detector, config: SimConfig, rng: Rng) -> Tensor:
    """Noise hits of N proposals between from_N and until_N (ns, equal for none), unsorted.

    A share of the hits has a companion on the same DOM, before or after it, so that the rate stays even over
    the interval. Host syncs: two, the numbers of hits and of companions.
    """
    length_N = until_N - from_N
    count_N = rng.poisson(length_N * (1e-9 * config.noise_rate * detector.noise_doms)).long()
    event = torch.repeat_interleave(count_N, output_size=int(count_N.sum()))
    n = event.numel()
    time = from_N[event] + length_N[event] * rng.uniform(n)
    sensor = torch.searchsorted(detector.noise_cdf_S, rng.uniform(n)).clamp(max=len(detector.noise_cdf_S) - 1)

    paired = (rng.uniform(n) <= config.burst_fraction).nonzero().squeeze(1)
    m = paired.numel()
    delay = torch.where(rng.uniform(m) <= config.burst_short_share, config.burst_short_delay, config.burst_delay)
    away = torch.where(rng.uniform(m) <= 0.5, -delay, delay) * rng.exponential(m)
    event = torch.cat((event, event[paired]))
    sensor = torch.cat((sensor, sensor[paired]))
    time = torch.cat((time, time[paired] + away))
    ones = torch.ones_like(time)
    return hits.pack(event, sensor, time, charge(ones, config, rng), torch.zeros_like(event))
