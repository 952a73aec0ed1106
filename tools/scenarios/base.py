"""What a scenario is, and what several of them need."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """Work in a folder that may die at any moment and is then called again.

    prepare(inputs): makes what the work reads, once. work(inputs, folder): starts, or goes on where it was killed.
    outcome(folder): name -> digest of everything that must come out the same. done(folder): names of the units of work
    that the folder says are finished. unit: (owner, function, name of the unit from the call's arguments); a call for
    a unit that was done already is work done twice.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path, Path], None]
    outcome: Callable[[Path], dict[str, str]]
    done: Callable[[Path], set[str]]
    unit: tuple[Any, str, Callable[..., str]]


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Relative path -> SHA-256 of the files that match."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def nothing(inputs: Path) -> None:
    pass


def made_up_events(folder: Path, *, files: int, events: int) -> None:
    """A labelled folder in Kaggle's format whose pulses mean nothing; `events` in each file."""
    import numpy as np
    import torch
    from iceaggr.data.kaggle import write_batch, write_meta
    from iceaggr.data.pulses import Pulses
    from iceaggr.data.schema import Events

    rng, tables = np.random.default_rng(5), {}
    for batch in range(1, files + 1):
        counts_E = rng.integers(5, 60, events)
        ends_E, n = counts_E.cumsum(), int(counts_E.sum())
        event_P, time_P = np.repeat(np.arange(events), counts_E), rng.integers(5_000, 30_000, n)
        ids_E = 1000 * batch + np.arange(events)
        azimuth_E, zenith_E = rng.uniform(0, 6, events), rng.uniform(0, 3, events)
        pulses = Pulses(
            event_id_E=torch.from_numpy(ids_E),
            offsets_E1=torch.from_numpy(np.append(0, ends_E)),
            sensor_P=torch.from_numpy(rng.integers(0, 5160, n).astype(np.int32)),
            time_P=torch.from_numpy(time_P[np.lexsort((time_P, event_P))].astype(np.int32)),
            charge_P=torch.from_numpy((rng.integers(1, 400, n) / 40).astype(np.float32)),
            auxiliary_P=torch.from_numpy(rng.random(n) < 0.6),
            azimuth_E=None,
            zenith_E=None,
        )
        write_batch(folder / "train" / f"batch_{batch}.parquet", pulses)
        tables[batch] = Events(ids_E, ends_E - counts_E, ends_E - 1, azimuth_E, zenith_E)
    write_meta(folder / "train_meta.parquet", tables)
