"""How much light of a shower or a muon reaches a DOM, and when: pure functions of (source, DOM) pairs.

`shower_light` and `track_light` return, for every pair, the expected photo-electrons, the time of unscattered
light and the two parameters of the delay after it; `delay_log_density` is the density they stand for.
Sampling (`iceaggr.sim.photons`) and likelihoods evaluate the same functions.

Yield: diffusion that turns into 1/r^2 (point) or 1/r (line) nearby, arXiv:1301.5361. Delays: the gamma law of
Pandel, parameters of AMANDA's H2 ice (astro-ph/0407044), with lengths averaged over the depths that the light
crosses. Suffixes: Q pairs, C showers, M tracks, R strings, 3 = x, y, z in m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from iceaggr.geometry import DOMS_PER_STRING
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import Detector, Ice
from iceaggr.sim.spectrum import LIGHT_SPEED, Showers, Tracks, muon_energy

N_PHASE = 1.3195
N_GROUP = 1.35634
COS_CHERENKOV = 1 / N_PHASE
SIN_CHERENKOV = math.sqrt(1 - COS_CHERENKOV**2)
ICE_SPEED = LIGHT_SPEED / N_GROUP
"""Group velocity, m/ns."""
_SHOWER_WIDTH, _SHOWER_POWER = 2.61, 0.39
"""Shower emission exp(-width |cos - cos_cherenkov|^power), a fit to Geant4 showers in IceCube's code."""
_DIFFUSE_FORWARD = 0.6
"""exp(0.6 cos): scattered light of a shower comes from about one scattering length ahead of it."""
_CROSS_OVER = 0.4
"""About the ratio of lambda_c to the propagation length."""
_BRIGHTEST = 3.0
"""How much more than the average over angles a DOM far from a shower sees at best."""
_BRIGHTEST_LINE = 1.3
"""The same for a muon, whose angle of emission is fixed."""


@dataclass(frozen=True, eq=False)
class Light:
    """What each of Q (source, DOM) pairs expects."""

    expected_Q: Tensor  # photo-electrons
    time_Q: Tensor  # ns, arrival of unscattered light
    shape_Q: Tensor  # gamma shape of the delay
    rate_Q: Tensor  # gamma rate of the delay, 1/ns


def _shower_emission_norm() -> float:
    """1 / (mean over the sphere of exp(-width |cos - cos_cherenkov|^power)), by the midpoint rule."""
    cos = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 10_000 - 1
    profile = torch.exp(-_SHOWER_WIDTH * (cos - COS_CHERENKOV).abs() ** _SHOWER_POWER)
    return float(1 / profile.mean())


_SHOWER_NORM = _shower_emission_norm()
_DIFFUSE_NORM = _DIFFUSE_FORWARD / math.sinh(_DIFFUSE_FORWARD)


def shower_light(
    showers: Showers, source_Q: Tensor | None, sensor_Q: Tensor, detector: Detector, config: SimConfig
) -> Light:
    """Light of shower source_Q in DOM sensor_Q; without source_Q every pair has a shower of its own, in order."""
    position_3Q, direction_3Q = (
        _columns(showers.position_C3, source_Q),
        _columns(showers.direction_C3, source_Q),
    )
    sight_3Q = detector.xyz_3S.index_select(1, sensor_Q) - position_3Q
    distance = _length(sight_3Q)
    cos = _dot(sight_3Q, direction_3Q) / distance
    ice = detector.ice_between(position_3Q[2], detector.layer_S.index_select(0, sensor_Q))
    energy = _of(showers.energy_C, source_Q)
    point = _point_yield(energy, distance, ice, config) * detector.efficiency_S.index_select(0, sensor_Q)
    direct = (-distance * ice.scattering).exp()
    cone = _SHOWER_NORM * (-_SHOWER_WIDTH * (cos - COS_CHERENKOV).abs() ** _SHOWER_POWER).exp()
    diffuse = _DIFFUSE_NORM * (_DIFFUSE_FORWARD * cos).exp()
    emission = diffuse + direct * (cone - diffuse)
    expected = point * emission * _acceptance(sight_3Q[2] / distance, direct, config)

    time = _of(showers.time_C, source_Q) + distance / ICE_SPEED
    # Light that starts the wrong way turns round within a scattering length.
    shape = distance * ice.scattering + 0.7 * (1 - cos)
    return _light(expected, time, shape, ice, config)


