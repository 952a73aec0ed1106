"""What the finished runs of a study say when not all are finished: a study that was cut, or that is still going.

Everything comes from the small files of the run folders (config.json, DONE.json, metrics.jsonl, manifest.json): without
the error of each event there are no intervals over events and no tests over them, as `ablation_report.collect` has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab_shared.config import read_config
from lab_shared.errors import UserError
from lab_shared.run import read_metrics

from iceaggr.ablation_curves import left_plateau
from iceaggr.ablation_stats import Record, over_seeds
from iceaggr.ablations import Study
from iceaggr.config import TrainConfig
from iceaggr.data.prepare import STREAM

_FIGURES = ("mean_deg", "median_deg", "p10", "p25", "p75", "p90", "parameters", "head_rank", "head_rank_untrained")


def so_far(of: Study, out: Path) -> Record:
    """The finished runs in OUT/runs, one by one, by variant, and paired with their controls seed by seed.

    {"name", "label", "budget", "git_sha", "device", "runs", "rows", "contrasts", "unfinished"}. runs: errors (degrees),
    steps, and the training events after which the run left its plateau (None: never). rows and contrasts: means over
    seeds with Student's 95% interval (None for one seed). unfinished: variants that lack all or some of the seeds that
    the others have, with the seeds that are there. "text" has the tables.

    Raises:
        UserError: no run is finished, or they do not share one budget.
    """
    runs = [
        _run(name, folder)
        for name, variant in of.variants.items()
        if variant.scores is None
        for folder in sorted((out / "runs").glob(f"{name}-seed*"))
        if (folder / "DONE.json").is_file()
    ]
    if not runs:
        raise UserError(f"{out}/runs has no finished run of the study {of.name}")
    shared = {key: _one(key, [run.pop(key) for run in runs]) for key in ("budget", "label", "git_sha", "device")}
    of_variant = {name: {run["seed"]: run for run in runs if run["variant"] == name} for name in of.variants}
    seeds = sorted({run["seed"] for run in runs})
    result: Record = {
        "name": of.name,
        **shared,
        "runs": runs,
        "rows": [
            {"name": name, "seeds": list(found), **_mean([run["mean_deg"] for run in found.values()])}
            for name, found in of_variant.items()
            if found
        ],
        "contrasts": [
            contrast._asdict() | _difference(of_variant[contrast.treated], of_variant[contrast.control])
            for contrast in of.contrasts
            if of_variant[contrast.treated].keys() & of_variant[contrast.control].keys()
        ],
        "unfinished": {name: list(found) for name, found in of_variant.items() if list(found) != seeds},
    }
    return result | {"text": text(result)}


def text(result: Record) -> str:
    """The study so far, for a terminal."""
    lines = [f"{result['name']}: {len(result['runs'])} finished runs, {result['device']} ({result['label']})"]
    for run in result["runs"]:
        left = "never" if run["left_plateau"] is None else f"{run['left_plateau']:,}"
        lines.append(
            f"  {run['variant']:14} seed {run['seed']}  mean {run['mean_deg']:6.2f}  median {run['median_deg']:6.2f}  "
            f"{run['steps']:,} steps of {run['events']:,} events, left the plateau after {left}"
        )
    lines += [f"  {c['question']}: {c['mean']:+.2f} degrees, seeds {c['seeds']}" for c in result["contrasts"]]
    lines += [f"  not all seeds of {name}: {seeds or 'none'}" for name, seeds in result["unfinished"].items()]
    return "\n".join(lines)


def _run(variant: str, folder: Path) -> Record:
    config = read_config(TrainConfig, folder / "config.json")
    summary = json.loads((folder / "DONE.json").read_text())["summary"]
    manifest = json.loads((folder / "manifest.json").read_text())
    logged = read_metrics(folder, "train")
    events = round((config.data.train_events or 0) * config.epochs)
    steps = [entry["step"] for entry in logged]
    curve = {
        "events": [round(events * step / steps[-1]) for step in steps],
        "angle_deg": [entry["angle_deg"] for entry in logged],
    }
    return {
        "variant": variant,
        "seed": config.seed,
        **{name: summary[name] for name in _FIGURES},
        "events": events,
        "steps": steps[-1],
        "left_plateau": left_plateau(curve),
        "label": summary["label"],
        "git_sha": manifest["git_sha"] + ("+dirty" if manifest["git_dirty"] else ""),
        "device": manifest["device"],
        "budget": {
            "epochs": config.epochs,
            "held_out": summary["n_events"],
            "stream": config.data.data == STREAM,
            "tokens_per_batch": config.tokens_per_batch,
        },
    }


def _one(what: str, values: Sequence[object]) -> object:
    """The value that all share. Raises UserError."""
    for value in values:
        if value != values[0]:
            raise UserError(f"these runs are not of one study: their {what} is {values[0]} and {value}")
    return values[0]


def _difference(treated: Mapping[int, Record], control: Mapping[int, Record]) -> Record:
    """Treated minus control in degrees over the seeds that both have."""
    seeds = sorted(treated.keys() & control.keys())
    return {"seeds": seeds, **_mean([treated[s]["mean_deg"] - control[s]["mean_deg"] for s in seeds])}


def _mean(values: Sequence[float]) -> Record:
    found = over_seeds(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}
