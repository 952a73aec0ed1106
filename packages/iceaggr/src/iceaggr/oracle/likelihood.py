"""The simulator's likelihood of an event's pulses, for many hypotheses about many events at once.

A hypothesis is one column of numbers (`Layout`): a cascade is one shower; a track is a muon, the hadronic shower where
it starts and its stochastic losses. The light comes from the very functions that the simulator samples
(`iceaggr.sim.light`), in float64:

    ln L = sum_i n_i ln(b_i + sum_s mu_s p_s(t_i)) - sum_(s, DOM) mu_s share_seen

over pulses i with n_i photo-electrons and sources s; mu is the expected light of the DOM, p the density of arrival
times with the photomultiplier's jitter, pre-pulses and after-pulses, b the rate of noise and of a muon that came by
chance. DOMs without a pulse count through the second sum, which culls them as the simulator does.

Approximations: n_i is the charge over the mean of one photo-electron, rounded; photo-electrons merged into a pulse
after its first share the middle of the pulse's time bin; bright DOMs' later pulses are taken together by sixteens;
late pulses are not parted from scattered light; an isolated launch hides the light of its dead time, other launches
hide none; the trigger and the edges of the read-out are left out.

Suffixes: S hypotheses, R numbers of one, K its free directions, W points in time (pulses or parts of them), Q
(source, DOM) pairs, E events, D isolated DOMs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS
from iceaggr.oracle_delay import blurred_delay_log_density, delay_cdf
from iceaggr.sim import hits
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector
from iceaggr.sim.light import Light, shower_light, shower_pairs, track_light, track_pairs
from iceaggr.sim.photons import AFTERPULSES
from iceaggr.sim.spectrum import LIGHT_SPEED, Bursts, Showers, Tracks, muon_range

_SINGLE = 8
"""Pulses of a DOM that stay apart; later ones are taken together ..."""
_GROUP = 16
"""... by this many."""


@dataclass(frozen=True)
class Layout:
    """Rows of hypotheses: 0-2 unit vector of travel, 3-5 a point (m), 6 the time there (ns), then for

    a cascade: 7 the log of the shower's energy (GeV of electromagnetic light);
    a track: 7 where the muon starts (m from the point), then where its losses are, the log energies of the hadronic
    shower at the start and of the losses, and last that of the muon at its start.
    """

    is_track: bool
    losses: int = 0

    @property
    def showers(self) -> int:
        return 1 + self.losses

    @property
    def width(self) -> int:
        return 8 + 2 * self.showers if self.is_track else 8

    @property
    def free(self) -> int:
        """Directions in which it can move: a unit vector has two, and a point along its track none."""
        return self.width - (2 if self.is_track else 1)

    @property
    def log_energies(self) -> slice:
        """Its rows of log energies."""
        return slice(7 + self.showers, self.width) if self.is_track else slice(7, 8)

    @property
    def scale(self) -> list[float]:
        """(K) what counts as one step in each free direction: radians, m, ns and logs."""
        place = [100.0] * (2 if self.is_track else 3)
        rest = [100.0] * self.showers + [2.0] * (self.showers + 1) if self.is_track else [2.0]
        return [1.0, 1.0, *place, 300.0, *rest]

    def move(self, rows_RS: Tensor, frame_6S: Tensor, step_KS: Tensor) -> Tensor:
        """Hypotheses after a step in their free directions; `frame_6S` as from `frame`."""
        rows, axes, step = rows_RS.unbind(), frame_6S.unbind(), step_KS.unbind()
        travel = [x + step[0] * a + step[1] * b for x, a, b in zip(rows[:3], axes[:3], axes[3:], strict=True)]
        length = (travel[0].square() + travel[1].square() + travel[2].square()).sqrt()
        if self.is_track:
            point = [x + step[2] * a + step[3] * b for x, a, b in zip(rows[3:6], axes[:3], axes[3:], strict=True)]
            rest = [x + dx for x, dx in zip(rows[6:], step[4:], strict=True)]
        else:
            point = [x + dx for x, dx in zip(rows[3:6], step[2:5], strict=True)]
            rest = [x + dx for x, dx in zip(rows[6:], step[5:], strict=True)]
        return torch.stack([*(x / length for x in travel), *point, *rest])

    def shower(self, rows_RS: Tensor, slot: int) -> Showers:
        """One shower of each hypothesis."""
        rows = rows_RS.unbind()
        place, log_energy = (rows[7 + slot], rows[7 + self.showers + slot]) if self.is_track else (0.0, rows[7])
        point = torch.stack([x + place * u for x, u in zip(rows[3:6], rows[:3], strict=True)])
        lit = torch.ones_like(rows[0], dtype=torch.bool)
        number = torch.arange(rows_RS.shape[1], device=rows_RS.device)
        return Showers(number, point.T, rows_RS[:3].T, log_energy.exp(), rows[6] + place / LIGHT_SPEED, lit)

    def muon(self, rows_RS: Tensor, config: SimConfig) -> Tracks:
        """The muon of each hypothesis about a track."""
        rows = rows_RS.unbind()
        start, energy = rows[7], rows[-1].exp()
        lit = torch.ones_like(start, dtype=torch.bool)
        number = torch.arange(rows_RS.shape[1], device=rows_RS.device)
        stop = start + muon_range(energy, config)
        return Tracks(number, rows_RS[3:6].T, rows_RS[:3].T, start, stop, energy, rows[6], lit)


def frame(rows_RS: Tensor) -> Tensor:
    """(6, S): two unit vectors at right angles to each direction and to each other."""
    travel = rows_RS[:3]
    axis = torch.zeros_like(travel)
    steep = travel[2].abs() > 0.9
    axis[0], axis[2] = steep.to(axis), (~steep).to(axis)
    first = torch.linalg.cross(travel, axis, dim=0)
    first = first / first.norm(dim=0)
    return torch.cat((first, torch.linalg.cross(travel, first, dim=0)))


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of E events, in the form that the likelihood asks for."""

    event_W: Tensor  # int64, ascending
    sensor_W: Tensor  # int64
    time_W: Tensor  # float64 ns
    weight_W: Tensor  # float64 photo-electrons
    background_W: Tensor  # float64 1/ns
    offsets_E1: Tensor  # int64
    isolated_D: Tensor  # int64 event * N_SENSORS + sensor, ascending: DOMs whose first launch was isolated ...
    isolated_time_D: Tensor  # float64 ns ... and when

    def __getitem__(self, index_E: Tensor) -> Observed:
        """These events, numbered from 0."""
        counts = self.offsets_E1.diff()[index_E]
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        event = torch.repeat_interleave(counts)
        row = torch.arange(len(event), device=event.device) + (self.offsets_E1[index_E] - offsets[:-1])[event]
        new = torch.full((self.offsets_E1.numel() - 1,), -1, device=index_E.device)
        new[index_E] = torch.arange(len(index_E), device=index_E.device)
        of = new[self.isolated_D // N_SENSORS]
        kept = (of >= 0).nonzero().squeeze(1)
        key, order = torch.sort((of * N_SENSORS + self.isolated_D % N_SENSORS)[kept])
        return Observed(
            event,
            self.sensor_W[row],
            self.time_W[row],
            self.weight_W[row],
            self.background_W[row],
            offsets,
            key,
            self.isolated_time_D[kept][order],
        )


def observe(
    pulses: Pulses, array: Detector, config: SimConfig, chance: tuple[Tracks, Bursts] | None = None
) -> Observed:
    """Pulses as points in time. `chance`: the muons that came by chance, whose light is background."""
    event = pulses.event_of_pulse_P()
    order = torch.argsort((event << 40) | (pulses.sensor_P.long() << 24) | pulses.time_P.long())
    event, sensor, time = event[order], pulses.sensor_P.long()[order], pulses.time_P[order].double()
    first = hits.starts(event * N_SENSORS + sensor)
    start = hits.segment_start(first)
    charge = pulses.charge_P[order].double()
    bend = charge.square() / config.saturation
    linear = (bend + (bend.square() + 4 * charge.square()).sqrt()) / 2  # before the pulse saturated
    (share_a, share_b), (width_a, width_b) = config.spe_fractions, config.spe_widths
    mean = share_a * width_a + share_b * width_b + (1 - share_a - share_b) * config.spe_mean
    count = (linear / mean).round().clamp(min=1)
    since = time - time[start]
    fine = since < config.fine_length
    width = torch.where(fine, config.fine_bin, config.coarse_bin)
    begin = torch.where(fine, 0.0, config.fine_length)
    end = time[start] + begin + ((since - begin) / width + 1).floor() * width
    # The first photo-electron is where the pulse is, the others lie between it and the end of the bin.
    crowd = (count > 1).nonzero().squeeze(1)
    point = torch.cat((torch.arange(len(event), device=event.device), crowd))
    at = torch.cat((time, ((time + end) / 2)[crowd]))
    weight = torch.cat((torch.ones_like(count), count[crowd] - 1))
    rank = point - start[point]
    group = torch.where(rank < _SINGLE, rank, _SINGLE + (rank - _SINGLE) // _GROUP)
    apart = (rank < _SINGLE) & (torch.arange(len(point), device=event.device) < len(event))
    key = ((event[point] * N_SENSORS + sensor[point]) << 18) | (group << 1) | apart.long()
    key, row = torch.unique(key, return_inverse=True)
    total = at.new_zeros(len(key)).index_add_(0, row, weight)
    when = at.new_zeros(len(key)).index_add_(0, row, weight * at) / total
    dom = key >> 18
    where = dom % N_SENSORS
    isolated = (first & pulses.auxiliary_P[order]).nonzero().squeeze(1)
    counts = torch.bincount(dom // N_SENSORS, minlength=pulses.n_events)
    rate = 1e-9 * config.noise_rate * (1 + config.burst_fraction) * array.efficiency_S.double().clamp(min=1)
    seen = Observed(
        dom // N_SENSORS,
        where,
        when,
        total,
        rate[where],
        torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        (event * N_SENSORS + sensor)[isolated],
        time[isolated],
    )
    if chance is None:
        return seen
    likelihood = Likelihood(seen, Layout(True, chance[1].energy_MB.shape[1]), array, config)
    known = torch.full((pulses.n_events,), -1, device=event.device)
    known[chance[0].event_M] = torch.arange(chance[0].event_M.numel(), device=event.device)
    hit = (known[seen.event_W] >= 0).nonzero().squeeze(1)
    light = likelihood.rate(muon_rows(*chance)[:, known[seen.event_W[hit]]], hit)
    return replace(seen, background_W=seen.background_W.index_add(0, hit, light))


def muon_rows(tracks: Tracks, bursts: Bursts) -> Tensor:
    """(R, M): muons without a hadronic shower as hypotheses."""
    log = [torch.full_like(tracks.start_M[:, None], -7.0), bursts.energy_MB.clamp(min=1e-3).log()]
    log.append(tracks.energy_M[:, None].log())
    known = [tracks.direction_M3, tracks.anchor_M3, tracks.time_M[:, None], tracks.start_M[:, None], bursts.place_MB]
    return torch.cat([x.double() for x in (*known, *log)], dim=1).T


class Score(NamedTuple):
    value_S: Tensor
    """ln L up to a constant of the event."""
    gradient_SK: Tensor
    fisher_SKK: Tensor
    """sum_i n_i J_i J_i^T, J_i = d ln(rate of pulse i): the observed information of a Poisson process."""


class Likelihood:
    """ln L of hypotheses about `seen`; each call takes hypotheses (R, S) and the event of each."""

    def __init__(self, seen: Observed, layout: Layout, array: Detector, config: SimConfig) -> None:
        self.seen, self.layout, self.config = seen, layout, config
        self.array = double(array)

    def blurred(self, jitter: float) -> Likelihood:
        """The same with times known to `jitter` ns only: the way up from afar, where sharp arrivals say nothing."""
        return Likelihood(self.seen, self.layout, self.array, replace(self.config, jitter=jitter))

    def value(self, rows_RS: Tensor, event_S: Tensor) -> Tensor:
        """(S) ln L."""
        with torch.no_grad():
            hypothesis_W, point_W = self._points(event_S)
            rate_W = self.rate(rows_RS.index_select(1, hypothesis_W), point_W)
            log_rate_W = (self.seen.background_W[point_W] + rate_W).log()
            gain_S = _sum(self.seen.weight_W[point_W] * log_rate_W, hypothesis_W, event_S.numel())
            return gain_S - self._expected(rows_RS, event_S)

    def score(self, rows_RS: Tensor, event_S: Tensor) -> Score:
        """ln L with its slope and information in the free directions of each hypothesis.

        Every point has a copy of its hypothesis's step, so that one backward pass gives the slope of each.
        """
        n, k = event_S.numel(), self.layout.free
        frame_6S = frame(rows_RS)
        hypothesis_W, point_W = self._points(event_S)
        weight_W = self.seen.weight_W[point_W]

        step_KW = rows_RS.new_zeros(k, hypothesis_W.numel(), requires_grad=True)
        rows_RW, frame_6W = (x.index_select(1, hypothesis_W) for x in (rows_RS, frame_6S))
        rate_W = self.rate(self.layout.move(rows_RW, frame_6W, step_KW), point_W)
        log_rate_W = (self.seen.background_W[point_W] + rate_W).log()
        (slope_KW,) = torch.autograd.grad(log_rate_W.sum(), step_KW)
        value_S = _sum(weight_W * log_rate_W.detach(), hypothesis_W, n)
        slope_WK = slope_KW.T.contiguous()
        gradient_SK = _sum(weight_W[:, None] * slope_WK, hypothesis_W, n)
        outer_WKK = (weight_W[:, None] * slope_WK)[:, :, None] * slope_WK[:, None, :]
        fisher_SKK = _sum(outer_WKK.reshape(-1, k * k), hypothesis_W, n).reshape(n, k, k)

        step_KS = rows_RS.new_zeros(k, n, requires_grad=True)
        expected_S = self._expected(self.layout.move(rows_RS, frame_6S, step_KS), event_S)
        (slope_KS,) = torch.autograd.grad(expected_S.sum(), step_KS)
        return Score(value_S - expected_S.detach(), gradient_SK - slope_KS.T, fisher_SKK)

    def rate(self, rows_RW: Tensor, point_W: Tensor) -> Tensor:
        """Photo-electrons per ns expected from column w at the DOM and time of point point_W[w]."""
        sensor, time = self.seen.sensor_W[point_W], self.seen.time_W[point_W]
        lights = [
            shower_light(self.layout.shower(rows_RW, slot), None, sensor, self.array, self.config)
            for slot in range(self.layout.showers)
        ]
        if self.layout.is_track:
            lights.append(track_light(self.layout.muon(rows_RW, self.config), None, sensor, self.array, self.config))
        return torch.stack([self._rate_of(light, time) for light in lights]).sum(0)

    def _rate_of(self, light: Light, time_W: Tensor) -> Tensor:
        """mu p(t) of one source."""
        config, delay = self.config, time_W - light.time_Q
        prompt, early = (
            blurred_delay_log_density(delay + shift, light.shape_Q, light.rate_Q, config.jitter).exp()
            for shift in (0.0, config.early_advance)
        )
        density = (1 - config.early_fraction) * prompt + config.early_fraction * early
        mean, variance = light.shape_Q / light.rate_Q, light.shape_Q / light.rate_Q.square()
        for share, after, spread in AFTERPULSES:
            sigma = (spread**2 + variance).sqrt()
            pull = (delay - mean - after) / sigma
            density = density + config.afterpulse_fraction * share * (-pull.square() / 2).exp() / (2.5066 * sigma)
        return light.expected_Q * density

    def _expected(self, rows_RS: Tensor, event_S: Tensor) -> Tensor:
        """(S) photo-electrons that the array reports, over the DOMs that the simulator does not cull."""
        total_S = torch.zeros_like(rows_RS[0])
        for slot in range(self.layout.showers):
            showers = self.layout.shower(rows_RS, slot)
            with torch.no_grad():
                source_Q, sensor_Q = shower_pairs(showers, self.array, self.config)
            light = shower_light(showers, source_Q, sensor_Q, self.array, self.config)
            total_S = total_S.index_add(0, source_Q, self._reported(light, event_S[source_Q], sensor_Q))
        if self.layout.is_track:
            muons = self.layout.muon(rows_RS, self.config)
            with torch.no_grad():
                source_Q, sensor_Q = track_pairs(muons, self.array, self.config)
            light = track_light(muons, source_Q, sensor_Q, self.array, self.config)
            total_S = total_S.index_add(0, source_Q, self._reported(light, event_S[source_Q], sensor_Q))
        return total_S

    def _reported(self, light: Light, event_Q: Tensor, sensor_Q: Tensor) -> Tensor:
        """Photo-electrons that the DOM reports: all but those in the dead time of an isolated launch."""
        near_afterpulses = sum(share for share, after, _ in AFTERPULSES if after < self.config.readout_after)
        expected_Q = light.expected_Q * (1 + self.config.afterpulse_fraction * near_afterpulses)
        key_Q, isolated_D = event_Q * N_SENSORS + sensor_Q, self.seen.isolated_D
        if not isolated_D.numel():
            return expected_Q
        at_Q = torch.searchsorted(isolated_D, key_Q).clamp(max=isolated_D.numel() - 1)
        lost = (isolated_D[at_Q] == key_Q).nonzero().squeeze(1)
        since = self.seen.isolated_time_D[at_Q[lost]] - light.time_Q[lost]
        shape, rate = light.shape_Q[lost], light.rate_Q[lost]
        begin, end = (delay_cdf(since + t, shape, rate) for t in (self.config.stamp_length, self.config.stamp_dead))
        return expected_Q.index_add(0, lost, expected_Q[lost] * (begin - end))

    def _points(self, event_S: Tensor) -> tuple[Tensor, Tensor]:
        """(hypothesis, point) of every point of every hypothesis's event."""
        first_S = self.seen.offsets_E1[event_S]
        counts_S = self.seen.offsets_E1[event_S + 1] - first_S
        hypothesis_W = torch.repeat_interleave(counts_S)
        begin_S = counts_S.cumsum(0) - counts_S
        index_W = torch.arange(len(hypothesis_W), device=event_S.device)
        return hypothesis_W, index_W + (first_S - begin_S)[hypothesis_W]


def double(array: Detector) -> Detector:
    """The same array in float64."""
    tables: dict[str, Any] = {f.name: getattr(array, f.name) for f in fields(array)}
    floats = {name: x.double() for name, x in tables.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return Detector(**(tables | floats))


def _sum(value_X: Tensor, row_X: Tensor, n: int) -> Tensor:
    return value_X.new_zeros(n, *value_X.shape[1:]).index_add_(0, row_X, value_X)
