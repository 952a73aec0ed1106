"""`iceaggr inspect`: what is in a Kaggle-format folder, beside the published figures of the real data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError
from lab_shared.files import make_folder

from iceaggr.data.kaggle import KaggleFolder, slice_events
from iceaggr.data.prepare import data_label
from iceaggr.data.pulses import Pulses
from iceaggr.realism import compare, save_qq_figure, statistics, table

ENOUGH = 60_000
"""Events from which on the tolerances judge a folder and not its size: one in a hundred events has the most pulses."""


def inspect_folder(folder: Path, *, max_events: int | None = None, plot: Path | None = None) -> dict[str, Any]:
    """Figures of the first `max_events` events of a folder; the comparison as text is under "text".

    plot: also draw quantiles against the published ones into this PNG. Raises UserError for another ending.
    """
    if plot is not None:
        if plot.suffix != ".png":
            raise UserError(f"{plot}: Q-Q plots are drawn as .png")
        make_folder(plot.parent)
    source = KaggleFolder(folder)
    found = statistics(_batches(source, max_events))
    rows = compare(found)
    label = data_label(folder)
    title = f"{int(found['events']):,} events, {int(found['pulses']):,} pulses ({label})"
    notes = [
        "times in ns, charges in p.e., angles in rad; the published charges of auxiliary and of coincident pulses are "
        "those of a few small events"
    ]
    if found["events"] < ENOUGH:
        notes.append(f"fewer than {ENOUGH:,} events: figures that rare bright events decide may miss by chance alone")
    if plot is not None:
        save_qq_figure(found, plot, title)
    return {
        "folder": str(folder),
        "label": label,
        "n_events": int(found["events"]),
        "n_pulses": int(found["pulses"]),
        "n_events_in_folder": source.n_events,
        "split": source.split,
        "labelled": source.labelled,
        "batches": len(source.batch_ids),
        "statistics": found,
        "comparison": [
            {"quantity": r.quantity, "real": r.real, "here": r.here, "tolerance": r.tolerance, "ok": r.ok} for r in rows
        ],
        "text": "\n".join([title, "", table(rows), "", *notes]),
    }


def _batches(source: KaggleFolder, max_events: int | None) -> Iterator[Pulses]:
    left = source.n_events if max_events is None else max_events
    for batch_id in source.batch_ids:
        if left <= 0:
            return
        pulses = source.read_batch(batch_id)
        yield pulses if pulses.n_events <= left else slice_events(pulses, 0, left)
        left -= pulses.n_events
