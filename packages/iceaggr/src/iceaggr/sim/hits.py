"""A hit as one int64: event, sensor, time, charge and origin in bit fields, so that sorting needs no payload.

From the top: 14 bits event in block, 13 sensor, 17 time (ns + 40 us), 17 charge (0.025 p.e.), 1 signal.
Sorting orders hits by event, DOM and time. Suffixes: H hits of any origin, P pulses.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_EVENTS = 1 << 14
"""Proposals that fit in one block."""
TIME_BITS = 17
TIME_OFFSET = 40_000
"""ns; physics times from -40 to +91 us fit."""
CHARGE_STEPS = 40
"""Charge steps per photo-electron: the Kaggle grid of 0.025 p.e."""
_LATEST = (1 << TIME_BITS) - 1
_MOST_CHARGE = (1 << 17) - 1
_SCAN_ROW = 512


def pack(event_H: Tensor, sensor_H: Tensor, time_H: Tensor, charge_H: Tensor, signal_H: Tensor) -> Tensor:
    """Hits as int64. Times (ns) and charges (p.e.) are rounded to their grids and clamped to what fits."""
    time = (time_H.round().long() + TIME_OFFSET).clamp(0, _LATEST)
    steps = (charge_H * CHARGE_STEPS).round().long().clamp(1, _MOST_CHARGE)
    return join(dom_of(event_H, sensor_H), time, steps, signal_H)


def join(dom_H: Tensor, time_H: Tensor, steps_H: Tensor, signal_H: Tensor) -> Tensor:
    """`pack` from integers: dom as from `dom_of`, time with its offset, charge in steps."""
    return (((dom_H << TIME_BITS) | time_H) << 18) | (steps_H << 1) | signal_H.long()


def dom_of(event_H: Tensor, sensor_H: Tensor) -> Tensor:
    """Event and sensor in one integer, the order of the sort."""
    return (event_H << 13) | sensor_H


def dom(hits_H: Tensor) -> Tensor:
    return hits_H >> 35


def event(hits_H: Tensor) -> Tensor:
    return hits_H >> 48


def sensor(hits_H: Tensor) -> Tensor:
    return (hits_H >> 35) & 8191


def time(hits_H: Tensor) -> Tensor:
    """ns + TIME_OFFSET."""
    return (hits_H >> 18) & _LATEST


def steps(hits_H: Tensor) -> Tensor:
    return (hits_H >> 1) & _MOST_CHARGE


def is_signal(hits_H: Tensor) -> Tensor:
    return (hits_H & 1).bool()


def sort_int64(keys: Tensor) -> Tensor:
    """Ascending sort. On CPU NumPy's vectorised sort, which takes a tenth of torch's time for int64 keys."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(keys.numpy()))
    return torch.sort(keys).values


def search(ascending: Tensor, wanted: Tensor) -> Tensor:
    """torch.searchsorted; on CPU NumPy, which is three times as fast for `wanted` in order."""
    if ascending.device.type == "cpu":
        return torch.from_numpy(np.searchsorted(ascending.numpy(), wanted.numpy()))
    return torch.searchsorted(ascending, wanted)


def running_max(x_N: Tensor) -> Tensor:
    """Largest value so far, of an int64 vector.

    torch's cummax gives one row to one thread block, which took three quarters of a GPU block's time; two levels of
    short rows take it from every multiprocessor.
    """
    if x_N.device.type == "cpu":
        return torch.from_numpy(np.maximum.accumulate(x_N.numpy()))
    n = x_N.numel()
    if n <= _SCAN_ROW:
        return x_N.cummax(0).values if n else x_N
    padded = torch.nn.functional.pad(x_N, (0, -n % _SCAN_ROW))  # at the end, where it reaches no other row
    rows_RW = padded.view(-1, _SCAN_ROW).cummax(1).values
    rows_RW[1:] = torch.maximum(rows_RW[1:], running_max(rows_RW[:-1, -1].contiguous())[:, None])
    return rows_RW.view(-1)[:n]


def segment_start(first_P: Tensor) -> Tensor:
    """For each row the index of the last row at or before it where first_P is True (the first row must be)."""
    index = torch.arange(first_P.numel(), device=first_P.device)
    return running_max(torch.where(first_P, index, 0))


def starts(key_P: Tensor) -> Tensor:
    """True where a sorted key differs from the one before."""
    first = torch.ones_like(key_P, dtype=torch.bool)
    first[1:] = key_P[1:] != key_P[:-1]
    return first
