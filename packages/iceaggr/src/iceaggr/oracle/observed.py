"""What was seen of many events, in the form that the oracle's likelihood asks for.

Suffixes: P pulses, W pulses or groups of them sorted by event, DOM and time, V those that may hold several
photo-electrons, U nodes at which the rest of their bins is looked at, E events, D DOMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS
from iceaggr.oracle.charge import MOST_STEPS, dispersion, mean_charge
from iceaggr.sim import hits
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector
from iceaggr.sim.photons import AFTERPULSES

_SINGLE = 96
"""Pulses of a DOM that stay apart; later ones are taken together ..."""
_GROUP = 4
"""... by this many."""
_SURELY_ONE = hits.CHARGE_STEPS
"""Charge (steps) up to which a pulse is taken for one photo-electron."""
_X, _W = np.polynomial.legendre.leggauss(4)
_NODES = {1: ([0.5], [1.0]), 4: (((_X + 1) / 2).tolist(), (_W / 2).tolist())}
"""(places, weights) of Gauss and Legendre's rule: what is left of a bin is integrated by its middle, where there is
very much light by four points."""


@dataclass(frozen=True, eq=False)
class Observed:
    """Pulses of E events in rows W; those that may hold several photo-electrons also in rows V."""

    sensor_W: Tensor  # int64
    time_W: Tensor  # float64 ns
    weight_W: Tensor  # float64; 1 but in DOMs with very much light
    background_W: Tensor  # float64 1/ns: noise, after-pulses of what was seen before, muons by chance
    noise_W: Tensor  # float64 1/ns, noise alone
    companion_W: Tensor  # float64 1/ns: density of a noise pulse's companion, given that the pulse before was noise
    offsets_E1: Tensor  # int64
    pulse_V: Tensor  # int64 row W
    steps_V: Tensor  # int64 charge; see `iceaggr.oracle.charge`
    power_V: Tensor  # float64; > 0: so many further photo-electrons, whatever the charge's law says
    close_V: Tensor  # float64 probability that a noise pulse has its companion in what is left of its bin
    crowd_offsets_E1: Tensor  # int64
    crowd_U: Tensor  # int64 row V
    node_U: Tensor  # float64 ns
    span_U: Tensor  # float64 ns, the part of the bin that the node stands for
    node_background_U: Tensor  # float64 1/ns
    node_offsets_E1: Tensor  # int64
    isolated_D: Tensor  # int64 event * N_SENSORS + sensor, ascending: DOMs whose first launch was isolated ...
    isolated_time_D: Tensor  # float64 ns ... and when
    bright_D: Tensor  # int64, ascending: DOMs with very much light ...
    bright_share_D: (
        Tensor  # float64 ... whose photo-electrons count this much: they disperse more than a Poisson number
    )
    end_E: Tensor  # float64 ns, the last pulse: about the end of the read-out

    def __getitem__(self, index_E: Tensor) -> Observed:
        """These events, numbered from 0."""
        offsets, row = _gather(self.offsets_E1, index_E)
        crowd_offsets, crowd = _gather(self.crowd_offsets_E1, index_E)
        node_offsets, node = _gather(self.node_offsets_E1, index_E)
        new = torch.full((self.offsets_E1.numel() - 1,), -1, device=index_E.device)
        new[index_E] = torch.arange(len(index_E), device=index_E.device)
        event_V = torch.repeat_interleave(crowd_offsets.diff())
        moved_V = (offsets[:-1] - self.offsets_E1[index_E])[event_V]
        moved_U = (crowd_offsets[:-1] - self.crowd_offsets_E1[index_E])[torch.repeat_interleave(node_offsets.diff())]

        def doms(key_D: Tensor) -> tuple[Tensor, Tensor]:
            kept = (new[key_D // N_SENSORS] >= 0).nonzero().squeeze(1)
            key, order = torch.sort(new[key_D[kept] // N_SENSORS] * N_SENSORS + key_D[kept] % N_SENSORS)
            return key, kept[order]

        isolated, of = doms(self.isolated_D)
        bright, of_bright = doms(self.bright_D)
        return Observed(
            self.sensor_W[row],
            self.time_W[row],
            self.weight_W[row],
            self.background_W[row],
            self.noise_W[row],
            self.companion_W[row],
            offsets,
            self.pulse_V[crowd] + moved_V,
            self.steps_V[crowd],
            self.power_V[crowd],
            self.close_V[crowd],
            crowd_offsets,
            self.crowd_U[node] + moved_U,
            self.node_U[node],
            self.span_U[node],
            self.node_background_U[node],
            node_offsets,
            isolated,
            self.isolated_time_D[of],
            bright,
            self.bright_share_D[of_bright],
            self.end_E[index_E],
        )

    @property
    def event_W(self) -> Tensor:
        return torch.repeat_interleave(self.offsets_E1.diff())


def observe(pulses: Pulses, array: Detector, config: SimConfig) -> Observed:
    """Pulses as the likelihood's points in time, before the light of other muons."""
    event = pulses.event_of_pulse_P()
    order = torch.argsort((event << 40) | (pulses.sensor_P.long() << 24) | pulses.time_P.long())
    event, sensor, time = event[order], pulses.sensor_P.long()[order], pulses.time_P[order].double()
    dom = event * N_SENSORS + sensor
    first = hits.starts(dom)
    start = hits.segment_start(first)
    charge = pulses.charge_P[order].double()
    bend = charge.square() / config.saturation
    linear = (bend + (bend.square() + 4 * charge.square()).sqrt()) / 2  # before the pulse saturated
    count = linear / mean_charge(config)
    since = time - time[start]
    fine = since < config.fine_length
    width = torch.where(fine, config.fine_bin, config.coarse_bin)
    begin = torch.where(fine, 0.0, config.fine_length)
    # Times are rounded to whole ns before they are binned: the last that falls into a bin is half a ns earlier.
    end = time[start] + begin + ((since - begin) / width + 1).floor() * width - 0.5

    rank = torch.arange(len(event), device=event.device) - start
    steps = (linear * hits.CHARGE_STEPS).round().long()
    number = torch.cumsum(first, 0) - 1
    bright_dom = torch.zeros(int(number[-1]) + 1 if len(number) else 0, dtype=torch.bool, device=event.device)
    bright_dom[number[(rank >= _SINGLE) | (steps > MOST_STEPS)]] = True
    bright = bright_dom[number]

    rate = 1e-9 * config.noise_rate * (1 + config.burst_fraction) * array.efficiency_S.double().clamp(min=1)
    gap = torch.where(first, torch.inf, since - since.roll(1))
    pair = config.burst_fraction / (1 + config.burst_fraction)
    laws = ((config.burst_short_share, config.burst_short_delay), (1 - config.burst_short_share, config.burst_delay))
    companion = pair * torch.stack([share / scale * (-gap / scale).exp() for share, scale in laws]).sum(0)
    span = end - time
    close = pair * torch.stack([share * -torch.expm1(-span / scale) for share, scale in laws]).sum(0)
    background = rate[sensor] + _afterpulses(count, since, start, config)

    group = torch.where(rank < _SINGLE, rank, _SINGLE + (rank - _SINGLE) // _GROUP)
    row = torch.cumsum(hits.starts(dom << 20 | group), 0) - 1
    head = hits.starts(row).nonzero().squeeze(1)  # of each group
    alone = rank < _SINGLE
    further = torch.where(bright, (count - 1).clamp(min=0), 0.0)
    share = torch.where(alone, torch.where(bright, count.clamp(max=1), 1.0), count)
    at = torch.where(alone, time, (time + end) / 2)
    n = head.numel()
    total = time.new_zeros(n).index_add_(0, row, share)
    when = time.new_zeros(n).index_add_(0, row, share * at) / total
    # The simulator draws at most max_photons, and makes them heavier for more light.
    charge_dom = torch.zeros_like(bright_dom, dtype=count.dtype).index_add_(0, number, count)
    share_dom = 1 / dispersion(config) / (charge_dom / config.max_photons).clamp(min=1)
    scale = torch.where(bright, share_dom[number], 1.0)
    crowd = (alone & torch.where(bright, further > 0, steps > _SURELY_ONE)).nonzero().squeeze(1)
    nodes = torch.where(bright[crowd], 4, 1)
    of = torch.repeat_interleave(nodes)
    which = torch.arange(of.numel(), device=of.device) - (nodes.cumsum(0) - nodes)[of]
    (middle, whole), (places, shares) = (
        [torch.tensor(x, dtype=time.dtype, device=time.device) for x in _NODES[n]] for n in (1, 4)
    )
    place, share_U = (
        torch.where(nodes[of] == 1, one, four[which]) for one, four in ((middle, places), (whole, shares))
    )
    node = crowd[of]
    last = torch.zeros(pulses.n_events, dtype=time.dtype, device=time.device)
    isolated = (first & pulses.auxiliary_P[order]).nonzero().squeeze(1)
    return Observed(
        sensor[head],
        when,
        total * scale[head],
        background[head],
        rate[sensor[head]],
        torch.where(bright | first, 0.0, companion)[head],
        _offsets(event[head], pulses.n_events),
        row[crowd],
        steps[crowd].clamp(max=MOST_STEPS),
        (further * scale)[crowd],
        torch.where(bright, 0.0, close)[crowd],
        _offsets(event[crowd], pulses.n_events),
        of,
        time[node] + place * span[node],
        share_U * span[node],
        background[node],
        _offsets(event[node], pulses.n_events),
        dom[isolated],
        time[isolated],
        dom[first][bright_dom],
        share_dom[bright_dom],
        last.scatter_reduce_(0, event, time, "amax"),
    )


def _afterpulses(count_P: Tensor, since_P: Tensor, start_P: Tensor, config: SimConfig) -> Tensor:
    """(P) 1/ns: after-pulses of the photo-electrons seen on the DOM before, which are spread as their mean and
    variance say."""
    moments_3P = torch.stack((count_P, count_P * since_P, count_P * since_P.square()))
    before_3P = moments_3P.cumsum(1) - moments_3P
    number, mean, square = before_3P - before_3P[:, start_P]
    safe = number.clamp(min=1e-9)
    mean = mean / safe
    variance = (square / safe - mean.square()).clamp(min=0)
    density = torch.zeros_like(mean)
    for share, after, spread in AFTERPULSES:
        sigma = (spread**2 + variance).sqrt()
        pull = (since_P - mean - after) / sigma
        density = density + share * (-pull.square() / 2).exp() / (2.5066 * sigma)
    return torch.where(number > 1e-9, config.afterpulse_fraction * number * density, 0.0)


def _gather(offsets_E1: Tensor, index_E: Tensor) -> tuple[Tensor, Tensor]:
    """(new offsets, rows) of these events."""
    counts = offsets_E1.diff()[index_E]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    event = torch.repeat_interleave(counts)
    return offsets, torch.arange(len(event), device=event.device) + (offsets_E1[index_E] - offsets[:-1])[event]


def _offsets(event_X: Tensor, n: int) -> Tensor:
    counts = torch.bincount(event_X, minlength=n)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
