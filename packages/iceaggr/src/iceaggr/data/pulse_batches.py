"""Batches for the hierarchical model: a row per pulse and a token per hit DOM, made as `TokenBatches` makes its own.

Shape suffixes: E events, P pulses, D hit DOMs, R rows of pulses, B mini-batches of rows, K segments.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iceaggr.config import ModelConfig
from iceaggr.data.batches import Gathered, TokenBatches, checked_tokens, near
from iceaggr.data.cache import EventCache
from iceaggr.data.features import LIGHT_SPEED, Tables, rotate_z
from iceaggr.data.grouping import Doms, group_doms
from iceaggr.data.order import Position, default_capacity
from iceaggr.data.prefetch import default_depth, handed_over, on_device, prefetched, with_index
from iceaggr.data.pulses import Pulses
from iceaggr.data.rows import SEQUENCE, attended_bound, count_attended, lay_out, plan_rows
from iceaggr.data.tokens import targets, tokens_per_event

PULSE_FEATURES = ("time", "charge", "auxiliary", "near_time")
"""The seed's t', q' and a' of a pulse (`iceaggr.data.features.seed_vectors`). The seed does not say what its fourth is;
here it is 2 tanh(u / 2) with u = c (t - 1e4 ns) / 200 m, light travel from about the trigger time: 100 ns move it by
0.15 there, and t' by 0.003."""


@dataclass(frozen=True)
class PulseBatch:
    """One optimisation step's pulses and DOMs. With fixed capacities there are more rows, DOMs and events than used.

    Unused rows belong to DOM D and unused DOMs to event E, behind the last; unused events have offsets_E1 equal to
    the last used DOM and valid_E False.
    """

    features_RF: Tensor  # float32 PULSE_FEATURES
    dom_R: Tensor  # int64
    offsets_BK: Tensor  # int32, segments of the rows for attention (`iceaggr.data.rows`)
    batch_rows: int  # rows of one mini-batch, C
    xyz_D3: Tensor  # float32, m / 500
    count_D: Tensor  # float32 pulses of each DOM; 1 where unused
    event_D: Tensor  # int64
    offsets_E1: Tensor  # int32 DOM offsets
    valid_E: Tensor  # bool
    target_E3: Tensor | None  # float32 unit vectors pointing to where the neutrino came from
    n_events: int  # used events
    n_tokens: int  # used DOMs
    n_pulses: int  # used rows
    index_E: np.ndarray  # positions of the events in the cache, int64, host memory, length n_events


@dataclass(frozen=True)
class Capacity:
    """Most of each that a batch may have."""

    events: int
    tokens: int
    """DOMs, and one more per event, as the flat models count."""
    pulses: int
    attended: int
    """Pulses in DOMs with two or more, by `attended_bound`."""

    @classmethod
    def of(cls, cache: EventCache, index_E: np.ndarray, config: ModelConfig, token_budget: int) -> Capacity:
        """For batches of these events: a twentieth more pulses per DOM than average, and room for the largest event."""
        tokens_E = tokens_per_event(cache.n_doms[index_E], config.dom_cap)
        sizes = [cache.n_pulses_E[index_E], attended_bound(cache.n_pulses_E[index_E], cache.n_doms[index_E])]
        token_budget = min(token_budget, int(tokens_E.sum()))
        share = 1.05 * token_budget / max(1, int(tokens_E.sum()))
        # Whole sequences, so that attention's blocks are full.
        pulses, attended = (
            SEQUENCE * math.ceil(max(int(n_E.max(initial=1)), share * int(n_E.sum())) / SEQUENCE) for n_E in sizes
        )
        return cls(default_capacity(tokens_E, token_budget), token_budget, pulses, min(attended, pulses))

    def cuts(self, cache: EventCache, index_E: np.ndarray) -> list[int]:
        """Where to cut a row of events into batches: as many as fit, again and again. Begins with 0."""
        n_pulses_E, n_doms_E = cache.n_pulses_E[index_E], cache.n_doms[index_E]
        sizes = (tokens_per_event(n_doms_E, None), n_pulses_E, attended_bound(n_pulses_E, n_doms_E))
        running = [(n_E.cumsum(), budget) for n_E, budget in zip(sizes, self._budgets, strict=True)]
        cuts = [0]
        while (at := cuts[-1]) < len(index_E):
            stops = [
                np.searchsorted(ends_E, (ends_E[at - 1] if at else 0) + budget, side="right")
                for ends_E, budget in running
            ]
            cuts.append(min(at + self.events, *map(int, stops)))
        return cuts

    @property
    def _budgets(self) -> tuple[int, int, int]:
        return self.tokens, self.pulses, self.attended