def track_light(
    tracks: Tracks, source_Q: Tensor | None, sensor_Q: Tensor, detector: Detector, config: SimConfig
) -> Light:
    """Light of muon source_Q in DOM sensor_Q: the Cherenkov cone, fading out beyond its ends. source_Q as above."""
    cone = _cone(tracks, source_Q, sensor_Q, detector)
    ice = detector.ice_between(cone.z, detector.layer_S.index_select(0, sensor_Q))
    start, stop = _of(tracks.start_M, source_Q), _of(tracks.stop_M, source_Q)
    energy = muon_energy(_of(tracks.energy_M, source_Q), cone.place - start, config)
    line = _line_yield(energy, cone.distance, ice, config) * detector.efficiency_S.index_select(0, sensor_Q)
    width = 8.0 + 0.2 * cone.distance
    ends = torch.sigmoid((cone.emitted - start) / width) * torch.sigmoid((stop - cone.emitted) / width)
    direct = (-cone.distance * ice.scattering).exp()
    expected = line * ends * _acceptance(cone.up, direct, config)

    time = _of(tracks.time_M, source_Q) + cone.place / LIGHT_SPEED + cone.distance / ICE_SPEED
    # Effective distance of a PMT that sees the light from its side or back (astro-ph/0407044).
    path = 0.84 * SIN_CHERENKOV * cone.distance + 3.1 - 3.9 * cone.up + 4.6 * cone.up.square()
    return _light(expected, time, path * ice.scattering, ice, config)


def delay_log_density(delay_Q: Tensor, shape_Q: Tensor, rate_Q: Tensor) -> Tensor:
    """Log of the gamma density (1/ns) of a photo-electron's delay (ns) after straight light; -inf below 0."""
    safe = delay_Q.clamp(min=1e-3)
    log_density = shape_Q * rate_Q.log() + (shape_Q - 1) * safe.log() - rate_Q * safe - torch.lgamma(shape_Q)
    return torch.where(delay_Q < 0, -torch.inf, log_density)


def shower_pairs(showers: Showers, detector: Detector, config: SimConfig) -> tuple[Tensor, Tensor]:
    """(source_Q, sensor_Q): the DOMs that may expect `min_expected` from each shower.

    By string, then by DOM, against the reach of the light into each layer of DOMs. Host syncs: two.
    """
    z = showers.position_C3[:, 2]
    rise = detector.layer_z_GD.reshape(-1) - z[:, None]
    attenuation = detector.attenuation_LK.index_select(0, detector.layer(z))
    # y exp(y) = strength, y = distance * attenuation: Lambert's W.
    strength = config.light_yield * _BRIGHTEST / (_CROSS_OVER * config.min_expected)
    reach = _lambert_w(strength * showers.energy_C[:, None] * attenuation.square()) / attenuation
    reach2_CGD = (reach.square() - rise.square()).reshape(-1, *detector.layer_z_GD.shape)
    distance2_CR = (detector.string_R2 - showers.position_C3[:, None, :2]).square().sum(2)
    source_X, string_X = (distance2_CR < reach2_CGD.amax(2)[:, detector.group_R]).nonzero(as_tuple=True)
    reach2_XD = reach2_CGD[source_X, detector.group_R[string_X]]
    cell_Q, dom_Q = (distance2_CR[source_X, string_X, None] < reach2_XD).nonzero(as_tuple=True)
    return source_X.index_select(0, cell_Q), string_X.index_select(0, cell_Q) * DOMS_PER_STRING + dom_Q


