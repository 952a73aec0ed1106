"""From expected light to pulses: photo-electrons, the photomultiplier's habits, and the merging into pulses.

Suffixes: Q (source, DOM) pairs, G photo-electrons, H hits, P pulses, N proposals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iceaggr.sim import hits
from iceaggr.sim.config import SimConfig
from iceaggr.sim.light import Light
from iceaggr.sim.rng import Rng

AFTERPULSES = ((0.35, 700.0, 250.0), (0.20, 2000.0, 700.0), (0.45, 8000.0, 1300.0))
"""(share, mean delay, spread) in ns of the after-pulse groups of the R7081-02 photomultiplier."""
MIN_DOMS = 3
"""No trigger fires on fewer hit DOMs: proposals that light fewer are dropped before any hit is simulated."""


def sample_photons(
    event_Q: Tensor, sensor_Q: Tensor, signal_Q: Tensor, light: Light, n: int, config: SimConfig, rng: Rng
) -> Tensor:
    """Photo-electrons (and their after-pulses) of N proposals as unsorted hits.

    Host syncs: four (lit pairs, lit pairs of proposals worth keeping, photo-electrons, after-pulses).
    """
    count_Q = rng.poisson(light.expected_Q)
    lit = count_Q.nonzero().squeeze(1)
    doms_N = torch.zeros(n, dtype=torch.int64, device=event_Q.device)
    doms_N.index_add_(0, event_Q[lit], torch.ones_like(lit))
    lit = lit[doms_N[event_Q[lit]] >= MIN_DOMS]

    count = count_Q[lit]
    drawn = count.clamp(max=config.max_photons)
    weight = count / drawn
    row_G = torch.repeat_interleave(drawn.long(), output_size=int(drawn.sum(dtype=torch.float64)))
    weight_G, pair_G = weight[row_G], lit[row_G]
    n_photons = pair_G.numel()
    delay = rng.gamma(light.shape_Q[pair_G]) / light.rate_Q[pair_G]
    time = light.time_Q[pair_G] + delay + config.jitter * rng.normal(n_photons)
    luck = rng.uniform(n_photons)
    time += torch.where(luck <= config.late_fraction, config.late_delay * rng.exponential(n_photons), 0.0)
    time -= torch.where(luck > 1 - config.early_fraction, config.early_advance, 0.0)
    event_G, sensor_G, signal_G = event_Q[pair_G], sensor_Q[pair_G], signal_Q[pair_G]
    photons = hits.pack(event_G, sensor_G, time, charge(weight_G, config, rng), signal_G)

    echo_G = rng.poisson(config.afterpulse_fraction * weight_G)
    echo = echo_G.nonzero().squeeze(1)
    late = time[echo] + _afterpulse_delay(echo.numel(), rng)
    size = charge(echo_G[echo], config, rng)
    return torch.cat((photons, hits.pack(event_G[echo], sensor_G[echo], late, size, signal_G[echo])))


def charge(weight_G: Tensor, config: SimConfig, rng: Rng) -> Tensor:
    """Charge (p.e.) of `weight` simultaneous photo-electrons: mean ~ weight, spread ~ its root.

    One photo-electron follows two exponentials and a Gaussian (the form of arXiv:2002.00997).
    """
    n = weight_G.numel()
    (share_a, share_b), (width_a, width_b) = config.spe_fractions, config.spe_widths
    luck, tail = rng.uniform(n), rng.exponential(n)
    single = torch.where(
        luck <= share_a,
        width_a * tail,
        torch.where(
            luck <= share_a + share_b,
            width_b * tail,
            (config.spe_mean + config.spe_sigma * rng.normal(n)).abs(),
        ),
    )
    mean = share_a * width_a + share_b * width_b + (1 - share_a - share_b) * config.spe_mean
    return (mean * (weight_G - 1) + single + (weight_G.sqrt() - 1) * (single - mean)).clamp(min=0)


def merge(hits_H: Tensor, config: SimConfig) -> Tensor:
    """Sorted hits -> sorted pulses: what the digitiser cannot part becomes one, timed by the first.

    Bins are `fine_bin` wide for `fine_length` after the DOM's first hit and `coarse_bin` after that. A pulse
    is signal if any of its hits is. Host syncs: one, the number of pulses.
    """
    dom, time = hits.dom(hits_H), hits.time(hits_H)
    since = (time - time[hits.segment_start(hits.starts(dom))]).float()
    bins = torch.where(
        since < config.fine_length,
        since / config.fine_bin,
        config.fine_length + (since - config.fine_length) / config.coarse_bin,
    ).long()
    first_H = hits.starts((dom << hits.TIME_BITS) | bins)
    pulse_H = first_H.cumsum(0) - 1
    first = first_H.nonzero().squeeze(1)
    steps = torch.zeros_like(first).index_add_(0, pulse_H, hits.steps(hits_H))
    signal = torch.zeros_like(first).index_add_(0, pulse_H, hits_H & 1) > 0
    # float64 on every device: the division and root are exact to the last bit, so are the rounded steps.
    linear = steps.double()
    seen = linear / (1 + linear / (config.saturation * hits.CHARGE_STEPS)).sqrt()
    most = round(config.max_charge * hits.CHARGE_STEPS)
    return hits.join(dom[first], time[first], seen.round().long().clamp(1, most), signal)


def _afterpulse_delay(n: int, rng: Rng) -> Tensor:
    shares, means, spreads = torch.tensor(AFTERPULSES, device=rng.device).T
    group = torch.searchsorted(shares.cumsum(0)[:-1].contiguous(), rng.uniform(n))
    return (means[group] + spreads[group] * rng.normal(n)).abs()
