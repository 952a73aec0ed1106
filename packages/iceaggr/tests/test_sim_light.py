"""The light functions against slow references and physics they must agree with."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from iceaggr.geometry import N_SENSORS, SURFACE_Z, ice_properties, icecube86
from iceaggr.sim import light
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Ice, detector
from iceaggr.sim.light import Light, shower_light, shower_pairs, track_light, track_pairs
from iceaggr.sim.rng import Rng, mix_seed
from iceaggr.sim.spectrum import (
    LIGHT_SPEED,
    draw_primaries,
    draw_sources,
    muon_energy,
    muon_range,
    power_law,
)

CONFIG = SimConfig()
CPU = torch.device("cpu")
ARRAY = detector(icecube86(), CPU)


@pytest.fixture(scope="module")
def sources():
    rng = Rng(CPU, 1)
    return draw_sources(draw_primaries(300, CONFIG, rng), CONFIG, rng)[:2]


def even_ice(scattering: float, absorption: float, like: torch.Tensor) -> Ice:
    s, a = 1 / scattering, 1 / absorption
    return Ice(*(torch.full_like(like, x) for x in (s, a, math.sqrt(3 * s * a), 3 * s * math.exp(-a / s))))


def test_ice_between_layers_is_the_average_of_the_inverse_lengths() -> None:
    z_from, z_to = -250.0, 130.0
    path = np.linspace(z_from, z_to, 4001)
    scattering, absorption = ice_properties(SURFACE_Z - path)
    ice = ARRAY.ice_between(torch.tensor([z_from]), ARRAY.layer(torch.tensor([z_to])))
    assert float(ice.scattering) == pytest.approx((1 / scattering).mean(), rel=0.02)
    assert float(ice.absorption) == pytest.approx((1 / absorption).mean(), rel=0.02)
    back = ARRAY.ice_between(torch.tensor([z_to]), ARRAY.layer(torch.tensor([z_from])))
    torch.testing.assert_close(back.attenuation, ice.attenuation)


def test_far_from_a_shower_the_reference_yield_is_reproduced() -> None:
    """1.4 / d * exp(-d / 29) photo-electrons per GeV, d in m: the average ice of the bulk."""
    distance = torch.tensor([60.0, 100.0, 150.0])
    ice = even_ice(25.0, 98.0, distance)
    found = light._point_yield(torch.ones(3), distance, ice, CONFIG)
    torch.testing.assert_close(found, 1.4 / distance * (-distance / 29).exp(), rtol=0.1, atol=0)


def test_an_endless_muon_shines_like_a_row_of_showers() -> None:
    """Far off, where light is diffuse, the line formula is the integral of the point formula."""
    radius = torch.tensor([80.0, 150.0])
    ice = even_ice(25.0, 98.0, radius)
    energy = torch.tensor([100.0, 100.0])
    per_metre = CONFIG.minimum_light + 0.5 * CONFIG.radiative * energy
    line = light._line_yield(energy, radius / light.SIN_CHERENKOV, ice, CONFIG)
    along = torch.linspace(-1500, 1500, 6001)[:, None]
    distance = (along.square() + radius.square()).sqrt()
    point = light._point_yield(per_metre, distance, even_ice(25.0, 98.0, distance), CONFIG)
    torch.testing.assert_close(line, point.sum(0) * 0.5, rtol=0.15, atol=0)


def test_showers_shine_forward_at_the_cherenkov_angle(sources) -> None:
    sensor = torch.arange(N_SENSORS)
    live = ARRAY.efficiency_S > 0
    x = ARRAY.xyz_3S[:, 2000]
    showers, _ = sources
    one = type(showers)(
        torch.zeros(1, dtype=torch.int64),
        (x - torch.tensor([40.0, 0.0, 0.0]))[None],
        torch.tensor([[0.75, 0.66, 0.0]]),
        torch.tensor([1000.0]),
        torch.tensor([100.0]),
        torch.ones(1, dtype=torch.bool),
    )
    backward = type(showers)(*(v if f.name != "direction_C3" else -v for f, v in _items(one)))
    ahead = shower_light(one, torch.zeros_like(sensor), sensor, ARRAY, CONFIG)
    behind = shower_light(backward, torch.zeros_like(sensor), sensor, ARRAY, CONFIG)
    assert ahead.expected_Q[2000] > 2 * behind.expected_Q[2000]
    assert ahead.shape_Q[2000] < behind.shape_Q[2000]
    assert float(ahead.time_Q[2000]) == pytest.approx(100 + 40 / light.ICE_SPEED, abs=0.1)
    assert (ahead.expected_Q[~live] == 0).all()
    assert all(torch.isfinite(v).all() for _, v in _items(ahead))


def test_emission_and_delay_are_densities() -> None:
    cos = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    cone = light._SHOWER_NORM * torch.exp(
        -light._SHOWER_WIDTH * (cos - light.COS_CHERENKOV).abs() ** light._SHOWER_POWER
    )
    diffuse = light._DIFFUSE_NORM * torch.exp(light._DIFFUSE_FORWARD * cos)
    assert float(cone.mean()) == pytest.approx(1, abs=0.01)
    assert float(diffuse.mean()) == pytest.approx(1, abs=0.01)
    delay = torch.linspace(0.01, 20_000, 400_001, dtype=torch.float64)
    density = light.delay_log_density(delay, torch.full_like(delay, 2.5), torch.full_like(delay, 0.004)).exp()
    assert float(torch.trapezoid(density, delay)) == pytest.approx(1, abs=1e-3)
    assert float(torch.trapezoid(density * delay, delay)) == pytest.approx(2.5 / 0.004, rel=1e-3)
    assert float(light.delay_log_density(torch.tensor(-1.0), torch.tensor(2.0), torch.tensor(1.0))) == -math.inf


@pytest.mark.parametrize("kind", ["showers", "tracks"])
def test_culling_keeps_the_light(kind: str, sources) -> None:
    """Against every DOM of the array: nearly all light is kept, and most of what is kept is worth it."""
    showers, tracks = sources
    source, pairs, shine = (
        (showers, shower_pairs, shower_light) if kind == "showers" else (tracks, track_pairs, track_light)
    )
    n = len(next(iter(vars(source).values())))
    every = torch.arange(n).repeat_interleave(N_SENSORS)
    full = shine(source, every, torch.arange(N_SENSORS).repeat(n), ARRAY, CONFIG).expected_Q
    source_Q, sensor_Q = pairs(source, ARRAY, CONFIG)
    kept = torch.zeros(n * N_SENSORS, dtype=torch.bool)
    kept[source_Q * N_SENSORS + sensor_Q] = True
    assert int(kept.sum()) == source_Q.numel(), "a pair came twice"
    assert full[kept].sum() > 0.98 * full.sum()
    assert kept[full > 20 * CONFIG.min_expected].float().mean() > 0.98
    assert (full[kept] > CONFIG.min_expected / 10).float().mean() > 0.6


def test_track_light_arrives_on_the_cherenkov_cone(sources) -> None:
    """Time and place by scanning the track for the earliest arrival."""
    _, tracks = sources
    long = (tracks.stop_M - tracks.start_M > 600).nonzero()[0]
    sensor = torch.tensor([100, 2000, 3333])
    found = track_light(tracks, long.expand(3), sensor, ARRAY, CONFIG)
    place = torch.linspace(float(tracks.start_M[long]), float(tracks.stop_M[long]), 400_001, dtype=torch.float64)
    point = tracks.anchor_M3[long].double() + place[:, None] * tracks.direction_M3[long].double()
    for row, s in enumerate(sensor):
        distance = (point - ARRAY.xyz_3S[:, s].double()).norm(dim=1)
        # The phase velocity makes the path stationary on the cone; light travels at the group velocity.
        first = (place / LIGHT_SPEED + distance * light.N_PHASE / LIGHT_SPEED).argmin()
        expected = tracks.time_M[long] + place[first] / LIGHT_SPEED + distance[first] / light.ICE_SPEED
        assert float(found.time_Q[row]) == pytest.approx(float(expected), abs=1.0)


def test_muons_lose_energy_until_their_range() -> None:
    energy = torch.tensor([10.0, 1e3, 1e5])
    reach = muon_range(energy, CONFIG)
    assert (muon_energy(energy, 0.99 * reach, CONFIG) > 0).all()
    torch.testing.assert_close(muon_energy(energy, reach, CONFIG), torch.zeros(3), atol=0.5, rtol=0)
    small = muon_energy(energy, torch.ones(3), CONFIG) - energy
    torch.testing.assert_close(small, -(CONFIG.ionisation + CONFIG.radiative * energy), rtol=0.05, atol=1e-3)


def test_primaries_follow_their_distributions() -> None:
    n = 20_000
    p = draw_primaries(n, CONFIG, Rng(CPU, 7))
    u = (torch.arange(n) + 0.5) / n
    soft = power_law(u, CONFIG.index, CONFIG.energy_min, CONFIG.energy_max)
    distance = (p.energy_N.sort().values[:, None] <= soft[::500]).float().mean(0) - u[::500]
    assert distance.abs().max() < 0.02
    torch.testing.assert_close(p.direction_N3.norm(dim=1), torch.ones(n))
    assert p.direction_N3.mean(0).abs().max() < 5 * 0.58 / n**0.5
    assert float(p.is_track_N.float().mean()) == pytest.approx(CONFIG.track_fraction, abs=0.02)
    assert (p.vertex_N3[:, 2] <= SURFACE_Z + 1).all(), "a muon started above the ice"
    assert (p.anchor_N3[:, :2].norm(dim=1) <= CONFIG.radius * 1.0001).all()


def test_seeds_are_unrelated() -> None:
    seeds = {mix_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(0) != mix_seed(0, 0)
    assert all(0 <= s < 2**63 for s in seeds)


def _items(record: object) -> list:
    return [(f, getattr(record, f.name)) for f in fields(record)]  # type: ignore[arg-type]


def test_light_has_one_row_per_pair(sources) -> None:
    showers, _ = sources
    source_Q, sensor_Q = shower_pairs(showers, ARRAY, CONFIG)
    found = shower_light(showers, source_Q, sensor_Q, ARRAY, CONFIG)
    assert isinstance(found, Light)
    assert all(v.shape == source_Q.shape for _, v in _items(found))
    assert (found.shape_Q > 0).all()
    assert (found.rate_Q > 1 / CONFIG.pandel_tau).all()
