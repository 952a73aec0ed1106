"""The IceCube-86 detector: where the 5160 DOMs are, how they see, and the ice around them.

Detector frame: x, y, z in metres, z upwards, origin near the centre of the array; depth below the surface is
1948.07 m - z. sensor_id = 60 * (string - 1) + (dom - 1) with dom 1 on top, as in the Kaggle files.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from numpy.typing import NDArray

from iceaggr import geometry_table

N_SENSORS = 5160
DOMS_PER_STRING = 60
SURFACE_Z = 1948.07
"""Metres from the origin of the detector frame up to the ice surface."""
HIGH_QE_GAIN = 1.35
_COLUMNS = ("sensor_id", "x", "y", "z")
# Python's own syntax also takes 1_000 and the digits of other scripts.
_INTEGER = re.compile(r"\s*[-+]?\d{1,9}\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|inf)\s*", re.ASCII | re.IGNORECASE)


class GeometryError(UserError):
    """A geometry file that is not one row per sensor with finite positions; the message names file and row."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """The array, one row per sensor_id (0..5159)."""

    xyz: NDArray[np.float64]
    """(5160, 3) m."""
    rde: NDArray[np.float64]
    """(5160,) light collection relative to a standard DOM: 1 or 1.35."""
    dead: NDArray[np.bool_]
    """(5160,) True for the DOMs that never report a pulse."""
    scattering: NDArray[np.float64]
    """(5160,) effective scattering length of the ice at the DOM, m."""
    absorption: NDArray[np.float64]
    """(5160,) absorption length of the ice at the DOM, m."""

    @property
    def string(self) -> NDArray[np.int64]:
        """(5160,) string number, 1..86; strings 79..86 are DeepCore."""
        return np.arange(N_SENSORS) // DOMS_PER_STRING + 1

    @property
    def dom(self) -> NDArray[np.int64]:
        """(5160,) position on the string, 1 (top) .. 60."""
        return np.arange(N_SENSORS) % DOMS_PER_STRING + 1

    @property
    def depth(self) -> NDArray[np.float64]:
        """(5160,) metres below the ice surface."""
        return SURFACE_Z - self.xyz[:, 2]


def ice_properties(depth: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Effective scattering and absorption length (m) at `depth` (m), linear between the 110 tabulated depths.

    Above 1398.4 m and below 2488.4 m the outermost values are used. Source: arXiv:1301.5361.
    """
    rows = np.array([row.split("/") for row in geometry_table.ICE.split()], dtype=np.float64)
    return np.interp(depth, rows[:, 0], rows[:, 1]), np.interp(depth, rows[:, 0], rows[:, 2])


@cache
def icecube86() -> Geometry:
    """The 86-string array generated from its spacing rules; equal to Kaggle's sensor_geometry.csv to the last
    digit."""
    return _with_ice(_positions())


def read_geometry_csv(path: str | Path) -> Geometry:
    """The array of a Kaggle-format sensor_geometry.csv (sensor_id, x, y, z in m; 5160 rows).

    Quantum efficiencies and dead DOMs are those of IceCube-86, by sensor_id; ice is looked up at the file's
    depths.

    Raises:
        FileNotFoundError: no such file. GeometryError: a column is missing, a row does not parse, an id repeats
        or is out of range, a coordinate is not
            finite, or there are not 5160 rows. The message names the file, the row and the value.
    """
    path = Path(path)
    xyz = np.full((N_SENSORS, 3), np.nan)
    n_rows = 0
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GeometryError(f"{path} is not text: {error}") from error
    with io.StringIO(text, newline="") as file:
        rows = _rows(csv.DictReader(file), path)
        names = next(rows)
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise GeometryError(f"{path}: missing column {', '.join(missing)}; the header must name {_COLUMNS}")
        for n_rows, row in enumerate(rows, start=1):
            where = f"{path}, row {n_rows}"
            cells = [row[name] for name in _COLUMNS]
            if not _INTEGER.fullmatch(cells[0] or "") or not all(_NUMBER.fullmatch(cell or "") for cell in cells):
                raise GeometryError(f"{where}: not numbers: {cells!r:.200}")
            sensor, point = int(cells[0]), [float(cell) for cell in cells[1:]]
            if not 0 <= sensor < N_SENSORS:
                raise GeometryError(f"{where}: sensor_id {sensor} is outside 0..{N_SENSORS - 1}")
            if not np.isnan(xyz[sensor, 0]):
                raise GeometryError(f"{where}: sensor_id {sensor} appears twice")
            if not np.isfinite(point).all():
                raise GeometryError(f"{where}: sensor_id {sensor} has the position {point}; it must be finite")
            xyz[sensor] = point
    if n_rows != N_SENSORS:
        raise GeometryError(f"{path}: {n_rows} sensors; IceCube has {N_SENSORS} (86 strings of 60)")
    return _with_ice(xyz)


