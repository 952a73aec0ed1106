"""Which neutrinos come, what they turn into, and which sources of light that makes.

Suffixes: N proposals, C showers (point sources), M muon tracks (line sources), 3 = x, y, z in m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iceaggr.geometry import SURFACE_Z
from iceaggr.sim.config import SimConfig
from iceaggr.sim.rng import Rng

LIGHT_SPEED = 0.299792458
"""m/ns."""


@dataclass(frozen=True, eq=False)
class Primaries:
    """N proposed neutrino interactions. Time 0 is when the particle is at `anchor_N3`."""

    energy_N: Tensor  # GeV
    is_track_N: Tensor  # bool
    direction_N3: Tensor  # unit vector of travel
    anchor_N3: Tensor  # m; the vertex, or for upstream tracks the point in the array that they aim at
    inelasticity_N: Tensor
    muon_energy_N: Tensor  # GeV at the vertex; 0 for cascades
    upstream_N: Tensor  # m from the vertex to the anchor
    length_N: Tensor  # m, muon range; 0 for cascades

    @property
    def vertex_N3(self) -> Tensor:
        return self.anchor_N3 - self.upstream_N[:, None] * self.direction_N3


@dataclass(frozen=True, eq=False)
class Showers:
    """C point-like sources."""

    event_C: Tensor  # int64 proposal
    position_C3: Tensor
    direction_C3: Tensor
    energy_C: Tensor  # GeV of electromagnetic-equivalent light
    time_C: Tensor  # ns
    is_signal_C: Tensor  # bool; False for light of coincident muons


@dataclass(frozen=True, eq=False)
class Tracks:
    """M line sources: points anchor + l * direction with start <= l <= stop, passed at time_M + l / c."""

    event_M: Tensor
    anchor_M3: Tensor
    direction_M3: Tensor
    start_M: Tensor  # m
    stop_M: Tensor  # m
    energy_M: Tensor  # GeV at start
    time_M: Tensor  # ns at the anchor
    is_signal_M: Tensor


@dataclass(frozen=True, eq=False)
class Bursts:
    """Stochastic losses of M muons, B slots each."""

    place_MB: Tensor  # m along the track, from its anchor
    energy_MB: Tensor  # GeV, 0 in empty slots


def power_law(u: Tensor, index: float, low: float, high: float) -> Tensor:
    """Energies of dN/dE ~ E^-index in [low, high] from uniform u (inverse CDF, index != 1)."""
    a, b = low ** (1 - index), high ** (1 - index)
    return (a + u * (b - a)) ** (1 / (1 - index))


def muon_energy(start_energy: Tensor, path: Tensor, config: SimConfig) -> Tensor:
    """Mean energy (GeV) after `path` metres with dE/dx = ionisation + radiative * E; 0 when stopped."""
    ratio = config.ionisation / config.radiative
    return ((start_energy + ratio) * (-config.radiative * path).exp() - ratio).clamp(min=0)


def muon_range(energy: Tensor, config: SimConfig) -> Tensor:
    """Metres a muon of `energy` GeV travels under the same loss."""
    return (1 + energy * config.radiative / config.ionisation).log() / config.radiative


def draw_primaries(n: int, config: SimConfig, rng: Rng) -> Primaries:
    """N neutrinos: power-law energies, isotropic directions, positions uniform in the generation cylinder."""
    soft = power_law(rng.uniform(n), config.index, config.energy_min, config.energy_max)
    hard = power_law(rng.uniform(n), config.hard_index, config.hard_energy_min, config.energy_max)
    energy = torch.where(rng.uniform(n) <= config.hard_fraction, hard, soft)
    is_track = rng.uniform(n) <= config.track_fraction
    upstream = is_track & (rng.uniform(n) <= config.upstream_fraction)
    direction = rng.direction(n)
    anchor = _in_cylinder(n, config, rng)
    inelasticity = rng.uniform(n) ** 1.5
    muon = torch.where(is_track, (1 - inelasticity) * energy, 0.0)
    length = muon_range(muon, config)
    # Muons start in ice or rock: a down-going one not above the surface.
    overburden = (SURFACE_Z - anchor[:, 2]) / (-direction[:, 2]).clamp(min=1e-3)
    distance = torch.where(upstream, rng.uniform(n) * torch.minimum(length, overburden), 0.0)
    return Primaries(energy, is_track, direction, anchor, inelasticity, muon, distance, length)


def draw_sources(primaries: Primaries, config: SimConfig, rng: Rng) -> tuple[Showers, Tracks, Bursts]:
    """The showers and tracks that shine: the interaction, its muon, the muon's losses and muons by chance.

    The losses come twice, among the showers and by track.

    Host syncs: two, the numbers of tracks and of showers.
    """
    n = primaries.energy_N.numel()
    device = primaries.energy_N.device
    tracks = _cat(Tracks, _signal_tracks(primaries), _coincident_tracks(n, config, rng))
    neutral = rng.uniform(n) <= config.neutral_current_fraction
    y = primaries.inelasticity_N
    hadronic = config.hadronic_light * y
    visible = torch.where(primaries.is_track_N | neutral, hadronic, 1 - y + hadronic) * primaries.energy_N
    vertex = Showers(
        torch.arange(n, device=device),
        primaries.vertex_N3,
        primaries.direction_N3,
        visible,
        -primaries.upstream_N / LIGHT_SPEED,
        torch.ones(n, dtype=torch.bool, device=device),
    )
    # The hadronic shower of a far upstream vertex is out of sight.
    near = (primaries.upstream_N < 1000).nonzero().squeeze(1)
    bursts = _draw_bursts(tracks, config, rng)
    return _cat(Showers, _take(vertex, near), _burst_showers(tracks, bursts)), tracks, bursts


def _in_cylinder(n: int, config: SimConfig, rng: Rng) -> Tensor:
    rho = config.radius * rng.uniform(n).sqrt()
    phi = rng.between(0.0, 2 * torch.pi, n)
    z = rng.between(-config.half_height, config.half_height, n)
    return torch.stack((rho * phi.cos(), rho * phi.sin(), z), dim=1)


def _signal_tracks(primaries: Primaries) -> Tracks:
    event = primaries.is_track_N.nonzero().squeeze(1)
    start = -primaries.upstream_N[event]
    return Tracks(
        event,
        primaries.anchor_N3[event],
        primaries.direction_N3[event],
        start,
        start + primaries.length_N[event],
        primaries.muon_energy_N[event],
        torch.zeros_like(start),
        torch.ones_like(event, dtype=torch.bool),
    )


def _coincident_tracks(n: int, config: SimConfig, rng: Rng) -> Tracks:
    """Down-going muons, zenith ~ cos^3, E^-2.7 above 500 GeV, from 1 km before the point they aim at."""
    probability = 2e-9 * config.coincident_rate * config.coincident_window
    event = (rng.uniform(n) <= probability).nonzero().squeeze(1)
    m = event.numel()
    down = rng.uniform(m) ** 0.25
    phi = rng.between(0.0, 2 * torch.pi, m)
    rho = (1 - down * down).clamp(min=0).sqrt()
    energy = power_law(rng.uniform(m), 2.7, 500.0, 1e6)
    start = torch.full_like(energy, -1000.0)
    return Tracks(
        event,
        _in_cylinder(m, config, rng),
        torch.stack((rho * phi.cos(), rho * phi.sin(), -down), dim=1),
        start,
        start + muon_range(energy, config),
        energy,
        rng.between(-config.coincident_window, config.coincident_window, m),
        torch.zeros_like(event, dtype=torch.bool),
    )


def _draw_bursts(tracks: Tracks, config: SimConfig, rng: Rng) -> Bursts:
    """Stochastic losses: log-uniform shares 1e-3..0.5 of the muon's energy, anywhere near the array."""
    m, k = tracks.energy_M.numel(), config.burst_slots
    first = tracks.start_M.clamp(min=-1000)[:, None]
    last = torch.maximum(tracks.stop_M.clamp(max=1000)[:, None], first)
    place = first + rng.uniform(m, k) * (last - first)
    share = 10 ** rng.between(-3.0, -0.3, m, k)
    energy = share * muon_energy(tracks.energy_M[:, None], place - tracks.start_M[:, None], config)
    return Bursts(place, torch.where(energy > config.burst_min, energy, 0.0))


def _burst_showers(tracks: Tracks, bursts: Bursts) -> Showers:
    track, slot = bursts.energy_MB.nonzero(as_tuple=True)
    place, direction = bursts.place_MB[track, slot], tracks.direction_M3[track]
    return Showers(
        tracks.event_M[track],
        tracks.anchor_M3[track] + place[:, None] * direction,
        direction,
        bursts.energy_MB[track, slot],
        tracks.time_M[track] + place / LIGHT_SPEED,
        tracks.is_signal_M[track],
    )


def _take(showers: Showers, index: Tensor) -> Showers:
    return Showers(*(x[index] for x in vars(showers).values()))


def _cat(kind, first, second):
    return kind(*(torch.cat(pair) for pair in zip(vars(first).values(), vars(second).values(), strict=True)))
