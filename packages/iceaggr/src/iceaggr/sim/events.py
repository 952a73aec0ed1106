"""Blocks of simulated events: every step on all proposals at once, no loop over events, CPU and GPU alike.

Simulated data. A block is fixed by (seed, stream, block) and the device type; CPU and GPU streams differ.
Suffixes: N proposals, E accepted events, P pulses, Q (source, DOM) pairs, L launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import Geometry, icecube86
from iceaggr.sim import hits, trigger
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector, detector
from iceaggr.sim.light import Light, shower_light, shower_pairs, track_light, track_pairs
from iceaggr.sim.noise import sample_noise
from iceaggr.sim.photons import merge, sample_photons
from iceaggr.sim.rng import Rng
from iceaggr.sim.spectrum import (
    LIGHT_SPEED,
    Bursts,
    Primaries,
    Showers,
    Tracks,
    draw_primaries,
    draw_sources,
)


@dataclass(frozen=True, eq=False)
class Truth:
    """What the simulated events were."""

    energy_E: Tensor  # float32 GeV, the neutrino's
    is_track_E: Tensor  # bool, muon-neutrino charged current; otherwise a cascade
    vertex_E3: Tensor  # float32 m
    time_E: Tensor  # float32 ns of the interaction, read-out clock
    azimuth_E: Tensor  # float64 rad, where the neutrino came from
    zenith_E: Tensor  # float64 rad
    muon_energy_E: Tensor  # float32 GeV at the vertex
    muon_length_E: Tensor  # float32 m
    inelasticity_E: Tensor  # float32
    burst_place_EB: Tensor  # float32 m from the vertex along the muon, its stochastic losses
    burst_energy_EB: Tensor  # float32 GeV, 0 in empty slots
    chance_energy_E: Tensor  # float32 GeV at its start, a muon that crosses by chance; 0 where there is none
    chance_start_E: Tensor  # float32 m, from the point below
    chance_point_E3: Tensor  # float32 m, a point on its track ...
    chance_direction_E3: Tensor  # float32 unit vector of travel
    chance_time_E: Tensor  # float32 ns at which it is there, read-out clock
    chance_burst_place_EB: Tensor  # float32 m from that point
    chance_burst_energy_EB: Tensor  # float32 GeV
    visible_E: Tensor  # float32, expected photo-electrons from the neutrino in the whole array
    n_signal_E: Tensor  # int64 pulses with light of the neutrino
    signal_P: Tensor  # bool, the pulse has light of the neutrino


def simulate_block(
    n_proposals: int,
    *,
    seed: int,
    block: int = 0,
    stream: int = 0,
    config: SimConfig | None = None,
    geometry: Geometry | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Pulses, Truth]:
    """Simulate `n_proposals` neutrinos and keep those that trigger (about half).

    The events are numbered 0, 1, ... in event_id_E. The same arguments give the same bytes on a device type;
    blocks with different (stream, block) are independent. Host syncs: about 20 per block, the sizes of lists.

    Raises:
        ValueError: more proposals than a block can hold.
    """
    if not 1 <= n_proposals <= hits.MAX_EVENTS:
        raise ValueError(f"{n_proposals} proposals in one block; it holds 1 to {hits.MAX_EVENTS}")
    config = config or SimConfig()
    device = torch.device(device)
    array = detector(geometry or icecube86(), device)
    rng = Rng(device, seed, stream, block)

    primaries = draw_primaries(n_proposals, config, rng)
    showers, tracks, bursts = draw_sources(primaries, config, rng)
    all_hits, visible_N = _signal_hits(showers, tracks, n_proposals, array, config, rng)
    all_hits = torch.cat((all_hits, _noise_hits(all_hits, n_proposals, array, config, rng)))
    pulses = merge(hits.sort_int64(all_hits), config)
    pulses, triggered_N, shift_N = _read_out(pulses, n_proposals, array, config, rng)
    return _events(pulses, triggered_N, shift_N, visible_N, primaries, tracks, bursts, config)


def _signal_hits(
    showers: Showers, tracks: Tracks, n: int, array: Detector, config: SimConfig, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Unsorted hits of all light of N proposals, and the photo-electrons expected from each neutrino."""
    shower_Q, shower_dom_Q = shower_pairs(showers, array, config)
    track_Q, track_dom_Q = track_pairs(tracks, array, config)
    shower = shower_light(showers, shower_Q, shower_dom_Q, array, config)
    track = track_light(tracks, track_Q, track_dom_Q, array, config)
    light = Light(*(torch.cat((getattr(shower, f.name), getattr(track, f.name))) for f in fields(Light)))
    event_Q = torch.cat((showers.event_C[shower_Q], tracks.event_M[track_Q]))
    signal_Q = torch.cat((showers.is_signal_C[shower_Q], tracks.is_signal_M[track_Q]))
    sensor_Q = torch.cat((shower_dom_Q, track_dom_Q))
    # Integers (1/1024 p.e.) add up to the same sum in any order, floats on a GPU do not.
    micro_Q = torch.where(signal_Q, light.expected_Q * 1024, 0.0).round().long()
    visible_N = torch.zeros(n, dtype=torch.int64, device=event_Q.device).index_add_(0, event_Q, micro_Q)
    return sample_photons(event_Q, sensor_Q, signal_Q, light, n, config, rng), visible_N.float() / 1024


