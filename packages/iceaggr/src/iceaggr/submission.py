"""The file the competition scores: event_id, azimuth, zenith, one row per event, in the order of the folder."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np
from lab_shared.errors import UserError

from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.parquet import read_columns
from iceaggr.data.schema import SUBMISSION_COLUMNS


class SubmissionError(UserError):
    """A submission the competition would refuse or score wrongly; the message names file, row and value."""


def angle_text(angle_E: np.ndarray) -> list[str]:
    """Radians with nine decimals, rounded down: rounding up could carry an angle past 2 pi or pi."""
    return [f"{x:.9f}" for x in np.floor(angle_E * 1e9) / 1e9]


def check_sample(source: KaggleFolder, event_ids: np.ndarray) -> None:
    """Raise SubmissionError when the folder's sample_submission.parquet names other events than `event_ids` (E,)."""
    sample = source.path / "sample_submission.parquet"
    if source.split != "test" or not sample.exists():
        return
    wanted = read_columns(sample, {"event_id": SUBMISSION_COLUMNS["event_id"]})["event_id"]
    if (odd := np.setxor1d(wanted, event_ids)).size:
        where = "the batch files lack" if odd[0] in wanted else "only the batch files have"
        raise SubmissionError(f"{sample}: {odd.size} events differ from the batch files; {where} event {odd[0]}")


def check_submission(path: Path, event_ids: Iterable[int], *, strict: bool = True) -> int:
    """Number of rows of a csv that has the competition's format; `event_ids` are those it must have, in order.

    strict: no column beside event_id, azimuth, zenith; else more may follow them. Memory does not grow with the file.

    Raises:
        SubmissionError: columns or their order, a missing, repeated, foreign or displaced event id, an angle that is no
            number or outside azimuth [0, 2 pi), zenith [0, pi].
    """
    columns = list(SUBMISSION_COLUMNS)
    with Path(path).open(newline="") as handle:
        reader = csv.reader(handle)
        header = next(reader, [])
        if header[:3] != columns or (strict and header != columns):
            raise SubmissionError(f"{path}: columns {', '.join(header) or 'none'}; need {', '.join(columns)}")
        n = 0
        for n, (row, event_id) in enumerate(zip_longest(reader, event_ids), start=1):
            where = f"{path}, row {n}"
            if row is None:
                raise SubmissionError(f"{where}: missing; event {event_id} and all after it have no prediction")
            if event_id is None:
                raise SubmissionError(f"{where}: {','.join(row)} is one row too many")
            try:
                found, azimuth, zenith = int(row[0]), float(row[1]), float(row[2])
            except (ValueError, IndexError) as error:
                raise SubmissionError(f"{where}: {','.join(row)} is not an id and two numbers") from error
            if found != event_id:
                raise SubmissionError(f"{where}: event_id {found}, where event {event_id} belongs")
            # a NaN fails every comparison
            if not 0 <= azimuth < 2 * math.pi:
                raise SubmissionError(f"{where}: azimuth {azimuth} of event {found} is not in [0, 2 pi)")
            if not 0 <= zenith <= math.pi:
                raise SubmissionError(f"{where}: zenith {zenith} of event {found} is not in [0, pi]")
    return n
