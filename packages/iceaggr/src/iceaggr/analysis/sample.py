"""The events an analysis looks at: labelled, and never trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lab_shared.arrays import load_array

from iceaggr.config import TrainConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.prepare import SplitError, data_label, folder_geometry, refuse_overlap
from iceaggr.data.pulses import Pulses
from iceaggr.evaluate import TRAINED_ON
from iceaggr.own_events import own_held_out


@dataclass(frozen=True)
class Sample:
    """Events of a store, the sensor tables of their array, and the words their results carry."""

    cache: EventCache
    index_N: np.ndarray
    tables: Tables
    label: str

    def spread(self, n: int) -> np.ndarray:
        """At most n of the events, evenly spaced over all of them."""
        size = self.index_N.size
        return self.index_N if n >= size else self.index_N[np.arange(n) * size // n]


def held_out_events(
    run_dir: Path,
    config: TrainConfig,
    device: torch.device,
    *,
    data: Path | None,
    max_events: int | None,
    drop_seen: bool = False,
    scored: np.ndarray | None = None,
) -> Sample:
    """At most `max_events` events (None: all): of the folder `data`, or of the run's own held-out set when it is None.

    scored: event ids, of its own held-out events those to choose from; default all.

    Raises:
        UserError: the run's own events are not where it found them.
        SplitError: the folder is unlabelled, has events the run was trained on (with drop_seen: has no others).
    """
    if data is not None:
        seen = load_array(Path(run_dir) / TRAINED_ON)
        cache = _unseen(data, seen, max_events, drop_seen=drop_seen)
        tables = Tables.of(folder_geometry(data, config.data.geometry), device)
        return Sample(cache, np.arange(cache.n_events), tables, data_label(data))
    first = None if scored is None else scored.size
    prepared, held_out_E = own_held_out(Path(run_dir), config, device.type, first=first)
    if scored is not None:
        held_out_E = held_out_E[np.isin(prepared.cache.event_id[held_out_E], scored)]
    whole = Sample(prepared.cache, held_out_E, Tables.of(prepared.geometry, device), prepared.label)
    return whole if max_events is None else replace(whole, index_N=whole.spread(max_events))


def _unseen(folder: Path, seen: np.ndarray, max_events: int | None, *, drop_seen: bool) -> EventCache:
    """A store of the first events of a folder that the run was not trained on, read file by file."""
    source = KaggleFolder(folder)
    limit = source.n_events if max_events is None else max_events
    parts: list[Pulses] = []
    found = 0
    for batch_id in source.batch_ids:
        pulses = source.read_batch(batch_id)
        if pulses.azimuth_E is None:
            raise SplitError(f"{folder} has no azimuth and zenith to compare with: an analysis needs labelled events")
        ids, wanted = pulses.event_id_E.numpy(), limit - found
        if drop_seen:
            kept = np.flatnonzero(~np.isin(ids, seen))[:wanted]
        else:
            kept = np.arange(min(ids.size, wanted))
            refuse_overlap(seen, ids[kept])
        if kept.size:
            parts.append(EventCache.in_memory(pulses).gather(kept))
            found += kept.size
        if found >= limit:
            break
    if not found:
        raise SplitError(f"the run was trained on every event of {folder}: there is nothing to analyse")
    return EventCache.in_memory(_joined(parts))


def _joined(parts: list[Pulses]) -> Pulses:
    """Several batches of events as one."""
    if len(parts) == 1:
        return parts[0]
    columns = ("event_id_E", "sensor_P", "time_P", "charge_P", "auxiliary_P", "azimuth_E", "zenith_E")
    counts_E = torch.cat([part.counts_E for part in parts])
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in columns}
    return Pulses(offsets_E1=torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)]), **joined)
