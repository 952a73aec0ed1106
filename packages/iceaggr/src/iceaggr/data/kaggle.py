"""Kaggle-layout folders, read and checked one batch at a time, and the writers of the same files.

polars is imported inside the functions, because the training path works from the cache and does without it.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from iceaggr.data.parquet import named_errors, read_columns, scan, write_table
from iceaggr.data.pulses import Pulses
from iceaggr.data.schema import (
    LABEL_COLUMNS,
    META_COLUMNS,
    PULSE_COLUMNS,
    EventIdError,
    Events,
    MissingFileError,
    check_events,
    check_pulses,
    first_true,
    pulse_rows,
)

TRUTH_FILE = "truth.parquet"
"""Written by the simulator: event_id, type ("cascade" or "track"), energy (GeV) and more, a row per event."""


class KaggleFolder:
    """A folder of `{split}/batch_{n}.parquet` and `{split}_meta.parquet`.

    Two smaller layouts are read too: the batch files directly in the folder, and no meta table, where the
    runs of equal event_id are the events and there are no labels.

    Args:
        path: the folder.
        split: "train", "test", or "auto" for train where there is one and test otherwise.

    Raises:
        MissingFileError: no batch files.
    """

    def __init__(self, path: str | Path, split: Literal["auto", "train", "test"] = "auto") -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise MissingFileError("no such folder", file=self.path)
        splits = ("train", "test") if split == "auto" else (split,)
        rooms = [(name, self.path / name) for name in splits] + [(splits[0], self.path)]
        self.split, room = next(((name, room) for name, room in rooms if _batch_files(room)), ("", self.path))
        if not self.split:
            raise MissingFileError(
                f"no batch_*.parquet in {' or '.join(f'{name}/' for name in splits)} or in the folder itself",
                file=self.path,
            )
        self.batch_files = _batch_files(room)
        meta = self.path / f"{self.split}_meta.parquet"
        self.meta_file = meta if meta.exists() else None
        geometry = self.path / "sensor_geometry.csv"
        self.geometry_file = geometry if geometry.exists() else None
        truth = self.path / TRUTH_FILE
        self.truth_file = truth if self.split == "train" and truth.exists() else None

    @property
    def batch_ids(self) -> list[int]:
        return list(self.batch_files)

    @property
    def labelled(self) -> bool:
        """Whether the meta table has directions."""
        return self.meta_file is not None and set(LABEL_COLUMNS) <= set(scan(self.meta_file).collect_schema())

    @cached_property
    def n_events(self) -> int:
        """Events of all batch files that are there."""
        return sum(self.events_per_batch().values())

    def events_per_batch(self) -> dict[int, int]:
        """Events of each batch, from one streamed column of the meta table."""
        import polars as pl

        if self.meta_file is None:
            return {batch: len(self.read_events(batch)) for batch in self.batch_ids}
        with named_errors(self.meta_file):
            table = scan(self.meta_file).group_by("batch_id").agg(pl.len()).collect(engine="streaming")
        counts = dict(table.iter_rows())
        return {batch: counts.get(batch, 0) for batch in self.batch_ids}

    def read_events(self, batch_id: int) -> Events:
        """One batch's rows of the meta table: a filtered scan, so that the other 659 batches stay on disk.

        Raises:
            DataError: a subclass for what is wrong; the ranges are checked by `read_batch`.
        """
        import polars as pl

        if self.meta_file is None:
            event_id_P = read_columns(self.batch_files[batch_id], {"event_id": "Int64"})["event_id"]
            starts = np.flatnonzero(np.diff(event_id_P, prepend=event_id_P[:1] - 1))
            return Events(event_id_P[starts], starts, np.append(starts[1:], len(event_id_P)) - 1)
        wanted = META_COLUMNS | (LABEL_COLUMNS if self.labelled else {})
        table = read_columns(self.meta_file, wanted, where=pl.col("batch_id") == batch_id)
        if not len(table["event_id"]):
            raise EventIdError(
                f"no events of batch {batch_id}, although {self.batch_files[batch_id].name} is there",
                file=self.meta_file,
            )
        return Events(
            event_id_E=table["event_id"],
            first_E=table["first_pulse_index"],
            last_E=table["last_pulse_index"],
            azimuth_E=table.get("azimuth"),
            zenith_E=table.get("zenith"),
        )

    def read_batch(self, batch_id: int) -> Pulses:
        """The checked pulses of one batch file, on the CPU, in file order.

        Charges become float32, which is what Kaggle's doubles hold. Rows that belong to no event are left
        out.

        Raises:
            DataError: a subclass that names the file, the row and what is wrong with it.
        """
        file = self.batch_files[batch_id]
        table = read_columns(file, PULSE_COLUMNS)
        events = self.read_events(batch_id)
        check_events(events, len(table["time"]), meta_file=self.meta_file or file, pulse_file=file)
        check_pulses(
            events,
            sensor_P=table["sensor_id"],
            time_P=table["time"],
            charge_P=table["charge"],
            event_id_P=table["event_id"],
            file=file,
        )
        rows = pulse_rows(events)
        time_P = table["time"][rows]
        fits = not len(time_P) or (time_P.min() >= -(2**31) and time_P.max() < 2**31)
        ends_E = (events.last_E - events.first_E + 1).cumsum()
        return Pulses(
            event_id_E=torch.from_numpy(events.event_id_E.copy()),
            offsets_E1=torch.from_numpy(np.concatenate([[0], ends_E])),
            sensor_P=torch.from_numpy(table["sensor_id"][rows].astype(np.int32)),
            time_P=torch.from_numpy(time_P.astype(np.int32 if fits else np.int64)),
            charge_P=torch.from_numpy(table["charge"][rows].astype(np.float32)),
            auxiliary_P=torch.from_numpy(table["auxiliary"][rows].copy()),
            azimuth_E=None if events.azimuth_E is None else torch.from_numpy(events.azimuth_E.copy()),
            zenith_E=None if events.zenith_E is None else torch.from_numpy(events.zenith_E.copy()),
        )

    def read_event(self, event_id: int) -> Pulses:
        """One event, out of whichever batch has it. Raises EventIdError if none has."""
        import polars as pl

        batches = self.batch_ids
        if self.meta_file is not None:
            wanted = pl.col("event_id") == event_id
            batches = [int(b) for b in read_columns(self.meta_file, META_COLUMNS, where=wanted)["batch_id"]]
        for batch_id in (b for b in batches if b in self.batch_files):
            pulses = self.read_batch(batch_id)
            at = np.flatnonzero(pulses.event_id_E.numpy() == event_id)
            if at.size:
                return slice_events(pulses, int(at[0]), int(at[0]) + 1)
        raise EventIdError(f"no event {event_id} in the batch files that are there", file=self.path)

    def read_truth(self, event_ids: np.ndarray) -> dict[str, np.ndarray] | None:
        """Simulator truth of the given events: `type` int8 (0 cascade, 1 track), `energy` float32 (GeV), and where the
        table has it `vertex_x`, `vertex_y`, `vertex_z` float32 (m), the point of interaction.

        None for folders without truth.parquet. Raises EventIdError if an event is not in the table.
        """
        import polars as pl

        if self.truth_file is None:
            return None
        wanted = {"event_id": "Int64", "type": "String", "energy": "Float64"}
        placed = set("xyz") <= set(scan(self.truth_file).collect_schema())
        wanted |= dict.fromkeys("xyz", "Float64") if placed else {}
        within = pl.col("event_id").is_between(int(event_ids.min()), int(event_ids.max()))
        table = read_columns(self.truth_file, wanted, where=within)
        order = np.argsort(table["event_id"])
        found = np.append(table["event_id"][order], -1)  # one more, so that looking behind the end is no error
        at = np.searchsorted(found[:-1], event_ids)
        if (missing := first_true(found[at] != event_ids)) is not None:
            raise EventIdError(f"no row for event {event_ids[missing]}", file=self.truth_file)
        rows = order[at]
        return {
            "type": (table["type"][rows] == "track").astype(np.int8),
            "energy": table["energy"][rows].astype(np.float32),
            **({f"vertex_{axis}": table[axis][rows].astype(np.float32) for axis in "xyz"} if placed else {}),
        }


def test_first(path: str | Path) -> KaggleFolder:
    """The folder's test split if it has one, else what "auto" finds: what there is to predict."""
    return KaggleFolder(path, "test" if _batch_files(Path(path) / "test") else "auto")


