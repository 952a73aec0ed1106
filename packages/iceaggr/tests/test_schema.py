"""The checks on plain arrays: every way an event table or its pulses can be wrong has its own error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iceaggr.data import schema
from iceaggr.data.schema import Events, check_events, check_pulses, pulse_rows, ranges
from lab_shared.errors import UserError

GOOD = Events(
    event_id_E=np.array([5, 9, 12]),
    first_E=np.array([0, 4, 6]),
    last_E=np.array([3, 5, 9]),
    azimuth_E=np.array([0.0, 1.0, 2 * np.pi]),
    zenith_E=np.array([0.0, 1.0, np.pi]),
)
PULSES = {
    "sensor_P": np.array([0, 5159, 3, 3, 3, 4, 1, 2, 3, 4]),
    "time_P": np.array([10, 11, 11, 15, 2, 3, 1, 1, 1, 900]),
    "charge_P": np.array([0.0, 1.0, 2.5, 1e3, 1, 1, 1, 1, 1, 1]),
    "event_id_P": np.array([5, 5, 5, 5, 9, 9, 12, 12, 12, 12]),
}


def check(events: Events, n_pulses: int = 10) -> None:
    check_events(events, n_pulses, meta_file="meta.parquet", pulse_file="train/batch_1.parquet")


def test_a_good_batch_passes():
    check(GOOD)
    check_pulses(GOOD, **PULSES, file="batch_1.parquet")


def changed(array: np.ndarray, at: int, value: float) -> np.ndarray:
    copy = array.copy()
    copy[at] = value
    return copy


@pytest.mark.parametrize(
    ("field", "at", "value", "error", "row", "says"),
    [
        ("first_E", 0, -1, schema.PulseIndexError, 0, "-1 is negative"),
        ("last_E", 1, 2, schema.PulseIndexError, 1, "last_pulse_index 2 is below first_pulse_index 4"),
        ("last_E", 1, 3, schema.EmptyEventError, 1, "event 9 has no pulses"),
        ("last_E", 2, 10, schema.PulseIndexError, 2, "beyond the 10 pulses of batch_1.parquet"),
        ("first_E", 1, 3, schema.PulseIndexError, 1, "sort the table by first_pulse_index"),
        ("event_id_E", 2, 5, schema.EventIdError, 2, "event_id 5 appears twice"),
        ("azimuth_E", 1, np.nan, schema.LabelError, 1, "azimuth nan"),
        ("azimuth_E", 1, -0.1, schema.LabelError, 1, "azimuth -0.1"),
        ("zenith_E", 0, 3.2, schema.LabelError, 0, "zenith 3.2"),
    ],
)
def test_every_fault_of_the_event_table_is_named(field, at, value, error, row, says):
    with pytest.raises(error, match=says) as caught:
        check(replace(GOOD, **{field: changed(getattr(GOOD, field), at, value)}))
    assert caught.value.row == row
    assert caught.value.file == Path("meta.parquet")
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("field", "at", "value", "error", "says"),
    [
        ("sensor_P", 4, -1, schema.SensorRangeError, "sensor_id -1 is not in 0..5159"),
        ("sensor_P", 9, 5160, schema.SensorRangeError, "sensor_id 5160"),
        ("charge_P", 2, np.nan, schema.ChargeError, "charge nan"),
        ("charge_P", 2, -0.025, schema.ChargeError, "charge -0.025"),
        ("charge_P", 2, np.inf, schema.ChargeError, "charge inf"),
        ("charge_P", 2, 3e38, schema.ChargeError, "charge 3e"),
        ("charge_P", 2, 1e300, schema.ChargeError, "charge 1e"),
        ("time_P", 3, 9, schema.UnsortedTimesError, "time 9 is before the previous pulse of event 5 at 11"),
        ("event_id_P", 5, 12, schema.EventIdError, "gives this row to event 9"),
    ],
)
def test_every_fault_of_the_pulses_is_named(field, at, value, error, says):
    with pytest.raises(error, match=says) as caught:
        check_pulses(GOOD, **PULSES | {field: changed(PULSES[field], at, value)}, file="batch_1.parquet")
    assert caught.value.row == at
    assert str(caught.value).startswith(f"batch_1.parquet, row {at}: ")


def test_rows_count_in_the_file_when_events_leave_gaps():
    events = replace(GOOD, first_E=np.array([1, 4, 7]))
    check(events)
    assert pulse_rows(events).tolist() == [1, 2, 3, 4, 5, 7, 8, 9]
    with pytest.raises(schema.UnsortedTimesError) as caught:
        check_pulses(events, **PULSES | {"time_P": changed(PULSES["time_P"], 8, 0)}, file="x")
    assert caught.value.row == 8
    # What lies between the events is nobody's, so its order is no fault.
    check_pulses(events, **PULSES | {"time_P": changed(PULSES["time_P"], 6, 10**6)}, file="x")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_ranges_equal_a_loop(pairs):
    first, counts = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    assert ranges(first, counts).tolist() == [f + i for f, n in pairs for i in range(n)]
