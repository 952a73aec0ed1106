"""From what a user has to what training reads: simulate when there is no data, convert, split by event id."""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import make_folder
from lab_shared.progress import Counter
from lab_shared.runs import pick_device

from iceaggr.config import DataConfig
from iceaggr.data.cache import EventCache, build_cache, open_cache
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.geometry import Geometry, icecube86, read_geometry_csv

SIMULATED, REAL = "simulated data", "data of {}"
STREAM = "stream"
"""What data.data says for events simulated while training."""


class SplitError(UserError):
    """Training and held-out events overlap, or there are too few of one of them."""


@dataclass(frozen=True)
class Prepared:
    """An opened event store, where it came from, and the words its results carry."""

    cache: EventCache
    geometry: Geometry
    folder: Path
    label: str


def prepare(config: DataConfig, *, seed: int, device: str) -> Prepared:
    """Simulate or find the events, convert them once, open the store.

    Safe to call from every process of a torchrun job at once: the first to come does the work under a file lock, the
    others wait and find it done. Data made once is used again by later runs. With data = "stream" the store holds the
    held-out events alone and is in memory.
    """
    if config.data == STREAM:
        return _held_out(config, device)
    if config.data is not None:
        folder = Path(config.data)
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give --data a Kaggle-format folder, or leave it out to simulate")
    else:
        if config.train_events is None:
            raise UserError("without --data, data.train_events must say how many events to simulate")
        n = config.train_events + config.val_events
        folder = Path(config.store) / f"simulated-{device}-{n}-seed{seed}"
    cache = Path(config.cache) if config.cache else Path(config.store) / f"{_slug(folder)}.cache"
    with _locked(Path(config.store) / ".lock"):
        if config.data is None:
            geometry = Path(config.geometry) if config.geometry else None
            simulate(folder, n, seed=seed, device=device, geometry=geometry)
        cache_folder(folder, cache)
    return Prepared(open_cache(cache), folder_geometry(folder, config.geometry), folder, data_label(folder))


def _held_out(config: DataConfig, device: str) -> Prepared:
    from iceaggr.sim.feed import held_out_store

    if config.train_events is None or config.val_events < 1:
        raise UserError("data.data = stream needs data.train_events, the events of an epoch, and data.val_events")
    geometry = read_geometry_csv(Path(config.geometry)) if config.geometry else icecube86()
    with Counter(f"simulating held-out events on {device}", config.val_events, "events") as counter:
        cache = held_out_store(config.val_events, device=device, geometry=geometry)
        counter.show(config.val_events)
    return Prepared(cache, geometry, Path(config.store), SIMULATED)


def simulate(
    out: Path,
    n_events: int,
    *,
    seed: int,
    device: str | None = None,
    geometry: Path | None = None,
    events_per_file: int = 200_000,
) -> None:
    """Write a simulated Kaggle-format folder with a progress line; a finished or half-finished one is continued."""
    from iceaggr.sim.write import simulate_folder

    array = icecube86() if geometry is None else read_geometry_csv(geometry)
    where = pick_device(device)
    with Counter(f"simulating on {where}", n_events, "events") as counter:
        simulate_folder(
            out,
            n_events,
            seed=seed,
            device=where,
            geometry=array,
            events_per_file=events_per_file,
            progress=lambda done, total: counter.show(done),
        )


def cache_folder(folder: Path, out: Path, *, verify: bool = False) -> dict[str, Any]:
    """Convert a Kaggle-format folder with a progress line and describe the result; finished shards are kept."""
    start = time.perf_counter()
    source = KaggleFolder(folder)
    with Counter("caching", source.n_events, "events") as counter:
        build_cache(source, out, progress=counter.show)
    cache = open_cache(out)
    if verify:
        cache.verify()
    n_bytes = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    return {
        "cache": str(out),
        "events": cache.n_events,
        "pulses": cache.n_pulses,
        "bytes_per_pulse": round(n_bytes / max(cache.n_pulses, 1), 3),
        "labelled": cache.azimuth is not None,
        "verified": verify,
        "seconds": round(time.perf_counter() - start, 2),
    }


def folder_geometry(folder: Path, override: str | None = None) -> Geometry:
    """The array a folder was recorded with: the override, the folder's own file, or the built-in 86 strings."""
    if override is not None:
        return read_geometry_csv(Path(override))
    own = Path(folder) / "sensor_geometry.csv"
    return read_geometry_csv(own) if own.exists() else icecube86()


def data_label(folder: Path) -> str:
    """What every table made from this folder says about its origin."""
    return SIMULATED if (Path(folder) / "simulation.json").exists() else REAL.format(Path(folder).name)


def split(cache: EventCache, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and held-out events in the store: the last val_events are held out.

    With data = "stream" all are held out.

    Raises:
        SplitError: the two share an event id, or there are no labels, or nothing is left to train on.
    """
    if config.data == STREAM:
        return np.empty(0, dtype=np.int64), np.arange(cache.n_events)
    if cache.azimuth is None:
        raise SplitError("these events have no azimuth and zenith: training and evaluation need a labelled folder")
    n_train = cache.n_events - config.val_events
    if config.val_events < 1 or n_train < 1:
        raise SplitError(
            f"{cache.n_events:,} events cannot give {config.val_events:,} held-out ones and a training set: "
            "set --data.val-events"
        )
    if config.train_events is not None:
        n_train = min(n_train, config.train_events)
    train = np.arange(n_train)
    held_out = np.arange(cache.n_events - config.val_events, cache.n_events)
    refuse_overlap(cache.event_id[train], cache.event_id[held_out])
    return train, held_out


def refuse_overlap(train_ids: np.ndarray, other_ids: np.ndarray) -> None:
    """Raise SplitError when an event id is in both; scores on seen events mean nothing."""
    shared = np.intersect1d(train_ids, other_ids)
    if shared.size:
        first = ", ".join(map(str, shared[:3]))
        raise SplitError(
            f"{shared.size:,} of {other_ids.size:,} events to score were trained on (event_id {first}, ...): "
            "use other events, or `evaluate --drop-seen` to score the rest"
        )


def _slug(folder: Path) -> str:
    """A name for a folder's cache that differs between folders of the same name."""
    return f"{folder.name}-{hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    make_folder(path.parent)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
