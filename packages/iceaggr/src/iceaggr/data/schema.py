"""Column names and types of the Kaggle "IceCube - Neutrinos in Deep Ice" files, the errors, and the checks.

The contract: `{split}/batch_{n}.parquet` holds pulses sorted by event and then time; `{split}_meta.parquet`
says which rows of a batch belong to which event (0-based, last row inclusive) and, for the training split,
where the neutrino came from. The checks take plain numpy arrays, so that they work on any reader's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lab_shared.errors import UserError

N_SENSORS = 5160
"""Sensors of the array: 86 strings of 60; sensor_id = 60 * (string - 1) + (dom - 1)."""

MOST_CHARGE = 1e9
"""p.e. of one pulse, a million times the largest ones: sums over an event stay exact in whole steps of 0.025."""

PULSE_COLUMNS = {
    "sensor_id": "Int16",
    "time": "Int64",
    "charge": "Float64",
    "auxiliary": "Boolean",
    "event_id": "Int64",
}
"""Columns of batch_{n}.parquet, in file order. Time in ns, charge in photo-electrons."""

META_COLUMNS = {
    "batch_id": "Int64",
    "event_id": "Int64",
    "first_pulse_index": "Int64",
    "last_pulse_index": "Int64",
}
"""Columns of {split}_meta.parquet, in file order."""

LABEL_COLUMNS = {"azimuth": "Float64", "zenith": "Float64"}
"""Further columns of train_meta.parquet: the direction the neutrino came from, in rad."""

SUBMISSION_COLUMNS = {"event_id": "Int64", "azimuth": "Float64", "zenith": "Float64"}
"""Columns of sample_submission.parquet and of a submission."""


class DataError(UserError):
    """A file that breaks the contract. `file` and `row` (0-based row of that file, or None) say where.

    For meta files the row counts the events of one batch, since a batch's events are read by themselves.
    """

    def __init__(self, problem: str, *, file: str | Path, row: int | None = None) -> None:
        self.problem, self.file, self.row = problem, Path(file), row
        super().__init__(f"{file}{'' if row is None else f', row {row}'}: {problem}")


class MissingFileError(DataError):
    """A folder or file that should be there is not."""


class CorruptFileError(DataError):
    """A file that is cut short or is not readable as parquet."""


class MissingColumnError(DataError):
    """A column of the contract is absent."""


class ColumnTypeError(DataError):
    """A column whose type cannot be cast to the contract's without loss."""


class NullValueError(DataError):
    """A missing value."""


class PulseIndexError(DataError):
    """A pulse index that is negative, beyond the pulse file, or in another event's range."""


class EmptyEventError(DataError):
    """An event without pulses."""


class EventIdError(DataError):
    """Event ids that are repeated, or that differ between the meta and the pulse file."""


class UnsortedTimesError(DataError):
    """Pulses of an event that are not in time order."""


class SensorRangeError(DataError):
    """A sensor id outside 0..5159."""


class ChargeError(DataError):
    """A charge that is negative, NaN or beyond `MOST_CHARGE`."""


class LabelError(DataError):
    """A direction that is NaN or out of range."""


@dataclass(frozen=True)
class Events:
    """One batch's rows of the meta table."""

    event_id_E: np.ndarray  # int64
    first_E: np.ndarray  # int64, first pulse row in the batch file
    last_E: np.ndarray  # int64, last pulse row, inclusive
    azimuth_E: np.ndarray | None = None  # float64 rad
    zenith_E: np.ndarray | None = None  # float64 rad

    def __len__(self) -> int:
        return len(self.event_id_E)


def first_true(mask: np.ndarray) -> int | None:
    """Position of the first True, or None."""
    at = int(mask.argmax()) if len(mask) else 0
    return at if len(mask) and mask[at] else None


