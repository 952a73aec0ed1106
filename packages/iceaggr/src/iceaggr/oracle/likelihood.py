"""The simulator's likelihood of an event's pulses, for many hypotheses about many events at once.

A hypothesis is one column of numbers (`iceaggr.oracle.hypothesis`): a cascade is one shower; a track is a muon, the
hadronic shower where it starts and its stochastic losses. The light comes from the very functions that the simulator
samples (`iceaggr.sim.light`), in float64. Pulses are a point process with the rate

    lambda(t) = b(t) + sum_s mu_s p_s(t) at each DOM,    ln L = sum_i ln(lambda(t_i) R_i) - sum_(s, DOM) mu_s share_seen

over pulses i and sources s; mu is the expected light of the DOM, p the density of arrival times with the
photomultiplier's jitter, early and late pulses, R_i what the charge says (`iceaggr.oracle.charge`), and b the rate of
noise, of the companions of noise, of after-pulses of what was seen before, and of a muon that came by chance. DOMs
without a pulse count through the second sum, which culls them as the simulator does.

Approximations: DOMs with very much light count their charge, not photo-electrons, with its dispersion (and that of the
simulator's heavier photons), and their pulses after the 96th by fours; the law of late pulses has the right mean and
variance; an isolated launch hides the light of its dead time, other launches hide none; the read-out ends at the last
pulse; that an event had to trigger is left out.

Suffixes: S hypotheses, R numbers of one, K its free directions, W pulses, V those that may hold several
photo-electrons, X points in time, Q (source, DOM) pairs, E events.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS
from iceaggr.oracle.charge import log_counts
from iceaggr.oracle.delay import blurred_delay_log_density, delay_cdf
from iceaggr.oracle.hypothesis import Layout, double, frame, muon_rows
from iceaggr.oracle.observed import Observed, observe
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector
from iceaggr.sim.light import Light, shower_light, shower_pairs, track_light, track_pairs
from iceaggr.sim.spectrum import Bursts, Tracks


class Score(NamedTuple):
    value_S: Tensor
    """ln L up to a constant of the event."""
    gradient_SK: Tensor
    fisher_SKK: Tensor
    """sum_i n_i J_i J_i^T, J_i = d ln(rate of pulse i): the observed information of a Poisson process."""


class Points(NamedTuple):
    """What each hypothesis asks of its event: X = its pulses W, then the nodes U of its V."""

    hypothesis_W: Tensor
    pulse_W: Tensor
    hypothesis_V: Tensor
    crowd_V: Tensor
    first_V: Tensor  # where the pulse is among W
    node_U: Tensor
    crowd_U: Tensor  # where the pulse is among V
    span_U: Tensor
    hypothesis_X: Tensor
    sensor_X: Tensor
    time_X: Tensor
    background_X: Tensor


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
            points = self.points(event_S)
            light_X = self.rate(rows_RS.index_select(1, points.hypothesis_X), points.sensor_X, points.time_X)
            term_W, term_V, _ = self._terms(light_X, points)
            n = event_S.numel()
            gain_S = _sum(term_W, points.hypothesis_W, n) + _sum(term_V, points.hypothesis_V, n)
            return gain_S - self._expected(rows_RS, event_S)

    def score(self, rows_RS: Tensor, event_S: Tensor) -> Score:
        """ln L with its slope and information in the free directions of each hypothesis.

        Every point has a copy of its hypothesis's step, so that one backward pass gives the slope of each.
        """
        n, k = event_S.numel(), self.layout.free
        frame_6S = frame(rows_RS)
        points = self.points(event_S)
        step_KX = rows_RS.new_zeros(k, points.hypothesis_X.numel(), requires_grad=True)
        rows_RX, frame_6X = (x.index_select(1, points.hypothesis_X) for x in (rows_RS, frame_6S))
        light_X = self.rate(self.layout.move(rows_RX, frame_6X, step_KX), points.sensor_X, points.time_X)
        term_W, term_V, further_V = self._terms(light_X, points)
        (slope_KX,) = torch.autograd.grad(term_W.sum() + term_V.sum(), step_KX)
        w, v = term_W.numel(), term_V.numel()
        value_S = _sum(term_W.detach(), points.hypothesis_W, n) + _sum(term_V.detach(), points.hypothesis_V, n)
        slope_XK = slope_KX.T.contiguous()
        slope_YK = torch.cat((slope_XK[:w], _sum(slope_XK[w:], points.crowd_U, v)))
        hypothesis_Y = torch.cat((points.hypothesis_W, points.hypothesis_V))
        gradient_SK = _sum(slope_YK, hypothesis_Y, n)
        number_Y = torch.cat((self.seen.weight_W[points.pulse_W], further_V.clamp(min=1e-9)))
        outer_YKK = (slope_YK / number_Y[:, None])[:, :, None] * slope_YK[:, None, :]
        fisher_SKK = _sum(outer_YKK.reshape(-1, k * k), hypothesis_Y, n).reshape(n, k, k)

        step_KS = rows_RS.new_zeros(k, n, requires_grad=True)
        expected_S = self._expected(self.layout.move(rows_RS, frame_6S, step_KS), event_S)
        (slope_KS,) = torch.autograd.grad(expected_S.sum(), step_KS)
        return Score(value_S - expected_S.detach(), gradient_SK - slope_KS.T, fisher_SKK)

    def rate(self, rows_RX: Tensor, sensor_X: Tensor, time_X: Tensor) -> Tensor:
        """Photo-electrons per ns expected from column x at DOM sensor_X[x] and time_X[x], however few: far from the
        maximum the pulses of DOMs that the simulator would skip show the way."""
        lights = [
            shower_light(self.layout.shower(rows_RX, slot), None, sensor_X, self.array, self.config)
            for slot in range(self.layout.showers)
        ]
        if self.layout.is_track:
            lights.append(track_light(self.layout.muon(rows_RX, self.config), None, sensor_X, self.array, self.config))
        return torch.stack([self._rate_of(light, time_X) for light in lights]).sum(0)

    def _rate_of(self, light: Light, time_X: Tensor) -> Tensor:
        """mu p(t) of one source."""
        config, delay = self.config, time_X - light.time_Q
        sigma = (config.jitter**2 + 1 / 12) ** 0.5  # times are whole ns
        mean = light.shape_Q / light.rate_Q + config.late_delay
        variance = light.shape_Q / light.rate_Q.square() + config.late_delay**2
        parts = (
            (1 - config.early_fraction - config.late_fraction, 0.0, light.shape_Q, light.rate_Q),
            (config.early_fraction, config.early_advance, light.shape_Q, light.rate_Q),
            (config.late_fraction, 0.0, mean.square() / variance, mean / variance),
        )
        density = [share * blurred_delay_log_density(delay + ahead, a, b, sigma).exp() for share, ahead, a, b in parts]
        return light.expected_Q * torch.stack(density).sum(0)

    def _terms(self, light_X: Tensor, points: Points) -> tuple[Tensor, Tensor, Tensor]:
        """(ln rate of each pulse, ln R of each that may hold several, their mean number of further photo-electrons)."""
        seen, w = self.seen, points.pulse_W.numel()
        rate_X = light_X + points.background_X
        rate_W = rate_X[:w]
        noise_W = seen.noise_W[points.pulse_W]
        # The pulse before on the same DOM is the row before; rows that start a DOM have no companion.
        paired_W = rate_W + seen.companion_W[points.pulse_W] * noise_W / rate_W.roll(1)
        term_W = seen.weight_W[points.pulse_W] * paired_W.log()
        noisy_V = seen.close_V[points.crowd_V] * noise_W[points.first_V] / rate_W[points.first_V]
        log_amount_V = noisy_V.index_add(0, points.crowd_U, points.span_U * rate_X[w:]).log()
        with torch.no_grad():
            log_V, further_V = log_counts(log_amount_V.exp(), seen.steps_V[points.crowd_V], self.config)
            power_V = seen.power_V[points.crowd_V]
            further_V = torch.where(power_V > 0, power_V, further_V)
            log_V = torch.where(power_V > 0, power_V * log_amount_V, log_V)
        # The slope of ln R in closed form: the value of the last term is zero.
        return term_W, log_V + further_V * (log_amount_V - log_amount_V.detach()), further_V

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
        """Photo-electrons that the DOM reports: all but those in the dead time of an isolated launch and after the
        end of the read-out."""
        key_Q, expected_Q = event_Q * N_SENSORS + sensor_Q, light.expected_Q
        lost, at = _find(key_Q, self.seen.isolated_D)
        since = self.seen.isolated_time_D[at] - light.time_Q[lost]
        shape, rate = light.shape_Q[lost], light.rate_Q[lost]
        begin, end = (delay_cdf(since + t, shape, rate) for t in (self.config.stamp_length, self.config.stamp_dead))
        expected_Q = expected_Q.index_add(0, lost, expected_Q[lost] * (begin - end))
        spread = 4 * (light.shape_Q + 1) / light.rate_Q
        late = (self.seen.end_E[event_Q] - light.time_Q < spread).nonzero().squeeze(1)
        before = delay_cdf(self.seen.end_E[event_Q[late]] - light.time_Q[late], light.shape_Q[late], light.rate_Q[late])
        expected_Q = expected_Q.index_add(0, late, expected_Q[late] * (before - 1))
        bright, at = _find(key_Q, self.seen.bright_D)
        return expected_Q.index_add(0, bright, expected_Q[bright] * (self.seen.bright_share_D[at] - 1))

    def points(self, event_S: Tensor) -> Points:
        """Every point of every hypothesis's event."""
        hypothesis_W, pulse_W, shift_S = _rows(self.seen.offsets_E1, event_S)
        hypothesis_V, crowd_V, crowd_shift_S = _rows(self.seen.crowd_offsets_E1, event_S)
        hypothesis_U, node_U, _ = _rows(self.seen.node_offsets_E1, event_S)
        crowd_U = self.seen.crowd_U[node_U]
        pulse_V = self.seen.pulse_V[crowd_V]
        return Points(
            hypothesis_W,
            pulse_W,
            hypothesis_V,
            crowd_V,
            pulse_V - shift_S[hypothesis_V],
            node_U,
            crowd_U - crowd_shift_S[hypothesis_U],
            self.seen.span_U[node_U],
            torch.cat((hypothesis_W, hypothesis_U)),
            self.seen.sensor_W[torch.cat((pulse_W, self.seen.pulse_V[crowd_U]))],
            torch.cat((self.seen.time_W[pulse_W], self.seen.node_U[node_U])),
            torch.cat((self.seen.background_W[pulse_W], self.seen.node_background_U[node_U])),
        )


