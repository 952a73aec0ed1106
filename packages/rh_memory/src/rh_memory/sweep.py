"""Presets over seeds as one list of jobs: training, if asked what the memories do, and one table of scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.config import field_names, from_json, to_json
from lab_shared.errors import UserError
from lab_shared.sweep import Engine, Job, run_jobs

from rh_memory.config import PRESETS, TrainConfig
from rh_memory.records import collect
from rh_memory.train import resume, train

OWN_FLAGS = {"seed": "--seeds", "steps": "--steps", "data.source": "--source"}
"""Fields that a sweep sets itself."""


def train_job(
    out: Path, *, preset: str, seed: int, source: str, steps: int | None, fields: Sequence[str] = ()
) -> dict[str, Any]:
    """Train one preset with one seed in the folder `out`, or go on with the run that is there; its summary."""
    if (out / "config.json").is_file():
        resume(out)
    else:
        train(replace(run_config(preset, seed, source, steps, fields), wandb="disabled"), out)
    return json.loads((out / "DONE.json").read_text())["summary"]


def run_config(preset: str, seed: int, source: str, steps: int | None, fields: Sequence[str]) -> TrainConfig:
    """What a run of a sweep is trained with. Raises what `with_fields` does, ConfigError for a seed out of range."""
    config = with_fields(PRESETS[preset][1], fields)
    data = replace(config.data, source=source)  # type: ignore[arg-type]
    config = replace(config, seed=seed, steps=steps or config.steps, data=data)
    to_json(config)  # tells numbers out of range
    return config


def with_fields(config: TrainConfig, fields: Sequence[str]) -> TrainConfig:
    """The configuration with "section.field=value" put in, the value as JSON or as plain text.

    Raises UserError for what is no such pair, a field that there is not, or a value of another type.
    """
    tree = json.loads(to_json(config))
    for pair in fields:
        name, equals, text = pair.partition("=")
        if not equals or name not in field_names(config):
            near = get_close_matches(name, field_names(config), 1) or ["optim.lr"]
            raise UserError(
                f"--set {pair}: give FIELD=VALUE, such as {near[0]}=...; `rh-memory train e0 --help` has all"
            )
        if name in OWN_FLAGS:
            raise UserError(f"--set {pair}: a sweep has {OWN_FLAGS[name]} for that")
        *path, last = name.split(".")
        section = tree
        for part in path:
            section = section[part]
        try:
            section[last] = json.loads(text)
        except json.JSONDecodeError:
            section[last] = text
    return from_json(TrainConfig, json.dumps(tree))


def diagnose_job(out: Path, *, run: str) -> dict[str, Any]:
    """Diagnose the run OUT/../RUN, which gets its diagnostics.json; the headlines."""
    from rh_memory.diagnostics import diagnose
    from rh_memory.diagnostics.aggregate import headlines

    return headlines(diagnose(out.parent / run))


def sweep(
    presets: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    source: str = "zeta",
    steps: int | None = None,
    fields: Sequence[str] = (),
    diagnose: bool = False,
    collect_in: Path | None = None,
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
) -> str:
    """Train each preset with each seed under `out`, skipping what is done; returns the table of scores.

    fields: what the runs have otherwise than their presets, see `with_fields`.
    diagnose: each run is followed by a job of its own that diagnoses it. collect_in: folder to copy the small files of
    all runs to (see `records.collect`), for `rh-memory verdicts` and for keeping; of unfinished ones too when a job
    failed or the sweep was stopped. The same command then goes on from the runs' checkpoints.

    Raises UserError naming the jobs that failed, once all others have run.
    """
    jobs = sweep_jobs(presets, seeds, source=source, steps=steps, fields=fields, diagnose=diagnose)
    try:
        done = run_jobs(jobs, out, engine=engine, address=address, workers=workers, gpus_per_job=gpus_per_job)
    finally:  # also when a job failed, or time ran out: what has begun can be kept, and says how far it came
        if collect_in is not None:
            runs = [out / run_name(preset, seed, source, steps, fields) for preset in presets for seed in seeds]
            collect([run for run in runs if (run / "config.json").is_file()], collect_in)
    rows = {preset: [done[run_name(preset, seed, source, steps, fields)] for seed in seeds] for preset in presets}
    return table(rows, seeds)


def sweep_jobs(
    presets: Sequence[str],
    seeds: Sequence[int],
    *,
    source: str,
    steps: int | None,
    fields: Sequence[str] = (),
    diagnose: bool,
) -> list[Job]:
    """The jobs of `sweep`: one for each preset and seed, and with `diagnose` one behind each of them.

    Raises UserError for a preset or seed that is named twice, and what `run_config` raises.
    """
    for what, names in (("preset", presets), ("--seeds", seeds)):
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"{what} {twice[0]} is named twice: a sweep runs each once")
    jobs: list[Job] = []
    for preset in presets:
        for seed in seeds:
            run_config(preset, seed, source, steps, fields)  # a wrong field is to be told before anything runs
            kwargs = {"preset": preset, "seed": seed, "source": source, "steps": steps, "fields": list(fields)}
            run = Job(run_name(preset, seed, source, steps, fields), train_job, kwargs)
            jobs.append(run)
            if diagnose:  # right behind its run, so that a sweep cut short leaves whole seeds
                jobs.append(Job(f"{run.name}-diagnosis", diagnose_job, {"run": run.name}, (run.name,)))
    return jobs


def run_name(preset: str, seed: int, source: str = "zeta", steps: int | None = None, fields: Sequence[str] = ()) -> str:
    """The name of a run of a sweep, and of its folder: e0-rope-gue-500steps-optimizer-muon-mirror-seed7."""
    suffix = ("" if source == "zeta" else f"-{source}") + ("" if steps is None else f"-{steps}steps")
    for pair in fields:
        path, _, value = pair.partition("=")
        name, value = path.rpartition(".")[2], value.replace("/", "_")
        suffix += f"-{name}" if value == "true" else f"-no-{name}" if value == "false" else f"-{name}-{value}"
    return f"{preset}{suffix}-seed{seed}"


def table(rows: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> str:
    """Every seed's nll_last, with mean and standard deviation over seeds (no best-of)."""
    labels = {row["label"] for found in rows.values() for row in found}
    lines = [
        f"nll_last in nats per unfolded spacing, lower is better; {', '.join(sorted(labels))}",
        f"{'preset':20}" + "".join(f"{f'seed {seed}':>12}" for seed in seeds) + f"{'mean':>12}{'std':>12}",
    ]
    for preset, found in rows.items():
        values = np.array([row["nll_last"] for row in found])
        spread = f"{values.std(ddof=1):12.4f}" if len(values) > 1 else f"{'':12}"
        lines.append(f"{preset:20}" + "".join(f"{v:12.4f}" for v in values) + f"{values.mean():12.4f}{spread}")
    return "\n".join(lines)
