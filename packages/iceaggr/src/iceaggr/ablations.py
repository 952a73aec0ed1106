"""Ablation studies: lists of training runs on one simulated store, judged on the same held-out events.

    uv run iceaggr ablate seed-table --events 1000000 --epochs 10 --out runs/iceaggr/seed-table

Simulated data. Every run of a study sees the same events equally often and is scored on the same held-out ones, which
are disjoint from them by id; with --stream, runs of the same seed see the same events, each once. A run is a job of
`lab_shared.sweep`: skipped when done, resumed where it was stopped. Imports no torch at the top.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lab_shared.errors import UserError
from lab_shared.files import make_folder
from lab_shared.sweep import Engine, Job, run_jobs

from iceaggr.ablation_runs import DATA_SEED, score_baselines, score_variant, train_variant
from iceaggr.ablation_stats import Contrast
from iceaggr.config import PRESETS, STUDIES, V3_KEPT, V3_PARTS, DataConfig, OptimConfig, TrainConfig, with_parts

Recipe = Literal["package", "seed"]
BASELINES = "baselines"
FULL_DATA_FACTOR = 13
"""The seed went from 10 to 132 million events."""


class Variant(NamedTuple):
    """One row of a study."""

    config: TrainConfig
    share: float = 1.0
    """Of the study's training events."""
    scores: str | None = None
    """Name of the variant whose trained weights this one only scores in another way; None trains its own."""


@dataclass(frozen=True)
class Study:
    name: str
    variants: dict[str, Variant]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Budget:
    """What all runs of a study have in common."""

    events: int
    """Training events in the store."""
    held_out: int
    epochs: float
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: Recipe = "package"
    """seed: AdamW with a one-cycle schedule on the opening angle alone, without rotations. package: as the presets."""
    store: str = DataConfig.store
    stream: bool = False
    """Train on events simulated on the way, none twice, instead of a store that all runs read."""
    tokens_per_batch: int | None = None
    """As of TrainConfig. Smaller batches are more steps from the same events: of few events the first few hundred steps
    are the plateau before any direction is learned."""


def study(name: str) -> Study:
    """The rows and questions of a study. Raises UserError for a name that is none.

    seed-table: the five rows of the seed's table, and its 5M model with all and with a thirteenth of the events and
    with its smaller head. choices: decisions of the seed that this package takes differently. v3: each addition to v2
    alone, all together, and those that won together, these also with zeros in empty slots (which won in choices).
    scale: three sizes times three numbers of events.
    """
    small, large = PRESETS["small"][1], PRESETS["5M"][1]
    if name == "seed-table":
        k41 = {"slots": 41, "head_hidden": 512}  # the head of the seed's two rows
        return Study(
            name,
            {
                "v1": Variant(PRESETS["v1"][1]),
                "v2-linear-K16": Variant(small),
                "v2-mlp-K16": Variant(_model(small, input="mlp")),
                "v2-linear-K41": Variant(_model(small, **k41)),
                "v2-none-K41": Variant(_model(small, **k41, input="none")),
                "5M": Variant(large),
                "5M-less-data": Variant(large, share=1 / FULL_DATA_FACTOR),
                "5M-head-128": Variant(_model(large, head_hidden=128)),
            },
            (
                Contrast("v2-linear-K16", "v1", "v2 against v1"),
                Contrast("v2-mlp-K16", "v2-linear-K16", "MLP input against linear, K = 16"),
                Contrast("v2-none-K41", "v2-linear-K41", "no projection against linear, K = 41"),
                Contrast("v2-linear-K41", "v2-linear-K16", "41 slots against 16 (head 512 against 128)"),
                Contrast("5M", "5M-less-data", f"{FULL_DATA_FACTOR} times the events"),
                Contrast("5M", "5M-head-128", "head of 1024 against 128"),
            ),
        )
    if name == "choices":
        raw = _model(small, slots=41, input="none", head_hidden=512)
        return Study(
            name,
            {
                "base": Variant(small),
                "cap-128-hlc": Variant(_model(small, dom_cap=128)),
                "cap-128-earliest": Variant(_model(small, dom_cap=128, dom_select="earliest")),
                "zero-padding": Variant(_model(small, empty="zero")),
                "raw-rms": Variant(raw),
                "raw-proper": Variant(_model(raw, input_norm="none")),
                "no-input-norm": Variant(_model(small, input_norm="none")),
            },
            (
                Contrast("cap-128-hlc", "base", "at most 128 DOMs, HLC first, against all"),
                Contrast("cap-128-earliest", "base", "at most 128 DOMs, earliest, against all"),
                Contrast("cap-128-hlc", "cap-128-earliest", "HLC first against earliest, of 128 DOMs"),
                Contrast("zero-padding", "base", "zeros in empty slots against a marker"),
                Contrast("raw-proper", "raw-rms", "raw features with a constant column against RMSNorm of them"),
                Contrast("no-input-norm", "base", "no norm after the linear input against RMSNorm"),
            ),
        )
    if name == "v3":
        variants = {"base": Variant(small)}
        variants |= {part: Variant(with_parts(small, part)) for part in V3_PARTS}
        variants["tta"] = variants["tta"]._replace(scores="base")
        variants["adamw"] = Variant(replace(small, optim=replace(small.optim, optimizer="adamw")))
        variants["all"] = Variant(with_parts(small, *V3_PARTS))
        variants["kept"] = Variant(with_parts(small, *V3_KEPT))
        variants["kept-zeros"] = Variant(_model(variants["kept"].config, empty="zero"))
        contrasts = [Contrast(part, "base", f"v2 with {part} against v2") for part in (*V3_PARTS, "all", "kept")]
        contrasts += [
            Contrast("adamw", "base", "AdamW against Muon"),
            Contrast("kept", "all", "the winners against all"),
            Contrast("kept-zeros", "kept", "the winners with zeros in empty slots against a marker"),
        ]
        return Study(name, variants, tuple(contrasts))
    if name == "scale":
        sizes = {
            "0.1M": _model(small, d_model=64, d_hidden=128, heads=4, layers=3, head_hidden=64),
            "0.5M": small,
            "5M": large,
        }
        shares = {"sixteenth": 1 / 16, "quarter": 1 / 4, "all": 1.0}
        return Study(
            name,
            {f"{size}-{part}": Variant(c, share=s) for size, c in sizes.items() for part, s in shares.items()},
            (
                *(Contrast(f"{size}-all", f"{size}-quarter", f"{size}: four times the events") for size in sizes),
                Contrast("5M-all", "0.5M-all", "5M against 0.5M, all events"),
                Contrast("0.5M-all", "0.1M-all", "0.5M against 0.1M, all events"),
            ),
        )
    raise UserError(f"no study {name!r}; there are {', '.join(STUDIES)}")