def observe_all(
    pulses: Pulses, array: Detector, config: SimConfig, chance: tuple[Tracks, Bursts] | None = None
) -> Observed:
    """`observe`, with the light of the muons that came by chance as background."""
    seen = observe(pulses, array, config)
    if chance is None or not chance[0].event_M.numel():
        return seen
    likelihood = Likelihood(seen, Layout(True, chance[1].energy_MB.shape[1]), array, config)
    muons = muon_rows(*chance)
    points = likelihood.points(chance[0].event_M)
    light_X = likelihood.rate(muons.index_select(1, points.hypothesis_X), points.sensor_X, points.time_X)
    w = points.pulse_W.numel()
    return replace(
        seen,
        background_W=seen.background_W.index_add(0, points.pulse_W, light_X[:w]),
        node_background_U=seen.node_background_U.index_add(0, points.node_U, light_X[w:]),
    )


def _rows(offsets_E1: Tensor, event_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hypothesis, row) of every row of every hypothesis's event, and (S) the row less where it stands."""
    first_S = offsets_E1[event_S]
    counts_S = offsets_E1[event_S + 1] - first_S
    hypothesis_W = torch.repeat_interleave(counts_S)
    shift_S = first_S - (counts_S.cumsum(0) - counts_S)
    return hypothesis_W, torch.arange(len(hypothesis_W), device=event_S.device) + shift_S[hypothesis_W], shift_S


def _find(key_Q: Tensor, wanted_D: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of key_Q that are in the ascending wanted_D, where they are there)."""
    if not wanted_D.numel():
        none = key_Q.new_zeros(0)
        return none, none
    at_Q = torch.searchsorted(wanted_D, key_Q).clamp(max=wanted_D.numel() - 1)
    found = (wanted_D[at_Q] == key_Q).nonzero().squeeze(1)
    return found, at_Q[found]


def _sum(value_X: Tensor, row_X: Tensor, n: int) -> Tensor:
    return value_X.new_zeros(n, *value_X.shape[1:]).index_add_(0, row_X, value_X)
