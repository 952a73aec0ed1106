"""Prometheus parquet files as a Kaggle-format folder: `iceaggr convert FILE.parquet ... --out DIR`.

A file (`iceaggr.prometheus_files`) has photons and the truth; what Kaggle's files have beside is made here:

- pulses: photons on one sensor in the same bin of `merge_ns`, at the first one's time, their charges (1 each) added up;
- clock: the first pulse in local coincidence (of all, where none is) is at 9867 ns, as in the real files;
- auxiliary: not in local coincidence (another pulse within two sensors of its string and 1 us, or a launch begun so);
- direction: where the neutrino came from, the opposite of the momentum that Prometheus records.

No noise, no trigger, no electronics: a model trained on these events must not be expected to read real ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.progress import Counter

from iceaggr.data.kaggle import TRUTH_FILE, write_batch, write_meta
from iceaggr.data.parquet import write_table
from iceaggr.data.pulses import Pulses
from iceaggr.data.schema import N_SENSORS, Events
from iceaggr.directions import vector_to_angles
from iceaggr.geometry import DOMS_PER_STRING, SURFACE_Z, Geometry, icecube86, write_geometry_csv
from iceaggr.prometheus_files import (
    PHOTONS,
    check_layout,
    count_rows,
    labels_of,
    photons_of,
    read_block,
    sensor_keys,
    truth_of,
)

if TYPE_CHECKING:
    import polars as pl

TRIGGER_NS = 9867
_PARTIAL = ".partial"
EVENTS_PER_FILE = 50_000
_SAME_PLACE = 0.5  # m: sensors this close to an IceCube DOM are that DOM
_TRUTH_COLUMNS = {"event_id": "Int64", "type": "String", **dict.fromkeys(("energy", "x", "y", "z"), "Float64")}


def convert(
    files: Sequence[Path],
    out: Path,
    *,
    direction: Literal["travel", "origin"] = "travel",
    merge_ns: int = 8,
    events_per_file: int = EVENTS_PER_FILE,
) -> dict[str, Any]:
    """Write OUT/train/batch_*.parquet, train_meta.parquet, sensor_geometry.csv and truth.parquet; describe the result.

    truth.parquet is left out where a file's mc_truth lacks type, interaction, energy or vertex.
    Event ids count the rows of the files from 0, in their order; events without light are left out. Sensors keep their
    Kaggle ids when all stand on IceCube-86's DOMs (depths are tried too); otherwise they get ids by string and height,
    and the rows of the geometry file that no sensor needs repeat the last one. Files are read in blocks of
    `events_per_file` events, so memory does not grow with them.

    Raises:
        UserError: `out` holds files already, or there are more than 5,160 sensors.
        DataError: a file is not Prometheus's; the message names the file and the column.
    """
    import polars as pl

    if out.exists() and any(path.name != _PARTIAL for path in out.iterdir()):
        raise UserError(f"{out} is not empty; choose a new folder")
    sensors = _Sensors.of(files)
    events: dict[int, Events] = {}
    truth: list[pl.DataFrame | None] = []
    total = sum(count_rows(file) for file in files)
    done = kept = agreeing = fitted = 0
    with _new_folder(out) as made:
        with Counter("converting", total, "events") as counter:
            for file in files:
                for first in range(0, count_rows(file), events_per_file):
                    block = read_block(file, first, events_per_file)
                    pulses, rows = _pulses(block, file, done, sensors, merge_ns)
                    labels = labels_of(block, rows, direction, file)
                    done += block.height
                    counter.show(done)
                    if not rows.size:
                        continue
                    batch = len(events) + 1
                    write_batch(made / "train" / f"batch_{batch}.parquet", pulses)
                    ends = pulses.offsets_E1[1:].numpy() - 1
                    starts = pulses.offsets_E1[:-1].numpy()
                    azimuth, zenith = vector_to_angles(labels)
                    events[batch] = Events(pulses.event_id_E.numpy(), starts, ends, azimuth, zenith)
                    truth.append(truth_of(block, rows, pulses.event_id_E.numpy()))
                    kept += rows.size
                    cosine_E = _line_fit_cosine(pulses, sensors.geometry.xyz, labels)
                    agreeing, fitted = agreeing + int((cosine_E > 0).sum()), fitted + cosine_E.size
        if not kept:
            raise UserError(f"no event of {', '.join(map(str, files))} has a photon: nothing to convert")
        write_meta(made / "train_meta.parquet", events)
        known = [table for table in truth if table is not None]
        if len(known) == len(truth):
            write_table(made / TRUTH_FILE, pl.concat(known), _TRUTH_COLUMNS)
        write_geometry_csv(made / "sensor_geometry.csv", sensors.geometry)
        record = {
            "note": "simulated data: converted from Prometheus files, not recorded by IceCube",
            "files": [file.name for file in files],
            "direction": direction,
            "merge_ns": merge_ns,
            "events": kept,
            "events_without_light": total - kept,
            "sensors": sensors.n,
            "geometry": "IceCube-86" if sensors.icecube else "of the files",
            "line_fit_agrees": agreeing / fitted if fitted else None,
        }
        atomic_write(made / "simulation.json", json.dumps(record, indent=1) + "\n")
    return record | {"out": str(out), "text": _text(record, out)}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` whose files move up at the end, train/ last, so that `out` never looks like half a set."""
    is_new, made = not out.exists(), out / _PARTIAL
    shutil.rmtree(made, ignore_errors=True)  # of a killed process
    try:
        make_folder(made / "train")
        yield made
        for path in sorted(made.iterdir(), key=lambda path: path.name == "train"):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if is_new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


