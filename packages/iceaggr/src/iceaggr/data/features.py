"""Features of DOMs: the seed's vectors, or summaries relative to the event.

Everything is sort and segment operations on the pulses' device, without host synchronisation on CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from iceaggr.config import ModelConfig
from iceaggr.data.features_v3 import extra_width, fourier_features, ice_features
from iceaggr.data.grouping import Doms, segment_sums
from iceaggr.data.pulses import Pulses
from iceaggr.geometry import Geometry

LIGHT_SPEED = 0.299792458
"""m/ns."""

EMPTY_SLOT = {"marker": (-1.0, -1.0, 0.0), "zero": (0.0, 0.0, 0.0)}
"""(t', q', a') of an absent pulse. No real pulse has the marker: a' is +-0.5 for every pulse, t' = -1 would
be -20 us. The seed's zeros are the values of a real pulse's t' at the trigger time and q' at one
photo-electron."""

SUMMARY_FEATURES = (
    "x",  # detector frame, m / 500
    "y",
    "z",
    "dx",  # from the event's charge centre, m / 200
    "dy",
    "dz",
    "first_time",  # of the DOM's first pulse, from the event's reference time, in light travel of 200 m
    "hlc_time",  # the same, of its first HLC pulse, or of its first pulse if it has none
    "near_time",  # 2 tanh(hlc_time / 2): resolves the event, blind to how far off noise is
    "delay",  # log1p(charge-weighted mean time - first time, in 50 ns) / 3
    "spread",  # log1p(charge-weighted standard deviation of the times, in 50 ns) / 3
    "charge",  # log10 of the DOM's charge in p.e.
    "first_charge",  # log10 of the first pulse's charge in p.e.
    "pulses",  # log1p(number of pulses) - log 2
    "hlc",  # fraction of the DOM's pulses that are not auxiliary
    "efficiency",  # relative quantum efficiency - 1, in units of the high-efficiency DOMs' 0.35
    "scattering",  # log(effective scattering length / 30 m)
    "event_charge",  # log10 of the event's HLC charge / 2 - 1: the same for all DOMs of an event
    "event_doms",  # log of the event's number of DOMs / 2 - 2: the same for all DOMs of an event
)
"""Features of `dom_summary`, in order. The reference time is the charge-weighted median of the HLC pulses'
times, the charge centre the mean position weighted by the square root of HLC charge; both fall back to all
pulses in an event without HLC pulses."""

AGGREGATES = tuple(
    i for i, name in enumerate(SUMMARY_FEATURES) if name not in ("x", "y", "z", "efficiency", "scattering")
)
"""Columns of `dom_summary` that are no facts of the DOM itself: what model.aggregates puts beside seed features."""


@dataclass(frozen=True)
class Tables:
    """Facts per sensor_id (S = 5160), float32, on the device where features are made."""

    xyz_S3: Tensor  # m
    scattering_S: Tensor  # effective scattering length, m
    efficiency_S: Tensor  # relative to a standard DOM
    absorption_S: Tensor  # absorption length, m

    @classmethod
    def of(cls, geometry: Geometry, device: torch.device | str) -> Tables:
        arrays = (geometry.xyz, geometry.scattering, geometry.rde, geometry.absorption)
        return cls(*(torch.tensor(np.asarray(a), dtype=torch.float32, device=device) for a in arrays))

    @property
    def device(self) -> torch.device:
        return self.xyz_S3.device


def feature_width(config: ModelConfig) -> int:
    """Features per token."""
    base = 4 + 3 * config.slots if config.features == "seed" else len(SUMMARY_FEATURES)
    return base + extra_width(config, len(AGGREGATES))


def rotate_z(xyz_N3: Tensor, angle_N: Tensor) -> Tensor:
    """Rotates each vector about the vertical axis by its own angle (rad, counter-clockwise from above)."""
    x, y, z = xyz_N3.unbind(1)
    cos, sin = angle_N.cos().to(x.dtype), angle_N.sin().to(x.dtype)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], 1)


def seed_vectors(pulses: Pulses, doms: Doms, xyz_D3: Tensor, *, slots: int, empty: Literal["marker", "zero"]) -> Tensor:
    """The seed's input per DOM, (D, 4 + 3 slots): [x, y, z, n', t1', q1', a1', ..., tK', qK', aK'].

    x, y, z are xyz_D3 (m) / 500, n' = log1p(pulses) / 3 - 1; pulse k of the DOM gives
    t' = (t - 1e4 ns) / 3e4, q' = log10(max(q, 1e-6)) / 3, a' = auxiliary - 0.5; `empty` fills the slots of
    DOMs with fewer pulses. Later pulses are left out. Source: the seed, flat transformer v2.
    """
    n_doms, order_P = doms.n_doms, doms.order_P
    # Pulses beyond the last slot are written to one spare row: shapes must not depend on the data.
    spare = n_doms * slots
    row_P = torch.where(doms.slot_P < slots, doms.dom_of_pulse_P * slots + doms.slot_P, spare)
    # In float64, because a float32 nanosecond is exact only up to 16.8 ms.
    time_P = ((pulses.time_P.index_select(0, order_P).to(torch.float64) - 1e4) / 3e4).to(torch.float32)
    charge_P = pulses.charge_P.index_select(0, order_P).clamp(min=1e-6).log10() / 3
    auxiliary_P = pulses.auxiliary_P.index_select(0, order_P).to(torch.float32) - 0.5
    slots_R3 = xyz_D3.new_empty(spare + 1, 3)
    for column, value in enumerate(EMPTY_SLOT[empty]):
        slots_R3[:, column] = value
    slots_R3.index_copy_(0, row_P, torch.stack([time_P, charge_P, auxiliary_P], 1))
    n_D1 = torch.log1p(doms.count_D.to(torch.float32))[:, None] / 3 - 1
    return torch.cat([xyz_D3 / 500, n_D1, slots_R3[:spare].view(n_doms, 3 * slots)], 1)


def dom_summary(pulses: Pulses, doms: Doms, xyz_D3: Tensor, *, scattering_D: Tensor, efficiency_D: Tensor) -> Tensor:
    """(D, len(SUMMARY_FEATURES)) float32: what each DOM saw, relative to its event.

    Charges count in steps of 0.025 p.e. (the grid of the real files): with integers the sums are exact, so
    that an event has the same features alone and in any batch, on any device.

    Args:
        xyz_D3: positions (m) of the hit DOMs, rotated or not.
        scattering_D: effective scattering lengths (m) at the DOMs.
        efficiency_D: relative quantum efficiencies of the DOMs.
    """
    hlc_P = ~pulses.auxiliary_P
    charge_P = pulses.charge_steps_P()
    event_P = pulses.event_of_pulse_P()
    first_E, ends_E = pulses.offsets_E1[:-1], pulses.offsets_E1[1:]
    no_hlc_E = segment_sums(hlc_P, first_E, ends_E) == 0
    weight_P = charge_P * (hlc_P | no_hlc_E.index_select(0, event_P))
    running_P = weight_P.cumsum(0)
    upto_E = running_P.index_select(0, ends_E - 1)
    weight_E = upto_E - running_P.index_select(0, first_E) + weight_P.index_select(0, first_E)
    # Pulses are in time order: the weighted median is the first whose running weight reaches half the total.
    below_P = running_P < (upto_E - torch.div(weight_E, 2, rounding_mode="floor")).index_select(0, event_P)
    reference_E = pulses.time_P.index_select(0, first_E + segment_sums(below_P, first_E, ends_E)).to(torch.int64)

    order_P, event_D, first_D = doms.order_P, doms.event_D, doms.start_D
    ends_D = first_D + doms.count_D
    time_P = pulses.time_P.index_select(0, order_P).to(torch.int64)
    charge_P, hlc_P = charge_P.index_select(0, order_P), hlc_P.index_select(0, order_P)
    charge_D, hlc_D = segment_sums(charge_P, first_D, ends_D), segment_sums(hlc_P, first_D, ends_D)
    seen_P = hlc_P.cumsum(0)
    unseen_D = seen_P.index_select(0, first_D) - hlc_P.index_select(0, first_D).to(torch.int64)
    leading_D = segment_sums(seen_P == unseen_D.index_select(0, doms.dom_of_pulse_P), first_D, ends_D)
    first_hlc_D = first_D + torch.where(hlc_D > 0, leading_D, 0)
    time_D = time_P.index_select(0, first_D)
    # The limit of 1 ms keeps the sums of squares within int64.
    late_P = (time_P - time_D.index_select(0, doms.dom_of_pulse_P)).clamp(max=1 << 20)
    moment_P = charge_P * late_P
    mean_D = segment_sums(moment_P, first_D, ends_D) / charge_D.to(torch.float64)
    square_D = segment_sums(moment_P * late_P, first_D, ends_D) / charge_D.to(torch.float64)
    spread_D = (square_D - mean_D**2).clamp(min=0).sqrt()

    bright_D = segment_sums(weight_P.index_select(0, order_P), first_D, ends_D).to(torch.float64).sqrt()
    moment_D4 = torch.cat([xyz_D3 * bright_D[:, None], bright_D[:, None]], 1)
    moment_E4 = moment_D4.new_zeros(pulses.n_events, 4).index_add_(0, event_D, moment_D4)
    centre_E3 = (moment_E4[:, :3] / moment_E4[:, 3:]).to(torch.float32)

    per_ns = LIGHT_SPEED / 200
    reference_D = reference_E.index_select(0, event_D)
    hlc_time_D = ((time_P.index_select(0, first_hlc_D) - reference_D) * per_ns).clamp(-25, 25)
    centred_D3 = xyz_D3 - centre_E3.index_select(0, event_D)
    columns = {
        **dict(zip("xyz", (xyz_D3 / 500).unbind(1), strict=True)),
        **dict(zip(("dx", "dy", "dz"), (centred_D3 / 200).unbind(1), strict=True)),
        "first_time": ((time_D - reference_D) * per_ns).clamp(-25, 25),
        "hlc_time": hlc_time_D,
        "near_time": 2 * torch.tanh(hlc_time_D / 2),
        "delay": torch.log1p(mean_D / 50) / 3,
        "spread": torch.log1p(spread_D / 50) / 3,
        "charge": torch.log10(charge_D / 40),
        "first_charge": torch.log10(charge_P.index_select(0, first_D) / 40),
        "pulses": torch.log1p(doms.count_D.to(torch.float32)) - math.log(2),
        "hlc": hlc_D / doms.count_D,
        "efficiency": (efficiency_D - 1) / 0.35,
        "scattering": torch.log(scattering_D / 30),
        "event_charge": (torch.log10(weight_E / 40) / 2 - 1).index_select(0, event_D),
        "event_doms": (torch.log(doms.offsets_E1.diff()) / 2 - 2).index_select(0, event_D),
    }
    return torch.stack([columns[name].to(torch.float32) for name in SUMMARY_FEATURES], 1)


def dom_features(pulses: Pulses, doms: Doms, xyz_D3: Tensor, config: ModelConfig, tables: Tables) -> Tensor:
    """(D, feature_width(config)) float32: the configured vectors of the hit DOMs, those of v3's options last.

    xyz_D3: positions (m) of the hit DOMs, rotated or not.
    """
    scattering_D, absorption_D, efficiency_D = (
        table_S.index_select(0, doms.sensor_D)
        for table_S in (tables.scattering_S, tables.absorption_S, tables.efficiency_S)
    )
    parts = []
    if config.features == "seed":
        parts.append(seed_vectors(pulses, doms, xyz_D3, slots=config.slots, empty=config.empty))
    if config.features == "summary" or config.aggregates:
        summary_DF = dom_summary(pulses, doms, xyz_D3, scattering_D=scattering_D, efficiency_D=efficiency_D)
        if config.aggregates:  # not by a list of columns, which would wait for the device
            summary_DF = torch.stack([summary_DF[:, i] for i in AGGREGATES], 1)
        parts.append(summary_DF)
    if config.ice:
        parts.append(ice_features(scattering_D, absorption_D, efficiency_D))
    if config.fourier:
        first_D = doms.order_P.index_select(0, doms.start_D)
        time_D, charge_D = (x.index_select(0, first_D) for x in (pulses.time_P, pulses.charge_P))
        parts.append(fourier_features(xyz_D3, time_D, charge_D, config.fourier))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
