"""Studies as files, as a page and as text: RUN/analysis/NAME.{npz,csv,png} and blocks of one HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page
from lab_shared.plotting import to_png
from lab_shared.report_files import csv_text

from iceaggr.analysis.study import Absent, Study
from iceaggr.summaries import Columns

_LONGEST_PRINTED = 24  # rows; longer tables are in the csv and on the page


def write_files(study: Study, folder: Path) -> None:
    """NAME.npz with the arrays and all columns, NAME.png, and a csv per table: NAME.csv, then NAME-CAPTION.csv."""
    make_folder(folder)
    arrays = dict(study.arrays)
    for i, (caption, columns) in enumerate(study.tables.items()):
        stem = study.name if i == 0 else f"{study.name}-{_slug(caption)}"
        atomic_write(folder / f"{stem}.csv", csv_text(columns))
        arrays |= {f"{_slug(caption)}/{_slug(name)}": values for name, values in columns.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # typed as if a name could be allow_pickle
    atomic_write(folder / f"{study.name}.npz", buffer.getvalue())
    atomic_write(folder / f"{study.name}.png", to_png(study.figure))


def add_to_page(page: Page, study: Study | Absent) -> None:
    """A section: what it is, the figure, the tables."""
    page.section(study.title)
    if isinstance(study, Absent):
        page.text(f"Does not apply: {study.reason}.")
        return
    page.text(study.caption)
    page.figure(study.figure, f"{study.title}.", alt=f"{study.title}. {study.caption}", width=study.width)
    for caption, columns in study.tables.items():
        page.table(list(columns), cells(columns), caption[:1].upper() + caption[1:] + ".")


def as_text(study: Study | Absent) -> str:
    """The study for a terminal: its tables, aligned; of a long table only where it is."""
    if isinstance(study, Absent):
        return f"{study.title}: does not apply, {study.reason}"
    parts = [study.title]
    for caption, columns in study.tables.items():
        rows = cells(columns)
        if len(rows) > _LONGEST_PRINTED:
            parts += [f"  {caption}: {len(rows)} rows, in the page and the csv"]
            parts += [f"    {name}: {value(x)}" for name, x in study.scalars.items()]
        else:
            parts += [f"  {caption}", aligned([list(columns), *rows])]
    return "\n".join(parts)


def cells(columns: Columns) -> list[list[str]]:
    """Rows of a table."""
    return [[value(x) for x in row] for row in zip(*(c.tolist() for c in columns.values()), strict=True)]


def value(x: Any) -> str:
    """A number in four digits, a dash for NaN or nothing, a string as it is."""
    if x is None:
        return "–"
    if isinstance(x, float):
        return "–" if np.isnan(x) else f"{x:.4g}"
    return str(x)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, the others to the right, indented."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        numbers = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join(["   ", first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