class _Sensors:
    """Which Kaggle sensor id each (string_id, sensor_id) of the files has, and where it is."""

    def __init__(self, keys: np.ndarray, xyz: np.ndarray) -> None:
        order = np.argsort(keys)
        self.keys, self.n = keys[order], len(keys)
        self.ids, self.geometry, self.icecube = _place(self.keys, xyz[order])

    @classmethod
    def of(cls, files: Sequence[Path]) -> _Sensors:
        """From the photons of all files, block by block."""
        found: dict[int, tuple[float, float, float]] = {}
        for file in files:
            check_layout(file)
            for first in range(0, count_rows(file), EVENTS_PER_FILE):
                photons = photons_of(read_block(file, first, EVENTS_PER_FILE), file).unique(["string_id", "sensor_id"])
                keys = sensor_keys(photons).tolist()
                found |= dict(zip(keys, photons.select(PHOTONS[:3]).iter_rows(), strict=True))
        if not found:
            raise UserError(f"no event of {', '.join(map(str, files))} has a photon: nothing to convert")
        if len(found) > N_SENSORS:
            raise UserError(f"{len(found)} sensors are hit; this format holds {N_SENSORS}")
        return cls(np.array(list(found)), np.array(list(found.values()), dtype=np.float64))

    def of_photons(self, photons: pl.DataFrame) -> np.ndarray:
        return self.ids[np.searchsorted(self.keys, sensor_keys(photons))]


def _place(keys: np.ndarray, xyz: np.ndarray) -> tuple[np.ndarray, Geometry, bool]:
    """(sensor ids, geometry, whether that is IceCube's) of sensors sorted by key."""
    known = icecube86()
    for lift in (0.0, SURFACE_Z):  # detector frame, or z = -depth
        distances = (np.linalg.norm(known.xyz - point, axis=1) for point in xyz + (0, 0, lift))
        ids, away = map(np.array, zip(*((d.argmin(), d.min()) for d in distances), strict=True))
        if away.max() < _SAME_PLACE and len(np.unique(ids)) == len(ids):
            return ids, known, True
    string, rank = np.unique(keys >> 32, return_inverse=True)
    counts = np.bincount(rank)
    order = np.lexsort((-xyz[:, 2], rank))  # string by string, the top sensor of each first, as in IceCube
    ids = np.empty(len(keys), dtype=np.int64)
    ids[order] = np.arange(len(keys))
    if len(string) <= N_SENSORS // DOMS_PER_STRING and counts.max() <= DOMS_PER_STRING:
        # 60 ids for each string, so that local coincidence does not cross from one to the next
        ids += (DOMS_PER_STRING * np.arange(len(string)) - (counts.cumsum() - counts))[rank]
    positions = np.repeat(xyz[order[-1:]], N_SENSORS, axis=0)
    positions[ids] = xyz
    return ids, replace(known, xyz=positions), False


