"""Reading and writing parquet so that every way a file can be wrong has a named error.

polars is imported inside the functions, because training works from the event store and does without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iceaggr.data.schema import (
    ColumnTypeError,
    CorruptFileError,
    DataError,
    MissingColumnError,
    MissingFileError,
    NullValueError,
)

if TYPE_CHECKING:
    import polars as pl


@contextmanager
def named_errors(file: Path) -> Iterator[None]:
    """Turns whatever polars raises for an unreadable file, a panic of its Rust code included, into our
    error.
    """
    import polars as pl

    try:
        yield
    except DataError:
        raise
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CorruptFileError(f"not readable as parquet ({reason[0]}); fetch or write it again", file=file) from error


def scan(file: Path) -> pl.LazyFrame:
    """A lazy scan of a parquet file whose two end markers are in place."""
    import polars as pl

    if not file.exists():
        raise MissingFileError("no such file", file=file)
    with file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        ends = []
        for at in (0, max(size - 4, 0)):
            handle.seek(at)
            ends.append(handle.read(4))
    if size < 12 or ends != [b"PAR1", b"PAR1"]:
        raise CorruptFileError(
            f"cut short or not parquet: its {size} bytes do not begin and end with PAR1; fetch or write it again",
            file=file,
        )
    with named_errors(file):
        table = pl.scan_parquet(file)
        table.collect_schema()
    return table


def read_columns(file: Path, schema: dict[str, str], *, where: pl.Expr | None = None) -> dict[str, np.ndarray]:
    """The named columns in the contract's types; rows where `where` holds.

    Integers of any width are accepted where their values fit, and any float for a float; nothing else is
    cast.
    """
    import polars as pl

    table = scan(file)
    found = table.collect_schema()
    for name, kind in schema.items():
        if name not in found:
            raise MissingColumnError(f"no column {name!r}; it has {', '.join(found.names())}", file=file)
        dtype = found[name]
        if not {
            "I": dtype.is_integer(),
            "F": dtype.is_float(),
            "B": dtype == pl.Boolean,
            "S": dtype == pl.String,
        }[kind[0]]:
            raise ColumnTypeError(f"column {name!r} is {dtype}, which is not {kind} without loss", file=file)
    with named_errors(file):
        rows = (table if where is None else table.filter(where)).select(schema.keys()).collect()
    columns = {}
    for name, kind in schema.items():
        column = rows[name]
        if column.null_count():
            raise NullValueError(
                f"column {name!r} has no value here", file=file, row=int(column.is_null().arg_max() or 0)
            )
        if kind[0] == "I":  # wide until the range checks have seen the values
            if column.dtype == pl.UInt64 and len(column) and int(column.max()) >= 2**63:  # type: ignore[arg-type]
                raise ColumnTypeError(f"column {name!r} has values beyond int64", file=file)
            column = column.cast(pl.Int64)
        elif kind[0] == "F":
            column = column.cast(pl.Float64)
        columns[name] = column.to_numpy()
    return columns


def write_table(path: str | Path, table: pl.DataFrame, schema: dict[str, str]) -> None:
    import polars as pl

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        exact = table.select(pl.col(name).cast(getattr(pl, kind)) for name, kind in schema.items())
        exact.write_parquet(part, compression="snappy", row_group_size=max(table.height, 1))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