def _noise_hits(signal_H: Tensor, n: int, array: Detector, config: SimConfig, rng: Rng) -> Tensor:
    """Noise over every moment that the read-out of a proposal can reach; none where there is no light."""
    event, at = hits.event(signal_H), hits.time(signal_H)
    dark = 1 << hits.TIME_BITS
    first = torch.full((n,), dark, device=at.device).scatter_reduce_(0, event, at, "amin")
    last = torch.zeros(n, dtype=torch.int64, device=at.device).scatter_reduce_(0, event, at, "amax")
    lit = first < dark
    begin = (first - hits.TIME_OFFSET - config.readout_before - 1000).float()
    end = (last - hits.TIME_OFFSET + config.readout_after + 1000).float()
    return sample_noise(torch.where(lit, begin, 0.0), torch.where(lit, end, 0.0), array, config, rng)


def _read_out(pulses: Tensor, n: int, array: Detector, config: SimConfig, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """(kept pulses, triggered_N, shift_N): pulses inside the read-out, what to add to their times.

    Proposals whose neutrino has fewer pulses in coincidence than the smallest trigger asks for do not count as
    triggered: a muon that came by chance did it.
    """
    dom, at = hits.dom(pulses), hits.time(pulses)
    near, launch = trigger.coincidence(dom, at, config)
    started = pulses[launch]
    windows = trigger.triggers(hits.event(started), hits.sensor(started), hits.time(started), array)
    triggered_N, start_N, end_N = trigger.readout(windows, n, config)
    alive = trigger.isolated_dead_time(dom, at, trigger.auxiliary(dom, at, near, config), config)
    event = hits.event(pulses)
    inside = (at >= start_N[event] - config.readout_before) & (at <= end_N[event] + config.readout_after)
    kept = inside & alive
    pulses, near = pulses[kept], near[kept]
    seen_N = torch.zeros(n, dtype=torch.int64, device=pulses.device)
    seen_N.index_add_(0, hits.event(pulses), pulses & near)
    jitter = (config.trigger_jitter * rng.exponential(n)).clamp(max=27).floor().long()
    return pulses, triggered_N & (seen_N >= trigger.SMT3[0]), config.trigger_time + jitter - start_N


def _events(
    pulses: Tensor,
    accepted_N: Tensor,
    shift_N: Tensor,
    visible_N: Tensor,
    primaries: Primaries,
    tracks: Tracks,
    bursts: Bursts,
    config: SimConfig,
) -> tuple[Pulses, Truth]:
    """Pulses and truth of the accepted proposals; `auxiliary` is decided on the pulses that were kept."""
    row = accepted_N.nonzero().squeeze(1)
    pulses = pulses[accepted_N[hits.event(pulses)]]
    event = (accepted_N.cumsum(0) - 1)[hits.event(pulses)]
    dom, at = hits.dom(pulses), hits.time(pulses)
    near, _ = trigger.coincidence(dom, at, config)
    quiet = trigger.auxiliary(dom, at, near, config)
    clock = (at + shift_N[hits.event(pulses)]).clamp(min=0)
    # By event, time, sensor; then charge, auxiliary and origin in the low bits: 14 + 17 + 13 + 17 + 1 + 1.
    ordered = hits.sort_int64(
        (event << 49) | (clock << 32) | (hits.sensor(pulses) << 19) | ((pulses & 0x3FFFF) << 1) | quiet
    )
    signal = ((ordered >> 1) & 1).bool()
    n_events = row.numel()
    sizes = torch.zeros((2, n_events), dtype=torch.int64, device=row.device)
    sizes[0].index_add_(0, ordered >> 49, torch.ones_like(ordered))
    sizes[1].index_add_(0, ordered >> 49, signal.long())
    direction = primaries.direction_N3[row].double()
    azimuth = torch.atan2(-direction[:, 1], -direction[:, 0]).remainder(2 * math.pi)
    zenith = torch.acos(-direction[:, 2].clamp(-1, 1))
    # In float64: CUDA divides by a number through its reciprocal, which in float32 misses the grid by a bit.
    charge = (((ordered >> 2) & 0x1FFFF).double() / hits.CHARGE_STEPS).float()
    result = Pulses(
        event_id_E=torch.arange(n_events, device=row.device),
        offsets_E1=torch.cat((sizes.new_zeros(1), sizes[0].cumsum(0))),
        sensor_P=((ordered >> 19) & 8191).int(),
        time_P=((ordered >> 32) & 0x1FFFF).int(),
        charge_P=charge,
        auxiliary_P=(ordered & 1).bool(),
        azimuth_E=azimuth,
        zenith_E=zenith,
    )
    signal_M, chance_M = ((tracks.is_signal_M == kind).nonzero().squeeze(1) for kind in (True, False))

    def of_event(value_M: Tensor, chosen_M: Tensor) -> Tensor:
        """One muon's values per accepted event; 0 for events without."""
        value_N = value_M.new_zeros(accepted_N.numel(), *value_M.shape[1:])
        value_N[tracks.event_M[chosen_M]] = value_M[chosen_M]
        return value_N[row]

    clock_E = shift_N[row] + hits.TIME_OFFSET  # of the physics time 0
    truth = Truth(
        energy_E=primaries.energy_N[row],
        is_track_E=primaries.is_track_N[row],
        vertex_E3=primaries.vertex_N3[row],
        time_E=clock_E - primaries.upstream_N[row] / LIGHT_SPEED,
        azimuth_E=azimuth,
        zenith_E=zenith,
        muon_energy_E=primaries.muon_energy_N[row],
        muon_length_E=primaries.length_N[row],
        inelasticity_E=primaries.inelasticity_N[row],
        burst_place_EB=of_event(bursts.place_MB - tracks.start_M[:, None], signal_M),
        burst_energy_EB=of_event(bursts.energy_MB, signal_M),
        chance_energy_E=of_event(tracks.energy_M, chance_M),
        chance_start_E=of_event(tracks.start_M, chance_M),
        chance_point_E3=of_event(tracks.anchor_M3, chance_M),
        chance_direction_E3=of_event(tracks.direction_M3, chance_M),
        chance_time_E=clock_E + of_event(tracks.time_M, chance_M),
        chance_burst_place_EB=of_event(bursts.place_MB, chance_M),
        chance_burst_energy_EB=of_event(bursts.energy_MB, chance_M),
        visible_E=visible_N[row],
        n_signal_E=sizes[1],
        signal_P=signal,
    )
    return result, truth