def track_pairs(tracks: Tracks, detector: Detector, config: SimConfig) -> tuple[Tensor, Tensor]:
    """(source_Q, sensor_Q): the DOMs that may expect `min_expected` from each muon. Host syncs: two."""
    energy = muon_energy(tracks.energy_M, (-800 - tracks.start_M).clamp(min=0), config)  # when it comes near
    per_metre = config.minimum_light + 0.5 * config.radiative * energy
    # sqrt(y) exp(y) = strength, y = distance / attenuation length: half of Lambert's W of 2 strength^2.
    clear_GD = detector.clear_GD
    strength = 2 * config.light_yield * per_metre * _BRIGHTEST_LINE / (_CROSS_OVER * config.min_expected)
    reach_MGD = clear_GD / 2 * _lambert_w(math.pi * (strength[:, None, None] / clear_GD).square())
    reach2_MGD = reach_MGD.square()
    furthest_MR = reach_MGD.amax(2)[:, detector.group_R]
    # Of the point z of a string: along = along0 + z uz, squared distance from the line = a z^2 + 2 b z + c.
    uz_MR = tracks.direction_M3[:, 2, None].expand_as(furthest_MR)
    offset_MR2 = detector.string_R2 - tracks.anchor_M3[:, None, :2]
    w_z = -tracks.anchor_M3[:, 2, None]
    along0 = (offset_MR2 * tracks.direction_M3[:, None, :2]).sum(2) + w_z * uz_MR
    a = (1 - uz_MR.square()).clamp(min=1e-4)
    b = w_z - along0 * uz_MR
    c = offset_MR2.square().sum(2) + w_z.square() - along0.square()
    # Light comes from start <= along - 0.88 distance <= stop, softly.
    tilt = torch.where(uz_MR.abs() < 1e-3, 1e-3, uz_MR)
    first = (tracks.start_M[:, None] - 0.3 * furthest_MR - along0) / tilt
    last = (tracks.stop_M[:, None] + furthest_MR - along0) / tilt
    low, high = torch.minimum(first, last), torch.maximum(first, last)
    half = (b.square() - a * (c - furthest_MR.square())).sqrt() / a  # nan: out of reach
    low, high = torch.maximum(low, -b / a - half), torch.minimum(high, half - b / a)
    bottom, top = detector.layer_z_GD.amin() - 10, detector.layer_z_GD.amax() + 10
    source_X, string_X = ((low < high) & (high > bottom) & (low < top)).nonzero(as_tuple=True)
    flat_X = source_X * low.shape[1] + string_X
    cells_5X = torch.stack((a, 2 * b, c, low, high)).reshape(5, -1).index_select(1, flat_X)
    a_X, b_X, c_X, low_X, high_X = cells_5X[:, :, None]
    group_X = detector.group_R.index_select(0, string_X)
    z_XD = detector.layer_z_GD.index_select(0, group_X)
    reach2_XD = reach2_MGD.reshape(-1, DOMS_PER_STRING).index_select(0, 2 * source_X + group_X)
    distance2_XD = torch.addcmul(c_X, torch.addcmul(b_X, a_X, z_XD), z_XD)
    near = (distance2_XD < reach2_XD).logical_and_(z_XD > low_X).logical_and_(z_XD < high_X)
    cell_Q, dom_Q = near.nonzero(as_tuple=True)
    return source_X.index_select(0, cell_Q), string_X.index_select(0, cell_Q) * DOMS_PER_STRING + dom_Q


@dataclass(frozen=True, eq=False)
class _Cone:
    """Where the light that reaches a DOM leaves the track."""

    emitted: Tensor  # m along an endless track
    place: Tensor  # m along the track, between its ends
    distance: Tensor  # m from there to the DOM
    up: Tensor  # upward component of the light's direction
    z: Tensor  # m


