"""The experiments: named lists of runs, executed by `lab_shared.sweep`, and the records that come back.

Each cell of a grid is a configuration; each seed of a cell is one run in a folder of its own, which is skipped once it
is done and resumed where it was stopped. results.json collects them all, see `records`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lab_shared.command import job_list
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder

from gauge_attn.cells import STEPS, cells, seeds_of
from gauge_attn.config import TrainConfig

if TYPE_CHECKING:
    from lab_shared.sweep import Job


def run_grid(
    name: str,
    out: Path | None = None,
    *,
    data: str | None = None,
    data_folder: str | None = None,
    steps: int | None = None,
    seeds: int | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
    compile: bool | None = None,
    only_list: bool = False,
    only_done: bool = False,
) -> dict[str, Any]:
    """Run what is not done of a grid and collect it; {"name", "folder", "runs", "text"}.

    Writes results.json, report.html and figures into `out` (default runs/gauge_attn/grid-NAME). compile: as in
    TrainConfig, but None leaves it out where runs share a GPU, whose processes would all wait for the compiler.
    only_list: name the runs and do nothing. only_done: run nothing, and collect the runs that are finished.

    Raises UserError for `only_done` where none is, or where a finished one had other settings.
    """
    from lab_shared.sweep import Job, run_jobs

    out = Path("runs/gauge_attn") / f"grid-{name}" if out is None else out
    if compile is None and gpus_per_job < 1:
        compile = False
    at_once = workers or max(1, int(1 / gpus_per_job))
    if at_once > 1:  # inherited by the workers: one thread each, and Inductor would start one per core
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    configs = run_configs(name, data, data_folder, steps or STEPS, seeds, compile)
    jobs = [Job(job_name, train_cell, {"config": asdict(config)}) for job_name, (_, config) in configs.items()]
    if only_list:
        return {"name": name, "folder": str(out), "runs": list(configs), "text": job_list(list(configs), out / "runs")}
    if only_done:
        summaries = finished(jobs, out / "runs")
        configs = {job_name: configs[job_name] for job_name in summaries}
    else:
        summaries = run_jobs(
            jobs,
            out / "runs",
            engine=engine,
            address=address,
            workers=workers,
            gpus_per_job=gpus_per_job,
        )
    runs = [
        {
            "grid": cell.split("/")[0] if name == "all" else name,
            "cell": cell.split("/")[-1],
            "seed": config.seed,
            "settings": cell_settings(config),
            "summary": summaries[job_name],
        }
        for job_name, (cell, config) in configs.items()
    ]
    return collect(name, out, runs)


def run_configs(
    name: str, data: str | None, data_folder: str | None, steps: int, seeds: int | None, compile: bool | None
) -> dict[str, tuple[str, TrainConfig]]:
    """Every run of a grid by the name of its job: its cell and its configuration, the seed included."""
    found = {}
    for cell, config in cells(name).items():
        config = replace(config, wandb="disabled", compile=compile)
        if data is not None or data_folder is not None:
            config = replace(config, data=replace(config.data, data=data or config.data.data, folder=data_folder))
        config = replace(config, steps=steps, eval_every=steps, checkpoint_every=max(steps // 2, 1))
        grid, _, own = cell.rpartition("/")
        for seed in range(seeds or seeds_of(grid or name, own)):
            job_name = f"{cell.replace('/', '+')},seed={seed}".replace(",", "-")
            found[job_name] = cell, replace(config, seed=seed)
    return found


def finished(jobs: Sequence[Job], folder: Path) -> dict[str, dict[str, Any]]:
    """The summaries of the jobs that are done, by name. Raises UserError for a damaged one, and if none is done."""
    from lab_shared.report_files import read_object

    found: dict[str, dict[str, Any]] = {}
    for job in jobs:
        file = folder / job.name / "result.json"
        if file.is_file():
            done = read_object(file, needed=("kwargs", "summary"))
            assert done is not None
            if done["kwargs"] != json.loads(json.dumps(dict(job.kwargs))):
                raise UserError(f"{file} is of other settings: repeat the options it was run with")
            found[job.name] = done["summary"]
    if not found:
        raise UserError(f"{folder} holds no finished run of this grid: run it without --collect")
    return found


def collect(name: str, out: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Save the records of a grid with its verdicts and report; the tables stand under "text"."""
    from gauge_attn.grid_tables import grid_text
    from gauge_attn.records import pack, unpack
    from gauge_attn.report import write_grid_report
    from gauge_attn.verdicts import verdicts

    make_folder(out)
    text = pack(name, runs)
    atomic_write(out / "results.json", text)
    runs = unpack(json.loads(text))  # so that what is said now is what the file says
    result = {"name": name, "runs": runs, "verdicts": verdicts(runs)}
    page = write_grid_report(out)
    return result | {"folder": str(out), "text": f"{grid_text(result)}\n\nreport: {page}"}


