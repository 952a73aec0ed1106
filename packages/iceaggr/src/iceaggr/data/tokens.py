"""Token batches: which hit DOMs an event keeps, and the rows that they and its CLS token take.

Sort and segment operations on the pulses' device, without host synchronisation on CUDA.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from iceaggr.config import ModelConfig
from iceaggr.data.features import Tables, dom_features, rotate_z
from iceaggr.data.grouping import Doms, group_doms, segment_sums
from iceaggr.data.pulses import Pulses, TokenBatch
from iceaggr.directions import angles_to_vector


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
        charge_D = segment_sums(pulses.charge_steps_P().index_select(0, doms.order_P), doms.start_D, ends_D)
        dark_D = segment_sums(~pulses.auxiliary_P.index_select(0, doms.order_P), doms.start_D, ends_D) == 0
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
