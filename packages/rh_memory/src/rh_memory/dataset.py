"""The spacings a configuration asks for, split, and on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rh_memory.config import TrainConfig
from rh_memory.data.controls import default_gue, shuffled
from rh_memory.data.unfold import Spacings, unfold
from rh_memory.data.windows import Part, SpacingData, Split, rows, split
from rh_memory.zeros.store import default_zeros, load

ROW = 256
"""Spacings of a row of the seed's data."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """spacings: all of them, in numpy. data: on the device. label: what they are, for tables and reports."""

    spacings: Spacings
    data: SpacingData
    split: Split
    label: str
    width: int
    """Spacings of a training window: the context and one target."""
    by_rows: bool

    def starts(self, part: Part, count: int | None = None) -> Tensor:
        """Starts of the windows of a part (int64, on the device); of `count` of them, evenly spaced, if given."""
        if self.by_rows:
            starts = rows(getattr(self.split, part), ROW)
        else:
            starts = self.split.starts(part, width=self.width)
        if count is not None and count < starts.numel():
            starts = starts[torch.linspace(0, starts.numel() - 1, count).long()]
        return starts.to(self.data.s.device)


def load_spacings(config: TrainConfig, device: torch.device) -> tuple[Spacings, str]:
    """Spacings and what they are. Zeros not computed before are computed on `device`, GUE matrices on the CPU.

    Raises UserError for a file that is missing or damaged.
    """
    data = config.data
    if data.source == "gue":
        return default_gue(data.zeros, data.seed, Path(data.folder)), f"{data.zeros:,} simulated GUE spacings"
    if data.file is not None:
        zeros, label = load(Path(data.file)), f"zeta zeros of {data.file}"
    else:
        zeros = default_zeros(data.zeros, Path(data.folder), device.type)
        label = f"the first {data.zeros:,} zeta zeros"
    spacings = unfold(zeros)
    if data.source == "shuffled":
        return shuffled(spacings, data.seed), f"shuffled spacings of {label}"
    return spacings, label


def load_dataset(config: TrainConfig, device: torch.device) -> Dataset:
    """Everything a run trains on and is scored on. Raises UserError, also for too few spacings to split."""
    spacings, label = load_spacings(config, device)
    by_rows = config.data.windows == "rows"
    width = ROW if by_rows else config.model.context + 1
    parts = split(len(spacings), config.data.split, width=config.model.context + 1, segment=spacings.segment)
    return Dataset(spacings, SpacingData(spacings, device), parts, label, width, by_rows)