def _cone(tracks: Tracks, source_Q: Tensor | None, sensor_Q: Tensor, detector: Detector) -> _Cone:
    anchor_3Q, direction_3Q = _columns(tracks.anchor_M3, source_Q), _columns(tracks.direction_M3, source_Q)
    sight_3Q = detector.xyz_3S.index_select(1, sensor_Q) - anchor_3Q
    along = _dot(sight_3Q, direction_3Q)
    perpendicular = (_dot(sight_3Q, sight_3Q) - along.square()).clamp(min=1.0).sqrt()
    emitted = along - perpendicular * (COS_CHERENKOV / SIN_CHERENKOV)
    start, stop = _of(tracks.start_M, source_Q), _of(tracks.stop_M, source_Q)
    place = torch.minimum(torch.maximum(emitted, start), stop)
    distance = ((along - place).square() + perpendicular.square()).sqrt()
    up = (sight_3Q[2] - place * direction_3Q[2]) / distance
    return _Cone(emitted, place, distance, up, anchor_3Q[2] + place * direction_3Q[2])


def _point_yield(energy: Tensor, distance: Tensor, ice: Ice, config: SimConfig) -> Tensor:
    """Photo-electrons from a shower in a standard DOM, averaged over angles (arXiv:1301.5361)."""
    near = ice.cross_over / (distance * (distance * ice.cross_over).tanh())
    return config.light_yield * energy * near * (-distance * ice.attenuation).exp()


def _line_yield(energy: Tensor, distance: Tensor, ice: Ice, config: SimConfig) -> Tensor:
    """The same for an endless muon of `energy` GeV, from its emission point at `distance`.

    Half of the radiative loss shines along the track; the other half are the showers of `draw_sources`.
    """
    per_metre = config.minimum_light + 0.5 * config.radiative * energy
    radius = distance * SIN_CHERENKOV  # equals that of the closest approach unless the track is too short
    scale = SIN_CHERENKOV * ice.cross_over * (math.pi / 2 / ice.attenuation).sqrt()  # 1 / sqrt(lambda_mu)
    root = radius.sqrt()
    near = scale / (SIN_CHERENKOV * root * (root * scale).tanh())
    return 2 * config.light_yield * per_metre * near * (-radius * ice.attenuation).exp()


def _acceptance(up: Tensor, direct: Tensor, config: SimConfig) -> Tensor:
    """Response of a downward-looking PMT to light going `up`; diffuse light keeps a third of the dipole."""
    return 1 + config.acceptance_dipole * up * (1 + 2 * direct) / 3


def _light(expected: Tensor, time: Tensor, scatterings: Tensor, ice: Ice, config: SimConfig) -> Light:
    """`scatterings`: path of the light in effective scattering lengths."""
    shape = scatterings * (config.pandel_scattering / config.pandel_lambda)
    rate = 1 / config.pandel_tau + ICE_SPEED * ice.absorption
    return Light(expected.clamp(max=config.max_expected), time, shape, rate)


def _of(value_X: Tensor, index_Q: Tensor | None) -> Tensor:
    return value_X if index_Q is None else value_X.index_select(0, index_Q)


def _columns(rows_X3: Tensor, index_Q: Tensor | None) -> Tensor:
    """(3, Q): whole columns are contiguous, which is several times faster on a CPU than rows of three."""
    return rows_X3.T if index_Q is None else rows_X3.T.index_select(1, index_Q)


def _dot(a_3Q: Tensor, b_3Q: Tensor) -> Tensor:
    (ax, ay, az), (bx, by, bz) = a_3Q.unbind(), b_3Q.unbind()  # indexing would fill whole gradients with zeros
    return ax * bx + ay * by + az * bz


def _length(a_3Q: Tensor) -> Tensor:
    return _dot(a_3Q, a_3Q).sqrt().clamp(min=1.0)


def _lambert_w(x: Tensor) -> Tensor:
    """W(x) for x >= 0 to a few per cent: Newton steps from log1p."""
    w = torch.log1p(x)
    for _ in range(3):
        w = w - (w - x * (-w).exp()) / (1 + w)
    return w
