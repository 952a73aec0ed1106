"""The two containers every stage hands to the next: pulses by event, and tokens by event.

Shape suffixes used in this package: E events, P pulses, D hit DOMs, T tokens (CLS + DOMs), F features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pulses:
    """A batch of events in CSR form: the pulses of event e are rows offsets_E1[e] to offsets_E1[e + 1].

    All tensors live on one device. Times are ns in the readout clock, charges photo-electrons. Within an
    event the pulses are in time order, as in the Kaggle files.
    """

    event_id_E: Tensor  # int64
    offsets_E1: Tensor  # int64, starts at 0, ends at P
    sensor_P: Tensor  # int32, 0..5159
    time_P: Tensor  # int32 on every path that fits; int64 where a file's times do not
    charge_P: Tensor  # float32
    auxiliary_P: Tensor  # bool
    azimuth_E: Tensor | None = None  # float64 rad, where the neutrino came from; None for unlabelled files
    zenith_E: Tensor | None = None  # float64 rad

    @property
    def n_events(self) -> int:
        return self.event_id_E.numel()

    @property
    def n_pulses(self) -> int:
        return self.sensor_P.numel()

    @property
    def device(self) -> torch.device:
        return self.sensor_P.device

    @property
    def counts_E(self) -> Tensor:
        """Pulses per event, int64."""
        return self.offsets_E1.diff()

    def event_of_pulse_P(self) -> Tensor:
        """Index (0..E-1) of the event each pulse belongs to, int64. No host sync."""
        return torch.repeat_interleave(
            torch.arange(self.n_events, device=self.device), self.counts_E, output_size=self.n_pulses
        )

    def charge_steps_P(self) -> Tensor:
        """Charges as int64 multiples of 0.025 p.e., at least 1."""
        return (self.charge_P.to(torch.float64) * 40).round().clamp(min=1).to(torch.int64)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Pulses:
        moved: dict[str, Any] = {
            f.name: None if (x := getattr(self, f.name)) is None else x.to(device, non_blocking=non_blocking)
            for f in fields(self)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class TokenBatch:
    """One optimisation step's tokens: per event a CLS row followed by one row per hit DOM.

    T and E may be larger than what is used (fixed capacities keep compiled shapes static): unused rows of
    features_TF are zero, unused events have offsets_E1 equal to the last used token, cls_E pointing at the last
    token and valid_E False.
    """

    features_TF: Tensor  # float32; CLS and unused rows are zero
    offsets_E1: Tensor  # int32 token offsets
    cls_E: Tensor  # int64 row of each event's CLS token
    valid_E: Tensor  # bool
    target_E3: Tensor | None  # float32 unit vectors pointing to where the neutrino came from
    n_events: int  # used events
    n_tokens: int  # used tokens
    index_E: np.ndarray  # positions of the events in the cache, int64, host memory, length n_events