def pulse_features(pulses: Pulses, doms: Doms) -> Tensor:
    """(P, 4) float32 `PULSE_FEATURES` in grouped order."""
    # In float64, because a float32 nanosecond is exact only up to 16.8 ms.
    late_P = pulses.time_P.index_select(0, doms.order_P).to(torch.float64) - 1e4
    charge_P = pulses.charge_P.index_select(0, doms.order_P).clamp(min=1e-6).log10() / 3
    auxiliary_P = pulses.auxiliary_P.index_select(0, doms.order_P).to(torch.float32) - 0.5
    near_P = 2 * torch.tanh(late_P * (LIGHT_SPEED / 400))
    return torch.stack([(late_P / 3e4).to(torch.float32), charge_P, auxiliary_P, near_P.to(torch.float32)], 1)


def build_pulse_batch(
    pulses: Pulses,
    config: ModelConfig,
    tables: Tables,
    *,
    n_doms_E: np.ndarray | None = None,
    capacity: Capacity | None = None,
    rotation_E: Tensor | None = None,
    index_E: np.ndarray | None = None,
) -> PulseBatch:
    """Rows and DOMs of these events, on the pulses' device.

    Args:
        n_doms_E: hit DOMs of each event in host memory, as the event store knows them; without it the device is asked.
        capacity: gives every batch the shapes of a full one; without it the device is asked for the exact ones.
        rotation_E: angle (rad) by which each event and its target are rotated about the vertical axis.
        index_E: positions of the events in the store; default 0, 1, ...

    Raises:
        ValueError: the events exceed the capacity.
    """
    n_events, n_pulses, device = pulses.n_events, pulses.n_pulses, pulses.device
    doms = group_doms(pulses, n_doms=None if n_doms_E is None else int(n_doms_E.sum()))
    n_doms = doms.n_doms
    if capacity is None:
        plan = plan_rows(n_pulses, count_attended(doms), config.max_batch_size)
        capacity_D, capacity_E = n_doms, n_events
    else:
        if n_events > capacity.events or n_doms > capacity.tokens or n_pulses > capacity.pulses:
            raise ValueError(f"{n_events} events, {n_doms} DOMs and {n_pulses} pulses exceed {capacity}")
        plan = plan_rows(capacity.pulses, capacity.attended, config.max_batch_size)
        capacity_D, capacity_E = capacity.tokens, capacity.events
    row_P, offsets_BK = lay_out(doms, plan)
    features_PF = pulse_features(pulses, doms)
    features_RF = features_PF.new_zeros(plan.rows, features_PF.shape[1]).index_copy_(0, row_P, features_PF)
    dom_R = torch.full((plan.rows,), capacity_D, device=device).index_copy_(0, row_P, doms.dom_of_pulse_P)
    place_D3 = tables.xyz_S3.index_select(0, doms.sensor_D) / 500
    if rotation_E is not None:
        place_D3 = rotate_z(place_D3, rotation_E.index_select(0, doms.event_D))
    xyz_D3 = place_D3.new_zeros(capacity_D, 3)
    xyz_D3[:n_doms] = place_D3
    count_D = place_D3.new_ones(capacity_D)
    count_D[:n_doms] = doms.count_D.to(torch.float32)
    event_D = torch.full((capacity_D,), capacity_E, device=device)
    event_D[:n_doms] = doms.event_D
    ends_E = doms.offsets_E1[-1:].expand(capacity_E - n_events)
    return PulseBatch(
        features_RF=features_RF,
        dom_R=dom_R,
        offsets_BK=offsets_BK,
        batch_rows=plan.batch_rows,
        xyz_D3=xyz_D3,
        count_D=count_D,
        event_D=event_D,
        offsets_E1=torch.cat([doms.offsets_E1, ends_E]).to(torch.int32),
        valid_E=torch.arange(capacity_E, device=device) < n_events,
        target_E3=targets(pulses, rotation_E, capacity_E),
        n_events=n_events,
        n_tokens=n_doms,
        n_pulses=n_pulses,
        index_E=np.arange(n_events) if index_E is None else index_E,
    )


