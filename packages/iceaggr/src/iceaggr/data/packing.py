"""How the event store lays out pulses: 6 bytes each, and a table for those that do not fit.

A pulse is a uint32 word, sensor_id (13 bits) | auxiliary (1 bit) | time in ns (18 bits), and a uint16 charge
in steps of 0.025 p.e. A pulse with a time outside 0..262,143 ns, or a charge that is off the grid or above
1,638.35 p.e., has charge code 65,535 and its full values in the escape table, so that unpacking gives back
exactly what was packed. Charges are float32, as the values in Kaggle's files are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iceaggr.data.grouping import doms_per_event
from iceaggr.data.pulses import Pulses

ESCAPED = 65_535
"""Charge code of pulses in the escape table."""

_TIME_MASK, _AUXILIARY_BIT, _SENSOR_SHIFT, _SENSOR_MASK = (1 << 18) - 1, 1 << 18, 19, 0x1FFF
_STEPS = np.float32(40)  # per photo-electron


@dataclass(frozen=True)
class PackedPulses:
    """A batch of events as it is stored: 6 bytes per pulse, which is what crosses the bus to a GPU."""

    word_P: Tensor  # int32, the bits of the uint32
    charge_P: Tensor  # int16, the bits of the uint16
    escape_X: Tensor  # int64 positions in the batch of the escaped pulses
    escape_time_X: Tensor  # int64 ns
    escape_charge_X: Tensor  # float32 p.e.
    offsets_E1: Tensor  # int64
    event_id_E: Tensor  # int64
    azimuth_E: Tensor | None  # float64 rad
    zenith_E: Tensor | None  # float64 rad
    wide_times: bool  # times are int64, because some time of the store needs it

    def to(self, device: torch.device | str) -> PackedPulses:
        """Copies to a device; to a GPU from page-locked memory without waiting for the copies."""
        device = torch.device(device)
        moved: dict[str, Any] = {
            f.name: x.to(device, non_blocking=device.type == "cuda")
            for f in fields(self)
            if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def unpack(self) -> Pulses:
        """The pulses, on the same device, without host synchronisation."""
        unpack_bits = _unpack_on_cpu if self.word_P.device.type == "cpu" else _unpack_by_torch
        sensor_P, auxiliary_P, time_P, charge_P = unpack_bits(self.word_P, self.charge_P)
        if self.wide_times:
            time_P = time_P.to(torch.int64)
        if self.escape_X.numel():
            time_P.index_copy_(0, self.escape_X, self.escape_time_X.to(time_P.dtype))
            charge_P.index_copy_(0, self.escape_X, self.escape_charge_X)
        return Pulses(
            event_id_E=self.event_id_E,
            offsets_E1=self.offsets_E1,
            sensor_P=sensor_P,
            time_P=time_P,
            charge_P=charge_P,
            auxiliary_P=auxiliary_P,
            azimuth_E=self.azimuth_E,
            zenith_E=self.zenith_E,
        )


def pack(pulses: Pulses) -> dict[str, np.ndarray]:
    """The store's arrays (see `iceaggr.data.storefiles.ARRAYS`) of these events, which are on the CPU."""
    sensor_P, time_P = pulses.sensor_P.numpy(), pulses.time_P.numpy()
    charge_P, auxiliary_P = pulses.charge_P.numpy(), pulses.auxiliary_P.numpy()
    steps_P = np.rint(charge_P * _STEPS)
    fits_P = (steps_P / _STEPS == charge_P) & (steps_P < ESCAPED) & (time_P >= 0) & (time_P <= _TIME_MASK)
    escape_X = np.flatnonzero(~fits_P)
    word_P = sensor_P.astype(np.uint32) << np.uint32(_SENSOR_SHIFT)
    word_P |= auxiliary_P.astype(np.uint32) << np.uint32(18)
    word_P |= (time_P & _TIME_MASK).astype(np.uint32)
    arrays = {
        "word": word_P,
        "charge": np.where(fits_P, steps_P, ESCAPED).astype(np.uint16),
        "escape_index": escape_X,
        "escape_time": time_P[escape_X].astype(np.int64),
        "escape_charge": charge_P[escape_X],
        "end": pulses.offsets_E1[1:].numpy(),
        "event_id": pulses.event_id_E.numpy(),
        "n_doms": doms_per_event(pulses),
    }
    if pulses.azimuth_E is not None and pulses.zenith_E is not None:
        arrays |= {"azimuth": pulses.azimuth_E.numpy(), "zenith": pulses.zenith_E.numpy()}
    return arrays


def _unpack_on_cpu(word_P: Tensor, charge_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sensor, auxiliary, time, charge; numpy does this in under half of torch's time."""
    bits_P = word_P.numpy().view(np.uint32)
    sensor_P = bits_P >> np.uint32(_SENSOR_SHIFT)
    auxiliary_P = (bits_P & np.uint32(_AUXILIARY_BIT)).astype(bool)
    time_P = bits_P & np.uint32(_TIME_MASK)
    # A true division, because a product with 0.025 differs in the last bit for some charges.
    full_P = np.divide(charge_P.numpy().view(np.uint16), _STEPS, dtype=np.float32)
    return (
        torch.from_numpy(sensor_P.view(np.int32)),
        torch.from_numpy(auxiliary_P),
        torch.from_numpy(time_P.view(np.int32)),
        torch.from_numpy(full_P),
    )


def _unpack_by_torch(word_P: Tensor, charge_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = _charge_table(charge_P.device)
    return (
        (word_P >> _SENSOR_SHIFT) & _SENSOR_MASK,
        (word_P & _AUXILIARY_BIT) != 0,
        word_P & _TIME_MASK,
        table.index_select(0, charge_P.to(torch.int32) & 0xFFFF),
    )


@lru_cache
def _charge_table(device: torch.device) -> Tensor:
    """Charges of all codes: CUDA divides by multiplying with the reciprocal, which differs in the last
    bit.
    """
    return torch.from_numpy(np.arange(ESCAPED + 1, dtype=np.float32) / _STEPS).to(device)