def _pulses(
    block: pl.DataFrame, file: Path, first_id: int, sensors: _Sensors, merge_ns: int
) -> tuple[Pulses, np.ndarray]:
    """(pulses, rows of the block they belong to); unlabelled."""
    photons = photons_of(block, file)
    row, sensor = photons["row"].to_numpy().astype(np.int64), sensors.of_photons(photons)
    time, charge = photons["t"].to_numpy().astype(np.float64), photons["charge"].to_numpy().astype(np.float64)
    order = np.lexsort((time, sensor, row))
    row, sensor, time, charge = row[order], sensor[order], time[order], charge[order]
    slot = np.floor(time / merge_ns)
    start = np.flatnonzero((np.diff(row * N_SENSORS + sensor, prepend=-1) != 0) | (np.diff(slot, prepend=np.nan) != 0))
    charge = np.add.reduceat(charge, start) if len(start) else charge
    row, sensor, time = row[start], sensor[start], np.rint(time[start]).astype(np.int64)
    near = coincident(row, sensor, time)
    rows, event, counts = np.unique(row, return_inverse=True, return_counts=True)
    # the clock of each event: its first coincident pulse, or its first of all
    zero = np.full(len(rows), np.iinfo(np.int64).max)
    np.minimum.at(zero, event[near], time[near])
    earliest = np.full(len(rows), np.iinfo(np.int64).max)
    np.minimum.at(earliest, event, time)
    zero = np.where(zero == np.iinfo(np.int64).max, earliest, zero)
    time = time - zero[event] + TRIGGER_NS
    order = np.lexsort((time, event))
    pulses = Pulses(
        event_id_E=torch.from_numpy(first_id + rows),
        offsets_E1=torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
        sensor_P=torch.from_numpy(sensor[order].astype(np.int32)),
        time_P=torch.from_numpy(time[order]),
        charge_P=torch.from_numpy(charge[order].astype(np.float32)),
        auxiliary_P=torch.from_numpy(~near[order]),
    )
    return pulses, rows


def coincident(row_P: np.ndarray, sensor_P: np.ndarray, time_P: np.ndarray) -> np.ndarray:
    """(P,) bool: pulses in local coincidence, of pulses sorted by (event row, sensor, time in whole ns).

    Another pulse lies within two sensors on the same string (not on the same sensor) and 1000 ns, or one that has such
    a partner lies on the same sensor at most 6400 ns before.
    """
    if not len(time_P):
        return np.zeros(0, dtype=bool)
    from iceaggr.sim.config import SimConfig
    from iceaggr.sim.trigger import auxiliary, coincidence

    dom_P = torch.from_numpy((row_P << 13) | sensor_P)
    # the simulator's times have 17 bits; what a Prometheus event has later than 131 us is clipped together there
    first = np.full(int(row_P.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, row_P, time_P)
    clock_P = torch.from_numpy(np.minimum(time_P - first[row_P], (1 << 17) - 1))
    near_P, _ = coincidence(dom_P, clock_P, SimConfig())
    return ~auxiliary(dom_P, clock_P, near_P, SimConfig()).numpy()


def _line_fit_cosine(pulses: Pulses, xyz: np.ndarray, origin_E3: np.ndarray) -> np.ndarray:
    """Cosine between a line fit and the label, of the events that a fit makes sense for: is the sign right?"""
    from iceaggr.baselines import line_fit

    fit = line_fit(pulses, torch.tensor(xyz), "all")
    enough_E = pulses.counts_E.numpy() >= 20
    return (fit.direction_E3.numpy() * origin_E3).sum(1)[enough_E]


def _text(record: dict[str, Any], out: Path) -> str:
    agrees = record["line_fit_agrees"]
    lines = [
        f"{record['events']:,} events -> {out} (simulated data, Prometheus); {record['events_without_light']:,} "
        f"without light left out; {record['sensors']:,} sensors hit, geometry {record['geometry']}"
    ]
    if agrees is None:
        return f"{lines[0]}\nno event has 20 pulses for a line fit: nothing here checks the sense of the directions"
    lines.append(f"a line fit and the label share half of the sky in {agrees:.0%} of the events with 20 pulses")
    if agrees < 0.5:
        lines.append("that is less than chance: the directions of these files may be the other way round (--direction)")
    return "\n".join(lines)