class PulseBatches(TokenBatches):
    """The training stream of `TokenBatches` as PulseBatch: the same order of events, cut where the next event would
    exceed any part of the `Capacity` that follows from token_budget and the events.
    """

    @cached_property
    def capacity(self) -> Capacity:
        return Capacity.of(self.cache, self.events, self.config, self.token_budget)

    @cached_property
    def _identity(self) -> dict[str, int | str]:
        return super()._identity | {"pulses": self.capacity.pulses, "attended": self.capacity.attended}

    def _cuts(self, index_E: np.ndarray) -> list[int]:
        return self.capacity.cuts(self.cache, index_E)

    def _batch(self, gathered: Gathered, rotation_E: np.ndarray | None) -> Any:
        return _pulse_batch(
            gathered,
            self.cache,
            self.config,
            self.tables,
            self.device,
            self.capacity if self.static else None,
            rotation_E,
        )


def one_pass_of_pulses(
    cache: EventCache,
    events: np.ndarray,
    config: ModelConfig,
    tables: Tables,
    *,
    token_budget: int,
    static: bool = False,
    prefetch: int | None = None,
    angle: float = 0.0,
) -> Generator[PulseBatch, None, None]:
    """Every event exactly once; `index_E` of a batch says which they are. See `iceaggr.data.batches.one_pass`.

    Raises:
        BatchError: an event has more tokens than the budget.
    """
    device = with_index(tables.device)
    cache, events = near(cache, device), np.asarray(events, dtype=np.int64)
    tokens_E = checked_tokens(cache, events, config, token_budget)
    if not static:  # longest first, so that events of a batch are of similar length
        events = events[np.argsort(-tokens_E, kind="stable")]
    capacity = Capacity.of(cache, events, config, token_budget)
    pin = device.type == "cuda" and cache.device.type == "cpu"

    def build() -> Generator[PulseBatch, None, None]:
        for number, (a, b) in enumerate(pairwise(capacity.cuts(cache, events))):
            gathered = Gathered(events[a:b], cache.gather_packed(events[a:b], pin=pin), number, Position())
            rotation_E = np.full(b - a, angle, dtype=np.float32) if angle else None
            yield _pulse_batch(gathered, cache, config, tables, device, capacity if static else None, rotation_E)

    source = prefetched(build(), depth=default_depth(device) if prefetch is None else prefetch, device=device)
    try:
        yield from map(handed_over, source)
    finally:
        source.close()


def _pulse_batch(
    gathered: Gathered,
    cache: EventCache,
    config: ModelConfig,
    tables: Tables,
    device: torch.device,
    capacity: Capacity | None,
    rotation_E: np.ndarray | None,
) -> PulseBatch:
    return build_pulse_batch(
        gathered.packed.to(device).unpack(),
        config,
        tables,
        n_doms_E=cache.n_doms[gathered.index_E],
        capacity=capacity,
        rotation_E=on_device(rotation_E, device),
        index_E=gathered.index_E,
    )
