"""What a Prometheus parquet file holds, read in blocks of rows.

A file of Prometheus (arXiv:2304.14526) has a row per simulated neutrino with two structs. `photons` holds lists, one
entry per detected photon: sensor_pos_x, _y, _z (m), string_id, sensor_id, t (ns), and in derived sets charge (p.e.).
`mc_truth` holds initial_state_zenith, _azimuth, _energy (GeV), _type (PDG), _x, _y, _z and interaction (1: charged
current).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iceaggr.data.parquet import named_errors, scan
from iceaggr.data.schema import MOST_CHARGE, DataError, MissingColumnError
from iceaggr.directions import angles_to_vector

if TYPE_CHECKING:
    import polars as pl

PHOTONS = ("sensor_pos_x", "sensor_pos_y", "sensor_pos_z", "string_id", "sensor_id", "t")
TRUTH = ("initial_state_zenith", "initial_state_azimuth")


_LARGEST = {"t": 1e15, "charge": MOST_CHARGE}
"""Absolute values from which a photon makes no sense: ns (11 days), p.e.; of the other columns 2^31."""


@contextmanager
def sound_columns(file: Path) -> Iterator[None]:
    """Turn what polars raises for lists of unequal length or for words among numbers into DataError."""
    import polars as pl

    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(f"not as Prometheus writes it ({str(error).splitlines()[0]})", file=file) from error


def check_layout(file: Path) -> None:
    """Raise MissingColumnError or DataError for a file that is not laid out as the docstring says."""
    import polars as pl

    schema = scan(file).collect_schema()
    for struct, names in (("photons", PHOTONS), ("mc_truth", TRUTH)):
        if struct not in schema:
            raise MissingColumnError(f"no column {struct!r}; it has {', '.join(schema.names())}", file=file)
        kind = schema[struct]
        if not isinstance(kind, pl.Struct):
            raise DataError(f"column {struct!r} is {kind} and not a struct", file=file)
        found = [field.name for field in kind.fields]
        if absent := [name for name in names if name not in found]:
            raise MissingColumnError(f"{struct} lacks {', '.join(absent)}; it has {', '.join(found)}", file=file)


def count_rows(file: Path) -> int:
    """Rows, one per neutrino. Raises DataError for a file that is no parquet."""
    import polars as pl

    with named_errors(file):
        return int(scan(file).select(pl.len()).collect().item())


def read_block(file: Path, first: int, n: int) -> pl.DataFrame:
    """The two structs of rows first to first + n."""
    with named_errors(file):
        return scan(file).select("photons", "mc_truth").slice(first, n).collect()


def photons_of(block: pl.DataFrame, file: Path) -> pl.DataFrame:
    """One row per photon: row of its event in the block, the columns of `PHOTONS`, charge.

    Raises DataError for photons whose place, time or charge is none; `file` is for its message.
    """
    import polars as pl

    lists = block.select("photons").unnest("photons")
    names = [*PHOTONS, *(["charge"] if "charge" in lists.columns else [])]
    # an event without light may hold a null or an empty list
    with sound_columns(file):
        table = lists.select(names).with_row_index("row").explode(names).drop_nulls(["t"])
        whole = [pl.col(name).cast(pl.Int64) for name in ("string_id", "sensor_id")]
        real = [pl.col(name).cast(pl.Float64) for name in names if not name.endswith("_id")]
        table = table.with_columns(*whole, *real)
    for name in names:
        size = pl.col(name).abs() if name != "charge" else pl.when(pl.col(name) >= 0).then(pl.col(name))
        fits = (size < _LARGEST.get(name, 1 << 31)).fill_null(value=False)
        if (bad := table.filter(~fits)).height:
            raise DataError(f"a photon has {name} {bad[name][0]}, in event {bad['row'][0]} of its block", file=file)
    return table if "charge" in names else table.with_columns(charge=pl.lit(1.0))


def sensor_keys(photons: pl.DataFrame) -> np.ndarray:
    """string_id << 32 | sensor_id, int64."""
    string, sensor = (photons[name].to_numpy() for name in ("string_id", "sensor_id"))
    return (string << 32) | sensor


def labels_of(block: pl.DataFrame, rows: np.ndarray, direction: str, file: Path) -> np.ndarray:
    """(E, 3) unit vectors to where the neutrinos of these rows came from.

    direction: "travel" where the file's angles are those of the momentum, "origin" where they point back already.
    Raises DataError for an angle that is missing or not finite; `file` is for its message.
    """
    truth = block.select("mc_truth").unnest("mc_truth").select(TRUTH)[rows]
    with sound_columns(file):
        zenith, azimuth = (truth[name].cast(float).to_numpy() for name in TRUTH)
    if not (np.isfinite(zenith).all() and np.isfinite(azimuth).all()):
        raise DataError("an initial_state_zenith or _azimuth is missing or not finite", file=file)
    vector_E3 = angles_to_vector(azimuth, zenith)
    return -vector_E3 if direction == "travel" else vector_E3


def truth_of(block: pl.DataFrame, rows: np.ndarray, event_id: np.ndarray) -> pl.DataFrame | None:
    """event_id, type (track: charged-current muon neutrino), energy and vertex; None where the file does not say."""
    import polars as pl

    names = ("type", "energy", "x", "y", "z")
    table = block.select("mc_truth").unnest("mc_truth")[rows]
    if not {"interaction", *(f"initial_state_{name}" for name in names)} <= set(table.columns):
        return None
    track = (pl.col("initial_state_type").abs() == 14) & (pl.col("interaction") == 1)
    return table.select(
        pl.Series("event_id", event_id),
        type=pl.when(track).then(pl.lit("track")).otherwise(pl.lit("cascade")),
        **{name: pl.col(f"initial_state_{name}").cast(pl.Float64) for name in names[1:]},
    )
