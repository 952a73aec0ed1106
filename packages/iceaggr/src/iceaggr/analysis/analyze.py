"""`iceaggr analyze RUN`: what a trained model uses, where it looks, how it carries it, and how wrong it is.

Writes RUN/analysis/NAME.{npz,csv,png} for every study, RUN/analysis.json with the single numbers and the tables, and
RUN/analysis.html with everything. Only events that the run was not trained on are looked at.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.page import Page
from lab_shared.progress import Counter
from lab_shared.runs import pick_device

from iceaggr.analysis import direction_head, errors, features, heads, residuals
from iceaggr.analysis.columns import columns_of
from iceaggr.analysis.inside import look_inside, token_batches
from iceaggr.analysis.output import add_to_page, as_text, write_files
from iceaggr.analysis.sample import Sample, held_out_events
from iceaggr.analysis.study import Absent, Study
from iceaggr.config import TrainConfig
from iceaggr.directions import angles_to_vector
from iceaggr.models.build import Model
from iceaggr.models.flat import FlatTransformer
from iceaggr.predict import load_run, predict_events
from iceaggr.run_files import read_run
from iceaggr.summaries import Columns

FILE, PAGE, FOLDER = "analysis.json", "analysis.html", "analysis"
INSIDE = (
    features.NORMS, features.PERMUTATION, residuals.SCALES, heads.SPECIALISATION, heads.SELF, heads.MULTIPLICITY,
    residuals.NORMS, residuals.PADDED,
)  # fmt: skip
"""(name, title) of the studies that only a flat model has."""


@dataclass(frozen=True)
class Sizes:
    """Most events for what runs the model again: to predict those of a folder, to walk through it, to permute features.

    A minute is enough for them with the quick model on two cores, or seconds with a large one on a GPU.
    """

    predicted: int
    inside: int
    permuted: int

    @classmethod
    def on(
        cls, device: torch.device, max_events: int | None, *, inside: int | None = None, permuted: int | None = None
    ) -> Sizes:
        """What suits the device, or what is asked for; never more than max_events."""
        most = cls(100_000, 20_000, 20_000) if device.type == "cuda" else cls(5_000, 1_500, 600)
        most = replace(most, inside=inside or most.inside, permuted=permuted or most.permuted)
        return most if max_events is None else cls(*(min(max_events, n) for n in astuple(most)))


def analyze_run(
    run_dir: Path,
    *,
    data: Path | None = None,
    max_events: int | None = None,
    device: str | None = None,
    drop_seen: bool = False,
    inside: int | None = None,
    permuted: int | None = None,
) -> dict[str, Any]:
    """Analyse a finished run and write its files; returns what analysis.json holds, and the text of all tables.

    Args:
        data: labelled folder; default the run's own held-out events, with the predictions its evaluation saved.
        max_events: look at no more events; default all that have saved predictions, `Sizes` for what runs the model.
        drop_seen: skip events of `data` that the run was trained on instead of refusing.
        inside: events to walk through the model with; default what takes about a minute.
        permuted: events to permute features of, likewise.

    Raises:
        UserError: no finished run, its events or its scores are not there, or there is one event alone.
        SplitError: the events are unlabelled or were trained on.
    """
    run_dir, where = Path(run_dir), pick_device(device)
    sizes = Sizes.on(where, max_events, inside=inside, permuted=permuted)
    config, model = load_run(run_dir, where)
    if data is None:
        saved = _saved(run_dir)
        scored = saved["event_id"]
        sample = held_out_events(run_dir, config, where, data=None, max_events=max_events, scored=scored)
        predictions = _chosen(saved, sample, run_dir)
    else:
        sample = held_out_events(run_dir, config, where, data=data, max_events=sizes.predicted, drop_seen=drop_seen)
        predictions = _predicted(model, config, sample)
    if min(len(predictions.v_E3), sizes.inside, sizes.permuted) < 2:
        raise UserError("an analysis needs at least two events: standard errors have no meaning with one")
    studies = [
        errors.error_percentiles(predictions, sample.label),
        errors.bias(predictions, sample.label),
        *_studies_of_the_inside(model, config, sample, sizes),
    ]

    for study in studies:
        if isinstance(study, Study):
            write_files(study, run_dir / FOLDER)
    result = {
        "label": sample.label,
        "n_events": int(sample.index_N.size),
        "sizes": asdict(sizes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scalars": {study.name: _for_json(study.scalars) for study in studies if isinstance(study, Study)},
        "tables": {
            study.name: {caption: _lists(columns) for caption, columns in study.tables.items()}
            for study in studies
            if isinstance(study, Study)
        },
        "absent": {study.name: study.reason for study in studies if isinstance(study, Absent)},
        "page": str(run_dir / PAGE),
    }
    atomic_write(run_dir / FILE, json.dumps({k: v for k, v in result.items() if k != "page"}, indent=1) + "\n")
    page = Page(f"iceaggr · analysis of {run_dir.resolve().name}", f"What the model has learnt, {sample.label}")
    page.text(
        f"{result['parameters']:,} parameters, {result['n_events']:,} held-out events of **{sample.label}** "
        f"({min(sizes.inside, sample.index_N.size):,} of them for the inside, "
        f"{min(sizes.permuted, sample.index_N.size):,} for permutations)."
    )
    for study in studies:
        add_to_page(page, study)
    page.write(run_dir / PAGE)
    title = f"{result['n_events']:,} held-out events ({sample.label})"
    return result | {"text": "\n\n".join([title, *map(as_text, studies), f"page: {run_dir / PAGE}"])}


def _saved(run_dir: Path) -> dict[str, np.ndarray]:
    """What the run's own evaluation left."""
    saved = read_run(run_dir).predictions
    if saved is None:
        raise UserError(f"{run_dir} has no predictions.npz: score it with `iceaggr evaluate {run_dir}`")
    return saved