def cell_settings(config: TrainConfig) -> dict[str, Any]:
    """What distinguishes cells, flat and short."""
    model, optim = config.model, config.optim
    return {
        "spec": model.spec,
        "kappa": model.kappa,
        "kappa_mode": model.kappa_mode,
        "alignment": optim.alignment if optim.alignment_reduction != "none" else 0.0,
        "alignment_reduction": optim.alignment_reduction,
        "route": model.route,
        "covariance": model.covariance,
        "exponential": model.exponential,
        "curvature": model.curvature,
        "frames": model.frames,
        "gauge_fixed": model.gauge_fixed,
        "mean_std": model.mean_std,
        "data": config.data.data,
        "window": config.data.window,
        "steps": config.steps,
    }


_compiled_for: list[str] = []


def train_cell(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """One run of a grid: train (or go on), measure, and what its noise would look like. JSON-able."""
    import torch
    from lab_shared.config import from_json
    from lab_shared.dist import init
    from lab_shared.run import read_metrics

    from gauge_attn.records import summary_heads
    from gauge_attn.train import train_in

    settings = from_json(TrainConfig, json.dumps(config))
    structure = json.dumps({**config, "seed": 0})
    # The seeds of a cell share compiled code; that of other cells would only pile up.
    if "torch._dynamo" in sys.modules and _compiled_for != [structure]:
        torch.compiler.reset()
        _compiled_for[:] = [structure]
    with init() as dist:
        device = dist.device
        result = train_in(settings, out, dist)
    assert result is not None
    norms = [m["grad_norm"] for m in read_metrics(out, "train") if m.get("grad_norm") is not None]
    diagnosis = result["diagnosis"]
    return {
        "loss": result["loss"],
        "perplexity": result["perplexity"],
        "yardsticks": {name: row["loss"] for name, row in result["predictors"].items() if name != "model"},
        "label": result["label"],
        "generated": result["generated"],
        "parameters": result["parameters"],
        "grad_norm_max": max(norms, default=None),
        "heads": summary_heads(diagnosis["heads"], result["ablation"]),
        "diversity": diagnosis["diversity"],
        "noise": noise_control(settings, diagnosis["diversity"]),
        "initial": initial_heads(settings, device.type),
    }


def noise_control(config: TrainConfig, diversity: dict[str, float] | None) -> dict[str, float]:
    """Mean row_std by l of beliefs that are nothing but noise, with the run's own mu_dist and kappa (unit variances).

    mu_dist over K components means differences of std mu_dist / sqrt(K) per component, so means of s = mu_dist /
    sqrt(2 K). Frames drop out of exact attention between such beliefs.
    """
    from gauge_attn.irreps import Irreps
    from gauge_attn.theory import simulate

    if diversity is None or config.model.kappa_mode not in ("shared", "dim", "sqrt_dim"):
        return {}
    irreps = Irreps(config.model.spec)
    s = diversity["mu_dist"] / (2 * irreps.dim) ** 0.5
    power = {"shared": 0.0, "dim": 1.0, "sqrt_dim": 0.5}[config.model.kappa_mode]
    return {
        str(l): simulate(2 * l + 1, s, config.model.kappa * (2 * l + 1) ** power, int(diversity["n"]), draws=16)[
            "row_std"
        ]
        for l in irreps.ls
    }


def initial_heads(config: TrainConfig, device: str) -> list[dict[str, Any]]:
    """Sharpness of the untrained model beside the closed form for its means: {"l", "row_std", "predicted"} by l."""
    import torch
    from lab_shared.checkpoint import seed_everything

    from gauge_attn import theory
    from gauge_attn.data import load_corpus, windows
    from gauge_attn.measure import head_records
    from gauge_attn.models import Faithful, build_model

    seed_everything(config.seed)
    corpus = load_corpus(config.data)
    model = build_model(config.model, corpus.vocab, config.data.window).to(device)
    if not isinstance(model, Faithful) or config.model.gauge_fixed or config.model.kappa_mode == "standardised":
        return []
    tokens_BN = windows(corpus, "valid", torch.device(device), seed=config.seed).input_WN[:4]
    std = config.model.kappa**0.5 if config.model.mean_std is None else config.model.mean_std
    s = std * (2**0.5 if model.position_NK is not None else 1.0)  # a token's own mean plus its position's
    records = head_records(model, tokens_BN)
    rows = []
    for l in sorted({r["l"] for r in records}):
        heads = [r for r in records if r["l"] == l]
        rho = theory.participation(2 * l + 1, s * s / heads[0]["kappa"])
        mean = sum(r["row_std"] for r in heads) / len(heads)
        rows.append({"l": l, "row_std": mean, "predicted": theory.row_std(rho, tokens_BN.size(1))})
    return rows
