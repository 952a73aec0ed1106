"""Features of DOMs, the seed's vectors or summaries relative to the event, and token batches made of them.

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
from iceaggr.data.grouping import Doms, group_doms
from iceaggr.data.pulses import Pulses, TokenBatch
from iceaggr.directions import angles_to_vector
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
    charge_P = _charge_steps(pulses)
    event_P = pulses.event_of_pulse_P()
    first_E, ends_E = pulses.offsets_E1[:-1], pulses.offsets_E1[1:]
    no_hlc_E = _sums(hlc_P, first_E, ends_E) == 0
    weight_P = charge_P * (hlc_P | no_hlc_E.index_select(0, event_P))
    running_P = weight_P.cumsum(0)
    upto_E = running_P.index_select(0, ends_E - 1)
    weight_E = upto_E - running_P.index_select(0, first_E) + weight_P.index_select(0, first_E)
    # Pulses are in time order: the weighted median is the first whose running weight reaches half the total.
    below_P = running_P < (upto_E - torch.div(weight_E, 2, rounding_mode="floor")).index_select(0, event_P)
    reference_E = pulses.time_P.index_select(0, first_E + _sums(below_P, first_E, ends_E)).to(torch.int64)

    order_P, event_D, first_D = doms.order_P, doms.event_D, doms.start_D
    ends_D = first_D + doms.count_D
    time_P = pulses.time_P.index_select(0, order_P).to(torch.int64)
    charge_P, hlc_P = charge_P.index_select(0, order_P), hlc_P.index_select(0, order_P)
    charge_D, hlc_D = _sums(charge_P, first_D, ends_D), _sums(hlc_P, first_D, ends_D)
    seen_P = hlc_P.cumsum(0)
    unseen_D = seen_P.index_select(0, first_D) - hlc_P.index_select(0, first_D).to(torch.int64)
    leading_D = _sums(seen_P == unseen_D.index_select(0, doms.dom_of_pulse_P), first_D, ends_D)
    first_hlc_D = first_D + torch.where(hlc_D > 0, leading_D, 0)
    time_D = time_P.index_select(0, first_D)
    # The limit of 1 ms keeps the sums of squares within int64.
    late_P = (time_P - time_D.index_select(0, doms.dom_of_pulse_P)).clamp(max=1 << 20)
    moment_P = charge_P * late_P
    mean_D = _sums(moment_P, first_D, ends_D) / charge_D.to(torch.float64)
    square_D = _sums(moment_P * late_P, first_D, ends_D) / charge_D.to(torch.float64)
    spread_D = (square_D - mean_D**2).clamp(min=0).sqrt()

    bright_D = _sums(weight_P.index_select(0, order_P), first_D, ends_D).to(torch.float64).sqrt()
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


def select_doms(pulses: Pulses, doms: Doms, how: Literal["earliest", "hlc"]) -> Tensor:
    """(D,) int64 rank of each DOM in its event: a cap of n DOMs keeps the ranks below n.

    earliest: by the time of the first pulse, the seed's choice. hlc: DOMs with an HLC pulse before those
    without, and the brighter before the dimmer. Equals keep the order of sensor_id.
    """
    if how == "earliest":
        first_P = doms.order_P.index_select(0, doms.start_D)
        start_E = pulses.time_P.index_select(0, pulses.offsets_E1[:-1]).to(torch.int64)
        priority_D = pulses.time_P.index_select(0, first_P) - start_E.index_select(0, doms.event_D)
    else:
        ends_D = doms.start_D + doms.count_D
        charge_D = _sums(_charge_steps(pulses).index_select(0, doms.order_P), doms.start_D, ends_D)
        dark_D = _sums(~pulses.auxiliary_P.index_select(0, doms.order_P), doms.start_D, ends_D) == 0
        priority_D = (dark_D.to(torch.int64) << 32) + ((1 << 32) - 1 - charge_D).clamp(min=0)
    key_D = (doms.event_D << 34) + priority_D.clamp(max=(1 << 34) - 1)
    order_D = torch.sort(key_D, stable=True).indices
    # Events keep their places, so the place in the event is the same before and after sorting.
    start_D = doms.offsets_E1.index_select(0, doms.event_D)
    place_D = torch.arange(doms.n_doms, device=key_D.device) - start_D
    return torch.empty_like(place_D).index_copy_(0, order_D, place_D)


def build_tokens(
    pulses: Pulses,
    config: ModelConfig,
    tables: Tables,
    *,
    n_doms_E: np.ndarray | None = None,
    token_capacity: int | None = None,
    event_capacity: int | None = None,
    rotation_E: Tensor | None = None,
    index_E: np.ndarray | None = None,
) -> TokenBatch:
    """A CLS row and the rows of the (selected) hit DOMs for every event, on the pulses' device.

    Args:
        n_doms_E: hit DOMs of each event before any cap, in host memory, as the event store knows them;
            without it the device is asked, the only host synchronisation here.
        token_capacity: rows of features_TF; default what is used.
        event_capacity: length of the per-event tensors; default what is used.
        rotation_E: angle (rad) by which each event and its target are rotated about the vertical axis.
        index_E: positions of the events in the store; default 0, 1, ...

    Raises:
        ValueError: the events have more tokens, or are more, than the capacity.
    """
    n_events, device, cap = pulses.n_events, pulses.device, config.dom_cap
    doms = group_doms(pulses, n_doms=None if n_doms_E is None else int(n_doms_E.sum()))
    if n_doms_E is None:
        n_doms_E = doms.offsets_E1.diff().cpu().numpy()
    n_tokens = int(tokens_per_event(n_doms_E, cap).sum())
    capacity_T, capacity_E = token_capacity or n_tokens, event_capacity or n_events
    if n_tokens > capacity_T or n_events > capacity_E:
        raise ValueError(
            f"{n_events} events with {n_tokens} tokens exceed the capacity of {capacity_E} events and "
            f"{capacity_T} tokens"
        )
    xyz_D3 = tables.xyz_S3.index_select(0, doms.sensor_D)
    if rotation_E is not None:
        xyz_D3 = rotate_z(xyz_D3, rotation_E.index_select(0, doms.event_D))
    features_DF = dom_features(pulses, doms, xyz_D3, config, tables)
    doms_E = doms.offsets_E1.diff()
    if cap is None:
        rank_D = torch.arange(doms.n_doms, device=device) - doms.offsets_E1.index_select(0, doms.event_D)
    else:
        rank_D = select_doms(pulses, doms, config.dom_select)
        doms_E = doms_E.clamp(max=cap)
    ends_E = (doms_E + 1).cumsum(0)
    offsets_E1 = torch.cat([ends_E.new_zeros(1), ends_E, ends_E[-1:].expand(capacity_E - n_events)])
    row_D = offsets_E1.index_select(0, doms.event_D) + 1 + rank_D
    if cap is not None:  # DOMs beyond the cap go to a spare row that is cut off
        row_D = torch.where(rank_D < cap, row_D, capacity_T)
    features_TF = features_DF.new_zeros(capacity_T + 1, features_DF.shape[1])
    features_TF.index_copy_(0, row_D, features_DF)
    cls_E = offsets_E1.new_full((capacity_E,), capacity_T - 1)
    cls_E[:n_events] = offsets_E1[:n_events]
    return TokenBatch(
        features_TF=features_TF[:capacity_T],
        offsets_E1=offsets_E1.to(torch.int32),
        cls_E=cls_E,
        valid_E=torch.arange(capacity_E, device=device) < n_events,
        target_E3=targets(pulses, rotation_E, capacity_E),
        n_events=n_events,
        n_tokens=n_tokens,
        index_E=np.arange(n_events) if index_E is None else index_E,
    )


def targets(pulses: Pulses, rotation_E: Tensor | None, capacity_E: int) -> Tensor | None:
    """(capacity_E, 3) float32 unit vectors to where the (rotated) neutrinos came from; None without labels."""
    if pulses.azimuth_E is None or pulses.zenith_E is None:
        return None
    came_from_E3 = angles_to_vector(pulses.azimuth_E, pulses.zenith_E)
    if rotation_E is not None:
        came_from_E3 = rotate_z(came_from_E3, rotation_E)
    target_E3 = torch.zeros(capacity_E, 3, device=pulses.device)
    target_E3[:, 2] = 1  # unused events get a unit vector too, so that no loss meets a zero
    target_E3[: pulses.n_events] = came_from_E3.to(torch.float32)
    return target_E3


def tokens_per_event(n_doms_E: np.ndarray, dom_cap: int | None) -> np.ndarray:
    """(E,) int64 tokens of each event: one CLS token and its DOMs, up to the cap."""
    doms_E = n_doms_E.astype(np.int64)
    return (doms_E if dom_cap is None else np.minimum(doms_E, dom_cap)) + 1


def _charge_steps(pulses: Pulses) -> Tensor:
    """Charges as int64 multiples of 0.025 p.e., at least 1."""
    return (pulses.charge_P.to(torch.float64) * 40).round().clamp(min=1).to(torch.int64)


def _sums(x_P: Tensor, first_N: Tensor, ends_N: Tensor) -> Tensor:
    """Exact int64 sums of integers (or booleans) over the non-empty segments first_N to ends_N, exclusive."""
    running_P = x_P.cumsum(0)
    start_N = running_P.index_select(0, first_N) - x_P.index_select(0, first_N).to(torch.int64)
    return running_P.index_select(0, ends_N - 1) - start_N