def slice_events(pulses: Pulses, first: int, last: int) -> Pulses:
    """Events first to last, exclusive, with their pulses."""
    low, high = int(pulses.offsets_E1[first]), int(pulses.offsets_E1[last])
    per_pulse = ("sensor_P", "time_P", "charge_P", "auxiliary_P")
    per_event = ("event_id_E", "azimuth_E", "zenith_E")
    parts = {name: getattr(pulses, name)[low:high] for name in per_pulse}
    parts |= {name: None if (x := getattr(pulses, name)) is None else x[first:last] for name in per_event}
    return Pulses(**parts, offsets_E1=pulses.offsets_E1[first : last + 1] - low)


def write_batch(path: str | Path, pulses: Pulses) -> None:
    """Writes one batch file exactly as Kaggle's: column order, types, snappy, one row group. Atomic.

    The rows that the meta table needs are `pulses.offsets_E1[:-1]` and `pulses.offsets_E1[1:] - 1`.
    """
    import polars as pl

    cpu = pulses.to("cpu")
    event_id_P = np.repeat(cpu.event_id_E.numpy(), cpu.counts_E.numpy())
    arrays = (cpu.sensor_P, cpu.time_P, cpu.charge_P, cpu.auxiliary_P)
    columns = dict(zip(PULSE_COLUMNS, [*(x.numpy() for x in arrays), event_id_P], strict=True))
    write_table(path, pl.DataFrame(columns), PULSE_COLUMNS)


def write_meta(path: str | Path, events: dict[int, Events]) -> None:
    """Writes {split}_meta.parquet from each batch's events, in the order given; labels if all have them.
    Atomic.
    """
    import polars as pl

    labelled = all(e.azimuth_E is not None and e.zenith_E is not None for e in events.values())
    schema = META_COLUMNS | (LABEL_COLUMNS if labelled else {})
    tables = []
    for batch_id, e in events.items():
        arrays = [np.full(len(e), batch_id), e.event_id_E, e.first_E, e.last_E, e.azimuth_E, e.zenith_E]
        tables.append(pl.DataFrame(dict(zip(schema, arrays, strict=False))))
    write_table(path, pl.concat(tables) if tables else pl.DataFrame({name: [] for name in schema}), schema)


def _batch_files(folder: Path) -> dict[int, Path]:
    found = {
        int(m[1]): file for file in folder.glob("batch_*.parquet") if (m := re.fullmatch(r"batch_(\d+)", file.stem))
    }
    return dict(sorted(found.items()))
