"""What every report reads and leaves: JSON files of a run's folder, settings as rows, figures beside their numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page, Width
from lab_shared.plotting import to_png


def read_object(path: Path, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    """The JSON object in a file, None without the file. Raises UserError otherwise, or without `needed` keys."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run the command that wrote it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: delete it and run the command that wrote it")
    if absent := [name for name in needed if name not in value]:
        raise UserError(f"{path} lacks {', '.join(absent)}: run the command that wrote it again")
    return value


def flat_rows(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) of a nested mapping, such as a configuration; a list's items are parted by spaces."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += flat_rows(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            rows.append((prefix + key, " ".join(map(str, item))))
        else:
            rows.append((prefix + key, "–" if item is None else str(item)))
    return rows


def csv_text(columns: Mapping[str, Any]) -> str:
    """Columns (lists or arrays of one length) as CSV under their names. Raises ValueError when the lengths differ."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    lists = (values.tolist() if hasattr(values, "tolist") else values for values in columns.values())
    writer.writerows(zip(*lists, strict=True))
    return text.getvalue()


def keep_figure(
    page: Page, folder: Path, name: str, figure: Any, columns: Mapping[str, Any], caption: str, width: Width = "half"
) -> None:
    """Put a matplotlib figure on the page, and as NAME.png beside the numbers it shows, NAME.csv, into `folder`."""
    make_folder(folder)
    atomic_write(folder / f"{name}.png", to_png(figure))
    atomic_write(folder / f"{name}.csv", csv_text(columns))
    page.figure(figure, caption, alt=caption, width=width)
