"""Pulses grouped by the DOM that saw them: one sort and a few segment operations, no loop over events or
DOMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iceaggr.data.pulses import Pulses
from iceaggr.data.schema import N_SENSORS

# Packed CPU sort key, from the top: event, sensor (13 bits), pulse index.
_SENSOR_BITS = 13


@dataclass(frozen=True)
class Doms:
    """The hit DOMs of a batch, by event and then sensor_id. All index tensors are int64.

    The arrays with suffix P run over the pulses in grouped order: position p is pulse order_P[p] of `Pulses`.
    The pulses of DOM d are positions start_D[d] to start_D[d] + count_D[d], in time order.
    """

    event_D: Tensor  # index of the event in the batch
    sensor_D: Tensor
    start_D: Tensor
    count_D: Tensor  # pulses of the DOM, >= 1
    offsets_E1: Tensor  # DOMs of event e are offsets_E1[e] to offsets_E1[e + 1]
    order_P: Tensor
    dom_of_pulse_P: Tensor
    slot_P: Tensor  # 0 for the DOM's first pulse, then 1, ...

    @property
    def n_doms(self) -> int:
        return self.event_D.numel()


def group_doms(pulses: Pulses, *, n_doms: int | None = None) -> Doms:
    """Group the pulses of each event by DOM; pulses of one DOM keep their (time) order.

    Args:
        n_doms: hit DOMs of the whole batch, if known (the event store does). Without it the one host
            synchronisation of this function asks the device for it.

    Raises:
        ValueError: on the CPU, if n_doms is not what the pulses give.
    """
    return (_group_on_cpu if pulses.device.type == "cpu" else _group_by_torch)(pulses, n_doms)


def _group_by_torch(pulses: Pulses, n_doms: int | None) -> Doms:
    wide = pulses.n_events * N_SENSORS >= 2**31
    event_P = pulses.event_of_pulse_P()
    key_P = (event_P * N_SENSORS + pulses.sensor_P).to(torch.int64 if wide else torch.int32)
    key_P, order_P = torch.sort(key_P, stable=True)
    new_P = torch.ones_like(key_P, dtype=torch.bool)
    torch.ne(key_P[1:], key_P[:-1], out=new_P[1:])
    dom_of_pulse_P = new_P.cumsum(0) - 1
    if n_doms is None:
        n_doms = int(dom_of_pulse_P[-1]) + 1 if pulses.n_pulses else 0
    position_P = torch.arange(key_P.numel(), device=key_P.device)
    # Only a DOM's first pulse may write its start; the others write to a slot beyond the end that is cut off.
    start_D = position_P.new_zeros(n_doms + 1)
    start_D = start_D.scatter_(0, torch.where(new_P, dom_of_pulse_P, n_doms), position_P)[:n_doms]
    key_D = key_P[start_D].to(torch.int64)
    event_D = key_D // N_SENSORS
    return Doms(
        event_D=event_D,
        sensor_D=key_D - event_D * N_SENSORS,
        start_D=start_D,
        count_D=torch.diff(start_D, append=start_D.new_full((1,), key_P.numel())),
        offsets_E1=torch.searchsorted(event_D, torch.arange(pulses.n_events + 1, device=key_P.device)),
        order_P=order_P,
        dom_of_pulse_P=dom_of_pulse_P,
        slot_P=position_P - start_D[dom_of_pulse_P],
    )


def _group_on_cpu(pulses: Pulses, n_doms: int | None) -> Doms:
    """The same in numpy: its vectorised sort of plain integers is several times faster than any argsort.

    The pulse index rides in the low bits of the sort key, which also makes the sort stable.
    """
    index_bits = max(pulses.n_pulses - 1, 1).bit_length()
    if index_bits + _SENSOR_BITS + pulses.n_events.bit_length() > 63:
        raise ValueError(
            f"{pulses.n_events} events with {pulses.n_pulses} pulses are too many to group at once; use smaller batches"
        )
    key_P = np.repeat(np.arange(pulses.n_events) << _SENSOR_BITS, pulses.counts_E.numpy())
    key_P += pulses.sensor_P.numpy()
    key_P <<= index_bits
    position_P = np.arange(pulses.n_pulses)
    key_P += position_P
    key_P.sort()
    order_P = key_P & ((1 << index_bits) - 1)
    key_P >>= index_bits
    new_P = np.ones(pulses.n_pulses, bool)
    np.not_equal(key_P[1:], key_P[:-1], out=new_P[1:])
    start_D = np.flatnonzero(new_P)
    if n_doms is not None and n_doms != len(start_D):
        raise ValueError(f"n_doms is {n_doms}, but the pulses hit {len(start_D)} DOMs")
    key_D = key_P[start_D]
    event_D = key_D >> _SENSOR_BITS
    count_D = np.diff(start_D, append=pulses.n_pulses)
    position_P -= np.repeat(start_D, count_D)
    arrays = {
        "event_D": event_D,
        "sensor_D": key_D & ((1 << _SENSOR_BITS) - 1),
        "start_D": start_D,
        "count_D": count_D,
        "offsets_E1": np.searchsorted(event_D, np.arange(pulses.n_events + 1)),
        "order_P": order_P,
        "dom_of_pulse_P": np.repeat(np.arange(len(start_D)), count_D),
        "slot_P": position_P,
    }
    return Doms(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def segment_sums(x_P: Tensor, first_N: Tensor, ends_N: Tensor) -> Tensor:
    """Exact int64 sums of integers (or booleans) over the non-empty segments first_N to ends_N, exclusive."""
    running_P = x_P.cumsum(0)
    start_N = running_P.index_select(0, first_N) - x_P.index_select(0, first_N).to(torch.int64)
    return running_P.index_select(0, ends_N - 1) - start_N


def doms_per_event(pulses: Pulses) -> np.ndarray:
    """Hit DOMs of each event, (E,) uint16, of pulses on the CPU; in pieces, so that a 33M-pulse file needs
    little memory.
    """
    offsets_E1 = pulses.offsets_E1.numpy()
    n_doms_E = np.zeros(pulses.n_events, np.uint16)
    first = 0
    while first < pulses.n_events:
        last = int(np.searchsorted(offsets_E1, offsets_E1[first] + (1 << 21), side="right")) - 1
        last = min(max(last, first + 1), pulses.n_events)
        low, high = int(offsets_E1[first]), int(offsets_E1[last])
        counts_E = np.diff(offsets_E1[first : last + 1])
        key_P = np.repeat(np.arange(last - first) * N_SENSORS, counts_E) + pulses.sensor_P[low:high].numpy()
        key_P.sort()
        new_P = np.concatenate([[True], key_P[1:] != key_P[:-1]])[: high - low]
        n_doms_E[first:last] = np.bincount(key_P[new_P] // N_SENSORS, minlength=last - first)
        first = last
    return n_doms_E