def _rows(reader: csv.DictReader[str], path: Path) -> Iterator[dict[str, Any]]:
    """The column names as keys, then every row. Raises GeometryError for text that is no csv."""
    try:
        yield dict.fromkeys(reader.fieldnames or ())
        yield from reader
    except csv.Error as error:
        raise GeometryError(f"{path}, line {reader.line_num}: {error}") from error


def write_geometry_csv(path: str | Path, geometry: Geometry) -> None:
    """Write the array as Kaggle's sensor_geometry.csv: byte-identical to the real file for `icecube86()`.

    Raises StorageError.
    """
    lines = [",".join(_COLUMNS)]
    lines += [f"{i},{x!r},{y!r},{z!r}" for i, (x, y, z) in enumerate(geometry.xyz.tolist())]
    atomic_write(Path(path), "\n".join(lines) + "\n")


def _with_ice(xyz: NDArray[np.float64]) -> Geometry:
    scattering, absorption = ice_properties(SURFACE_Z - xyz[:, 2])
    rde = np.where(_marked(geometry_table.HIGH_QE), HIGH_QE_GAIN, 1.0)
    arrays = (xyz, rde, _marked(geometry_table.DEAD), scattering, absorption)
    for array in arrays:
        array.setflags(write=False)  # icecube86() hands out one cached object
    return Geometry(*arrays)


def _positions() -> NDArray[np.float64]:
    """(5160, 3) m. Depths are integers (10 um) until the end: rounding to centimetres must be exact."""
    cm = np.zeros((86, DOMS_PER_STRING, 3), dtype=np.int64)
    for line in geometry_table.STRINGS.strip().splitlines():
        number, x, y, top, *rest = line.split()
        row = cm[int(number) - 1]
        row[:, :2] = round(100 * float(x)), round(100 * float(y))
        if int(number) < 79:
            row[:, 2] = _hang(top, 17_02075, DOMS_PER_STRING)
        else:
            row[:10, 2] = _hang(top, 10_01205, 10)
            row[10:, 2] = _hang(rest.pop(0), 7_00855, 50)
        for exception in rest:
            doms, lift = _exception(exception)
            row[doms, 2] += lift
    cm[20, :, :2] += np.array([pair.split(",") for pair in geometry_table.STRING_21_DRIFT_CM.split()], dtype=int)
    return cm.reshape(-1, 3) / 100


def _hang(top: str, step: int, n: int) -> NDArray[np.int64]:
    """z in cm of n DOMs below `top` (m) every `step` (10 um), rounded up to the centimetre."""
    return -((step * np.arange(n) - round(1e5 * float(top))) // 1000)


def _exception(text: str) -> tuple[slice, int]:
    """'60+379', '2-17-25' or 'even+100' -> (rows of the string, cm upwards)."""
    sign = max(text.rfind("+"), text.rfind("-"))
    doms, lift = text[:sign], int(text[sign:])
    if doms == "even":
        return slice(1, None, 2), lift
    first, _, last = doms.partition("-")
    return slice(int(first) - 1, int(last or first)), lift


def _marked(table: str) -> NDArray[np.bool_]:
    """(5160,) True where a 'string:dom,first-last,...' table names the DOM."""
    marked = np.zeros((86, DOMS_PER_STRING), dtype=bool)
    for entry in table.split():
        string, doms = entry.split(":")
        for span in doms.split(","):
            first, _, last = span.partition("-")
            marked[int(string) - 1, int(first) - 1 : int(last or first)] = True
    return marked.reshape(-1)
