"""The matrix of an experiment: every run as a job that is skipped when done and goes on where it was stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab_shared.config import from_json, read_config, to_json
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.sweep import Engine, Job, run_jobs

from attn_clustering.config import RunConfig
from attn_clustering.experiments import Experiment, Parts, phase2_config, run_config


def run_job(out: Path, *, config: dict[str, Any], analyze: bool) -> dict[str, Any]:
    """One run, trained (or recalibrated) and, if asked, analysed, in the folder `out`; returns its summary.

    config: a RunConfig as JSON-able dictionaries. Called again it goes on: training from its checkpoint, the analysis
    only if it is not there.
    """
    from attn_clustering.train import train

    summary = train(from_json(RunConfig, json.dumps(config)), Path(out))
    assert summary is not None  # jobs are single processes
    if analyze:
        from attn_clustering.analyze import main as analyze_run

        analyze_run(Path(out))
    return summary


def seeds_of(experiment: Experiment, seeds: int | None = None) -> range:
    """The seeds of an experiment: `seeds` of them (its own number if None), counted from its first."""
    n = experiment.seeds if seeds is None else seeds
    if n < 1:
        raise UserError(f"seeds={n}: at least one seed is needed")
    return range(experiment.first_seed, experiment.first_seed + n)


def jobs(experiment: Experiment, seeds: int | None = None, parts: Parts = "all") -> list[Job]:
    """The jobs of an experiment, named as their runs; recalibrations follow the training they need.

    parts: "endpoint" leaves out what the primary contrast does not rest on: attention variants and recalibrations but
    the first, NoPE from scratch, and the sweep. Runs that share their data, and those that share their shape, stand
    together, so that one process makes data and compiled code once.
    """
    if parts == "endpoint":
        experiment = replace(experiment, attentions=experiment.attentions[:1], recals=experiment.recals[:1], sweep=())
    result: list[Job] = []

    def add(run: RunConfig, *needs: str, analyze: bool = True) -> None:
        kwargs = {"config": json.loads(to_json(run)), "analyze": analyze}
        result.append(Job(run.name, run_job, kwargs, needs))

    for seed in seeds_of(experiment, seeds):
        for attention in experiment.attentions:
            for ordering in experiment.orderings:
                trained = run_config(experiment, attention, ordering, seed)
                add(trained)
                for recal in experiment.recals:
                    add(phase2_config(trained, recal), trained.name)
                if experiment.controls:
                    add(phase2_config(trained, experiment.recals[0], "extra"), trained.name)
                    if parts == "all":
                        add(run_config(experiment, attention, ordering, seed, nope=True))
                if seed == experiment.first_seed:
                    for recal in experiment.sweep:
                        add(phase2_config(trained, recal), trained.name, analyze=False)
    return result


def run_matrix(
    experiment: Experiment,
    out: Path,
    *,
    seeds: int | None = None,
    parts: Parts = "all",
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
) -> str:
    """Run what is not done of an experiment in the folder `out`, then write its report; returns the table of runs.

    seeds: see `seeds_of`; parts: see `jobs`. OUT/experiment.json is the experiment, OUT/NAME a run. Two calls at a time
    may fill one folder with different seeds. Raises UserError for a folder with another experiment, and at the end for
    jobs that failed.
    """
    from attn_clustering.runs import vocabulary

    if experiment.data.language is None:
        vocabulary(experiment.data)  # one complaint about a missing corpus, not one of every job
    listed, out = jobs(experiment, seeds, parts), out.resolve()
    make_folder(out)
    _note_experiment(out, experiment, seeds_of(experiment, seeds))
    summaries = run_jobs(listed, out, engine=engine, address=address, workers=workers, gpus_per_job=gpus_per_job)
    from attn_clustering.report import write

    return f"{table(list(summaries.values()))}\n\nreport: {write(out)}"


def _note_experiment(out: Path, experiment: Experiment, seeds: range) -> None:
    """Write OUT/experiment.json. Seeds may be added from one call to the next; nothing else may change."""
    file, folder = out / "experiment.json", os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # another call may add its seeds at this moment
        if file.exists():
            there = read_config(Experiment, file)
            if replace(there, seeds=1, first_seed=0) != replace(experiment, seeds=1, first_seed=0):
                raise UserError(f"{out} holds another experiment than this {experiment.name}: choose another --out")
            before = seeds_of(there)
            seeds = range(min(seeds.start, before.start), max(seeds.stop, before.stop))
        atomic_write(file, to_json(replace(experiment, seeds=len(seeds), first_seed=seeds.start)))
    finally:
        os.close(folder)


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Validation losses of runs, and whether the recalibrated ones recovered."""
    width = max(len(s["name"]) for s in summaries)
    lines = [f"{'run':{width}}  {'val loss':>9}  {'steps':>7}  {'epochs':>6}  {'against RoPE':>12}"]
    for s in summaries:
        against = f"{s['val_loss_above_parent']:+12.4f}" if "recovered" in s else ""
        note = "" if s.get("recovered", True) else "  not recovered"
        lines.append(
            f"{s['name']:{width}}  {s['val_loss']:9.4f}  {s['steps']:7,}  {s.get('epochs', 0):6.2f}  {against}{note}"
        )
    return "\n".join(lines)