def _chosen(saved: dict[str, np.ndarray], sample: Sample, run_dir: Path) -> errors.Predictions:
    """What the run's own evaluation predicted for the sample."""
    ids = sample.cache.event_id[sample.index_N]
    rows = np.flatnonzero(np.isin(saved["event_id"], ids))
    rows = rows[np.argsort(saved["event_id"][rows])]
    known = angles_to_vector(saved["azimuth"][rows], saved["zenith"][rows])
    if len(rows) != len(ids) or not np.allclose(known, sample.cache.direction_E3[sample.index_N][np.argsort(ids)]):
        raise UserError(
            f"the events found for {run_dir} are not those of its predictions.npz (the data was made again since, or "
            f"on another kind of device): score it here with `iceaggr evaluate {run_dir}`, or give --data a labelled "
            "folder"
        )
    predicted_N3 = angles_to_vector(saved["pred_azimuth"][rows], saved["pred_zenith"][rows])
    return errors.Predictions(predicted_N3, known, saved["n_pulses"][rows])


def _predicted(model: Model, config: TrainConfig, sample: Sample) -> errors.Predictions:
    """Predictions for the sample, in the number format of the run's evaluation."""
    index_N, cache = sample.index_N, sample.cache
    with Counter("predicting", index_N.size, "events") as counter:
        v_N3 = predict_events(model, cache, index_N, config, sample.tables, counter).astype(np.float64)
    return errors.Predictions(v_N3, cache.direction_E3[index_N], cache.n_pulses_E[index_N])


def _studies_of_the_inside(model: Model, config: TrainConfig, sample: Sample, sizes: Sizes) -> list[Study | Absent]:
    """What a flat model has; of another the weights of its head."""
    label = sample.label
    if not isinstance(model, FlatTransformer):
        reason = f"it is written for flat transformers over DOMs, and this model is a {type(model).__name__}"
        head = direction_head.direction_head(model.head, None, label)
        return [*(Absent(*names, reason) for names in INSIDE), head]
    columns = columns_of(config.model)
    inside = look_inside(model, sample.cache, sample.spread(sizes.inside), config, sample.tables)
    batches = list(token_batches(sample.cache, sample.spread(sizes.permuted), config, sample.tables))
    return [
        features.column_norms(model, columns, features.deviations(batches)),
        features.permutation(model, batches, config, columns, label),
        residuals.scales(model),
        heads.specialisation(inside, label),
        heads.self_attention(inside, label),
        heads.multiplicity(inside, label),
        residuals.norms(inside, label),
        residuals.padded_dimensions(model, inside, label),
        direction_head.direction_head(model.head, inside.hidden_EU, label),
    ]


def _for_json(scalars: dict[str, float | str]) -> dict[str, float | str | None]:
    """JSON has no NaN and no infinity."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in scalars.items()}


def _lists(columns: Columns) -> dict[str, list[Any]]:
    """A table for JSON, column by column, floats to six digits."""
    return {
        name: [_six_digits(x) if isinstance(x, float) else x for x in values.tolist()]
        for name, values in columns.items()
    }


def _six_digits(x: float) -> float | None:
    return float(f"{x:.6g}") if math.isfinite(x) else None
