"""The experiments: named lists of runs, executed by `lab_shared.sweep`, and the records that come back.

Each cell of a grid is a configuration; each seed of a cell is one run in a folder of its own, which is skipped once it
is done and resumed where it was stopped. results.json collects {"cell", "seed", "settings", "summary"} of them all.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder

from gauge_attn.config import SEED_SPEC, TrainConfig, as_original, faithful, seed_run

Cells = dict[str, TrainConfig]

KAPPA_MODES = ("shared", "dim", "sqrt_dim", "standardised", "learnable")
SAME_K_SPECS = ("19x0e", SEED_SPEC, "1x0e+6x1e", "1x0e+1x1e+3x2e", "1x9e")
"""Nineteen components each."""
SPECS = {
    "19": SEED_SPEC,
    "19-scalars": "19x0e",
    "19-vectors": "1x0e+6x1e",
    "19-tensors": "1x0e+1x1e+3x2e",
    "28": "2x0e+2x1e+4x2e",
    "28-scalars": "28x0e",
    "41": "4x1e+3x2e+2x3e",
    "41-scalars": "41x0e",
    "108": "10x0e+10x1e+8x2e+4x3e",
    "108-scalars": "108x0e",
    "25-pure-tensors": "5x2e",
    "25-scalars": "25x0e",
}
_WEIGHTS: dict[str, tuple[float, str]] = {
    "none": (0.0, "mean"),
    "mean-0.01": (0.01, "mean"),
    "mean-1": (1.0, "mean"),
    "sum-1": (1.0, "sum"),
}
SEEDS = {"seed-repro": 5, "h2": 5, "smoke": 1}
"""Seeds per cell; 3 where not named."""


def _model(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, model=replace(config.model, **changes))


def _alignment(config: TrainConfig, name: str) -> TrainConfig:
    weight, reduction = _WEIGHTS[name]
    return replace(config, optim=replace(config.optim, alignment=weight, alignment_reduction=reduction))  # type: ignore[arg-type]


def cells(name: str) -> Cells:
    """The configurations of a grid. Raises UserError for a name that is none.

    seed-repro: the seed's three temperatures with the alignment loss summed, as is and with the original's
    approximations, and for each what the same beliefs would do if they were noise (`noise_control`).
    h1: row_std over d at a shared temperature. h2: does l matter once logits are standardised? h3: weight of the
    alignment loss. h4: Taylor-4 frames. h5: gauge-fixed beliefs. h6: diagonal covariances. h7: frames frozen.
    h8: curved transport. specs: layouts beside all-scalar ones of equal K.
    """
    seeds_of_kappa = {"a": 0.43, "b": 0.00043, "c": 0.0086}
    if name == "seed-repro":
        exact = {f"seed-{row}": seed_run(kappa) for row, kappa in seeds_of_kappa.items()}
        return exact | {"seed-c-original": as_original(seed_run(0.0086))}
    if name == "h1":
        return {f"spec={label}": faithful(mean_std=None, spec=SPECS[label]) for label in ("19", "28", "41")}
    if name == "h2":
        return {
            f"{spec.replace('+', '_')},{mode}": faithful(spec=spec, kappa_mode=mode)
            for spec in SAME_K_SPECS
            for mode in KAPPA_MODES
        }
    if name == "h3":
        return {
            f"kappa={kappa},alignment={weight}": _alignment(faithful(kappa, mean_std=0.02), weight)
            for kappa in (0.43, 0.0086)
            for weight in _WEIGHTS
        }
    dense = faithful(0.0086, route="dense", mean_std=0.081)
    pairs: dict[str, Cells] = {
        "h4": {"exact": dense, "taylor4": _model(dense, exponential="taylor4")},
        "h5": {"free": faithful(), "gauge-fixed": faithful(gauge_fixed=True)},
        "h6": {"full": dense, "diagonal": _model(dense, covariance="diag_approx")},
        "h7": {"learned": faithful(), "frozen": faithful(frames="frozen")},
        "h8": {"flat": _model(dense, kappa=0.43), "curved": _model(dense, kappa=0.43, curvature=1.0)},
        "specs": {label: faithful(spec=spec, kappa_mode="learnable") for label, spec in SPECS.items()},
        "smoke": {
            "free": faithful(spec="1x0e+1x1e"),
            "aligned": _alignment(faithful(spec="1x0e+1x1e"), "sum-1"),
            "frozen": faithful(spec="1x0e+1x1e", frames="frozen"),
        },
    }
    if name in pairs:
        return pairs[name]
    if name == "all":
        parts = ("seed-repro", *(f"h{i}" for i in range(1, 9)), "specs")
        return {f"{part}/{cell}": config for part in parts for cell, config in cells(part).items()}
    known = ("seed-repro", *(f"h{i}" for i in range(1, 9)), "specs", "all", "smoke")
    raise UserError(f"no grid {name!r}; there are {', '.join(known)}")


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
) -> dict[str, Any]:
    """Run what is not done of a grid and collect it; {"name", "folder", "runs", "text"}.

    Writes results.json, results.csv and report.html into `out` (default runs/gauge_attn/grid-NAME). compile: as in
    TrainConfig, but None leaves it out where runs share a GPU, whose processes would all wait for the compiler.
    """
    from lab_shared.sweep import Job, run_jobs

    out = Path("runs/gauge_attn") / f"grid-{name}" if out is None else out
    if compile is None and gpus_per_job < 1:
        compile = False
    at_once = workers or max(1, int(1 / gpus_per_job))
    if at_once > 1:  # inherited by the workers: Inductor would start a thread per core in each
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    jobs, settings = [], {}
    for cell, config in cells(name).items():
        config = replace(config, wandb="disabled", compile=compile)
        if data is not None or data_folder is not None:
            config = replace(config, data=replace(config.data, data=data or config.data.data, folder=data_folder))
        if steps is not None:
            config = replace(config, steps=steps, eval_every=steps, checkpoint_every=max(steps // 2, 1))
        for seed in range(seeds or SEEDS.get(cell.split("/")[0] if name == "all" else name, 3)):
            job_name = f"{cell.replace('/', '+')},seed={seed}".replace(",", "-")
            settings[job_name] = (cell, seed, config)
            jobs.append(Job(job_name, train_cell, {"config": asdict(replace(config, seed=seed))}))
    if only_list:
        text = "\n".join(job.name for job in jobs)
        return {"name": name, "folder": str(out), "runs": [job.name for job in jobs], "text": text}
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
            "seed": seed,
            "settings": cell_settings(config),
            "summary": summaries[job_name],
        }
        for job_name, (cell, seed, config) in settings.items()
    ]
    return collect(name, out, runs)


def collect(name: str, out: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Save the records of a grid with its verdicts and report; the tables stand under "text"."""
    from gauge_attn.grid_tables import grid_text
    from gauge_attn.report import write_grid_report
    from gauge_attn.verdicts import verdicts

    make_folder(out)
    result = {"name": name, "runs": runs, "verdicts": verdicts(runs)}
    atomic_write(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
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

    from gauge_attn.train import train_in

    settings = from_json(TrainConfig, json.dumps(config))
    structure = json.dumps({**config, "seed": 0})
    if "torch._dynamo" in sys.modules and _compiled_for != [
        structure
    ]:  # the same cell's seeds share compiled code; others would only pile up
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
        "heads": diagnosis["heads"],
        "diversity": diagnosis["diversity"],
        "ablation": result["ablation"],
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
    """Sharpness of the untrained model beside the closed form for its means: {"l", "row_std", "predicted"}."""
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
    return [
        {
            "l": r["l"],
            "row_std": r["row_std"],
            "predicted": theory.row_std(theory.participation(2 * r["l"] + 1, s * s / r["kappa"]), tokens_BN.size(1)),
        }
        for r in head_records(model, tokens_BN)
    ]