def check_events(events: Events, n_pulses: int, *, meta_file: str | Path, pulse_file: str | Path) -> None:
    """Raises PulseIndexError, EmptyEventError, EventIdError or LabelError for the first row that is wrong.

    `n_pulses` is the number of rows of the pulse file. Ranges must ascend and may leave gaps.
    """
    first_E, last_E = events.first_E, events.last_E
    if (row := first_true(first_E < 0)) is not None:
        raise PulseIndexError(f"first_pulse_index {first_E[row]} is negative", file=meta_file, row=row)
    if (row := first_true(last_E == first_E - 1)) is not None:
        raise EmptyEventError(
            f"event {events.event_id_E[row]} has no pulses (last_pulse_index is first_pulse_index - 1); "
            "remove it from the table",
            file=meta_file,
            row=row,
        )
    if (row := first_true(last_E < first_E)) is not None:
        raise PulseIndexError(
            f"last_pulse_index {last_E[row]} is below first_pulse_index {first_E[row]}",
            file=meta_file,
            row=row,
        )
    if (row := first_true(last_E >= n_pulses)) is not None:
        raise PulseIndexError(
            f"last_pulse_index {last_E[row]} is beyond the {n_pulses} pulses of {Path(pulse_file).name}",
            file=meta_file,
            row=row,
        )
    if (row := first_true(first_E[1:] <= last_E[:-1])) is not None:
        raise PulseIndexError(
            f"first_pulse_index {first_E[row + 1]} lies in or before the previous event's pulses, which end "
            f"at {last_E[row]}; sort the table by first_pulse_index",
            file=meta_file,
            row=row + 1,
        )
    if (repeat := find_repeat(events.event_id_E)) is not None:
        raise EventIdError(f"event_id {events.event_id_E[repeat]} appears twice", file=meta_file, row=repeat)
    for name, angle_E, top in (("azimuth", events.azimuth_E, 2 * np.pi), ("zenith", events.zenith_E, np.pi)):
        # A float32 rounding of the upper end is tolerated; a NaN fails both comparisons.
        if angle_E is not None and (row := first_true(~((angle_E >= 0) & (angle_E <= top + 1e-6)))) is not None:
            raise LabelError(f"{name} {angle_E[row]} is not in 0..{top:.4f} rad", file=meta_file, row=row)


def find_repeat(values: np.ndarray) -> int | None:
    """Position of the first value that already occurred before it, or None."""
    order = np.argsort(values, kind="stable")
    repeats = order[1:][values[order][1:] == values[order][:-1]]
    return int(repeats.min()) if len(repeats) else None


def check_pulses(
    events: Events,
    *,
    sensor_P: np.ndarray,
    time_P: np.ndarray,
    charge_P: np.ndarray,
    event_id_P: np.ndarray,
    file: str | Path,
) -> None:
    """Raises SensorRangeError, ChargeError, EventIdError or UnsortedTimesError for the first row that is
    wrong.

    The arrays hold every row of the pulse file; `events` has passed `check_events`.
    """
    if (row := first_true((sensor_P < 0) | (sensor_P >= N_SENSORS))) is not None:
        raise SensorRangeError(f"sensor_id {sensor_P[row]} is not in 0..{N_SENSORS - 1}", file=file, row=row)
    if (row := first_true(~((charge_P >= 0) & (charge_P <= MOST_CHARGE)))) is not None:
        raise ChargeError(f"charge {charge_P[row]} is not in 0..{MOST_CHARGE:.0e} p.e.", file=file, row=row)
    counts_E = events.last_E - events.first_E + 1
    owner_P = np.repeat(events.event_id_E, counts_E)
    rows_P = pulse_rows(events)
    if (at := first_true(event_id_P[rows_P] != owner_P)) is not None:
        row = rows_P.start + at if isinstance(rows_P, slice) else int(rows_P[at])
        raise EventIdError(
            f"event_id {event_id_P[row]}, but the meta table gives this row to event {owner_P[at]}",
            file=file,
            row=row,
        )
    late_P = np.zeros(len(time_P), bool)
    late_P[1:] = time_P[1:] < time_P[:-1]
    late_P[events.first_E] = False
    if (at := first_true(late_P[rows_P])) is not None:
        row = rows_P.start + at if isinstance(rows_P, slice) else int(rows_P[at])
        raise UnsortedTimesError(
            f"time {time_P[row]} is before the previous pulse of event {event_id_P[row]} at "
            f"{time_P[row - 1]}; sort the pulses by event and then time",
            file=file,
            row=row,
        )


def pulse_rows(events: Events) -> np.ndarray | slice:
    """Rows of the pulse file that belong to the events, in order; a slice if nothing lies between them."""
    if len(events) == 0:
        return slice(0, 0)
    first_E, last_E = events.first_E, events.last_E
    if bool((first_E[1:] == last_E[:-1] + 1).all()):
        return slice(int(first_E[0]), int(last_E[-1]) + 1)
    return ranges(first_E, last_E - first_E + 1)


def ranges(first_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """first, first + 1, ..., first + count - 1 of each range, one after the other, int64."""
    ends_N = counts_N.cumsum()
    rows = np.repeat(first_N - (ends_N - counts_N), counts_N)
    rows += np.arange(len(rows))
    return rows