def settled(variant: Variant, budget: Budget, seed: int, data: DataConfig) -> TrainConfig:
    """The configuration of one run: the variant's model under the study's budget."""
    config = variant.config
    optim = config.optim
    if budget.recipe == "seed":
        optim = OptimConfig(optimizer="adamw", lr=3e-4, weight_decay=0.01, schedule="one_cycle", warmup=0.05)
        optim = replace(optim, ema=config.optim.ema, vmf_weight=1.0 if config.model.head_mixture > 1 else 0.0)
    events = max(1, round(budget.events * variant.share))
    return replace(
        config,
        optim=optim,
        data=replace(data, train_events=events, val_events=budget.held_out),
        epochs=budget.epochs,
        tokens_per_batch=budget.tokens_per_batch or config.tokens_per_batch,
        seed=seed,
        eval_every=10**9,  # at the end, of the whole held-out set
        wandb="disabled",
    )


def jobs(of: Study, budget: Budget, data: DataConfig) -> list[Job]:
    """The baselines, then every variant and seed, the seeds of a variant one after another."""
    shared = replace(data, train_events=budget.events, val_events=budget.held_out)
    listed = [Job(BASELINES, score_baselines, {"data": asdict(shared)})]
    for name, variant in of.variants.items():
        for seed in budget.seeds:
            kwargs: dict[str, Any] = {"config": asdict(settled(variant, budget, seed, data))}
            if variant.scores is None:
                listed.append(Job(job_name(name, seed), train_variant, kwargs))
            else:
                source = job_name(variant.scores, seed)
                listed.append(Job(job_name(name, seed), score_variant, {**kwargs, "source": source}, (source,)))
    return listed


def job_name(variant: str, seed: int) -> str:
    return f"{variant}-seed{seed}"


def ablate(
    of: Study,
    budget: Budget,
    out: Path,
    *,
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run what is not done of a study in the folder `out` and report it; the tables stand under "text".

    OUT/runs/NAME-seedS are the runs; results.json, curves.json, errors/NAME.npz and report.html remain of them. dry_run
    only lists the runs.
    """
    if len(set(budget.seeds)) < len(budget.seeds) or min(budget.seeds) < 0:
        raise UserError(f"seeds {budget.seeds}: each may stand there once, and none is below 0")
    if dry_run:
        data = DataConfig(data="(simulated before the runs)", store=budget.store)
        names = [job.name for job in jobs(of, budget, data)]
        trained = [v for v in of.variants.values() if v.scores is None]
        seen = sum(v.share for v in trained) * budget.events * budget.epochs * len(budget.seeds)
        text = "\n".join(names) + f"\n{len(names)} jobs, {seen:,.0f} events to train on in all (simulated data)"
        return {"name": of.name, "jobs": names, "events_seen": seen, "text": text}
    out = out.resolve()
    make_folder(out)
    data = shared_data(budget)
    at_once = workers or max(1, int(1 / gpus_per_job))
    if at_once > 1:  # inherited by the workers: Inductor would start a thread per core in each
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    summaries = run_jobs(
        jobs(of, budget, data),
        out / "runs",
        engine=engine,
        address=address,
        workers=workers,
        gpus_per_job=gpus_per_job,
    )
    from iceaggr.ablation_report import collect

    return collect(of, budget, out, summaries)


def shared_data(budget: Budget) -> DataConfig:
    """Simulate the study's events and their store once, before any run; where the runs find them."""
    if budget.stream:
        from iceaggr.data.prepare import STREAM

        return DataConfig(data=STREAM, store=budget.store)
    import torch

    from iceaggr.data.prepare import prepare

    wanted = DataConfig(store=budget.store, train_events=budget.events, val_events=budget.held_out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = prepare(wanted, seed=DATA_SEED, device=device)
    return DataConfig(data=str(made.folder.resolve()), store=str(Path(budget.store).resolve()))


def only_variants(of: Study, only: Sequence[str]) -> Study:
    """The study with these variants (and those whose weights they score), and the contrasts between them.

    Raises UserError for a name that is none of its variants.
    """
    if unknown := [name for name in only if name not in of.variants]:
        raise UserError(f"study {of.name} has no variant {unknown[0]!r}; there are {', '.join(of.variants)}")
    needed = {source for name in only if (source := of.variants[name].scores)}
    kept = {name: v for name, v in of.variants.items() if name in only or name in needed}
    return replace(of, variants=kept, contrasts=tuple(c for c in of.contrasts if {c.treated, c.control} <= kept.keys()))


def _model(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, model=replace(config.model, **changes))
