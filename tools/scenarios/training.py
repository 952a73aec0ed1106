"""Trainings that get killed: every package's own loop, data, evaluation and run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scenarios.base import Scenario, digests, made_up_events, nothing


def _training(prepare: Callable[[Path], None], work: Callable[[Path, Path], None]) -> Scenario:
    # Both load late otherwise, once in every process that is forked.
    import torch._dynamo  # noqa: F401
    from lab_shared.loop import Tick

    def outcome(folder: Path) -> dict[str, str]:
        from lab_shared.run import read_metrics

        def steady(record: dict[str, Any]) -> dict[str, Any]:
            return {name: x for name, x in record.items() if name != "time" and not name.endswith("_per_s")}

        metrics = json.dumps([steady(record) for record in read_metrics(folder)])
        return {**digests(folder, "weights.safetensors"), "metrics": hashlib.sha256(metrics.encode()).hexdigest()}

    def done(folder: Path) -> set[str]:
        saved = sorted((folder / "checkpoints").glob("step_*.safetensors"))
        last = int(saved[-1].stem.removeprefix("step_")) if saved else 0
        if (folder / "DONE.json").exists() and not saved:  # attn_clustering deletes them at the end
            last = 1000
        return {str(step) for step in range(1, last + 1)}

    return Scenario(prepare, work, outcome, done, (Tick, "update", lambda tick, *_, **__: str(tick.step)))


def train_iceaggr() -> Scenario:
    from iceaggr import train
    from iceaggr.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

    vars(train)["write_report"] = _no_report
    model = ModelConfig(features="summary", d_model=16, d_hidden=32, layers=2, heads=2, head_hidden=16, dom_cap=32)

    def prepare(inputs: Path) -> None:
        made_up_events(inputs / "events", files=2, events=100)

    def work(inputs: Path, folder: Path) -> None:
        data = DataConfig(data=str(inputs / "events"), store=str(inputs / "store"), val_events=40)
        config = TrainConfig(
            model=model,
            optim=OptimConfig(optimizer="muon", vmf_weight=1.0, rotate=True, ema=0.9),
            data=data,
            epochs=4.0,
            tokens_per_batch=1024,
            log_every=2,
            checkpoint_every=3,
            eval_every=6,
            wandb="disabled",
        )
        train.resume(folder) if _begun(folder) else train.train(config, folder)

    return _training(prepare, work)


def train_rh_memory() -> Scenario:
    from rh_memory import report, train
    from rh_memory.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
    from rh_memory.zeros.generate import main

    vars(report)["write"] = _no_report
    model = ModelConfig(
        context=16, d_model=16, layers=1, heads=2, pos="rope", sigma_floor=1e-3, memory="prefix", n_memory=4
    )

    def prepare(inputs: Path) -> None:
        main(12_000, inputs / "zeros.npy", "cpu")

    def work(inputs: Path, folder: Path) -> None:
        data = DataConfig(file=str(inputs / "zeros.npy"), folder=str(inputs))
        config = TrainConfig(
            model=model,
            optim=OptimConfig(lr=3e-3, warmup=5),
            data=data,
            steps=20,
            batch_size=8,
            early_stop=True,
            eval_every=4,
            eval_windows=32,
            log_every=2,
            checkpoint_every=3,
            wandb="disabled",
        )
        train.resume(folder) if _begun(folder) else train.train(config, folder)

    return _training(prepare, work)


def train_attn_clustering() -> Scenario:
    from attn_clustering import train
    from attn_clustering.config import DataConfig, ModelConfig, OptimConfig
    from attn_clustering.data.settings import LANGUAGES
    from attn_clustering.experiments import EXPERIMENTS, run_config

    language = replace(LANGUAGES["smoke"], vocab=32, seq_len=32, min_segment=8, train_sequences=40, val_sequences=8)
    experiment = replace(
        EXPERIMENTS["smoke"][1],
        model=ModelConfig(vocab=32, d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24),
        data=DataConfig(language),
        optim=OptimConfig(
            steps=24, batch=4, warmup=2, lr=3e-3, eval_every=8, eval_sequences=8, log_every=3, checkpoint_every=4
        ),
    )
    config = run_config(experiment, "gqa", "topic_ordered", 0)

    def work(inputs: Path, folder: Path) -> None:
        train.train(config, folder, device="cpu")

    return _training(nothing, work)


def train_gauge_attn() -> Scenario:
    from gauge_attn import train
    from gauge_attn.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

    vars(train)["write_report"] = _no_report
    config = TrainConfig(
        model=ModelConfig(
            spec="1x0e+1x1e", layers=1, scalars=8, copies=2, hidden=8, value_scalars=2, kappa_mode="learnable"
        ),
        optim=OptimConfig(alignment=0.01),
        data=DataConfig(keys=4, window=8, batch=4, val_windows=16),
        steps=16,
        log_every=2,
        checkpoint_every=3,
        eval_every=8,
        wandb="disabled",
    )

    def work(inputs: Path, folder: Path) -> None:
        train.resume(folder) if _begun(folder) else train.train(config, folder)

    return _training(nothing, work)


def checkpointing() -> Scenario:
    """A loop that does little but save: a checkpoint of half a megabyte after every step."""
    import torch
    from lab_shared.checkpoint import seed_everything
    from lab_shared.loop import ticks
    from lab_shared.optim import make_optimizer
    from lab_shared.run import Run
    from torch import nn

    def work(inputs: Path, folder: Path) -> None:
        if _begun(folder):
            run = Run.open(folder)
        else:
            run = Run.create(folder, _Nothing(), seed=0, project="faults", resume_command="-", wandb="disabled")
        with run:
            seed_everything(0)
            model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Dropout(0.2), nn.Linear(512, 8))
            optimizer = make_optimizer(model, lr=1e-3, kind="adamw")
            for tick in ticks(run, 20, model=model, optimizer=optimizer, checkpoint_every=1, log_every=1, keep=2):
                loss = model(torch.randn(4, 64)).square().mean()
                tick.update(loss)
                tick.keep_best(float(loss.detach()))
            run.finish({})

    return _training(nothing, work)


@dataclass(frozen=True)
class _Nothing:
    """The configuration of a loop without options."""

    steps: int = 20


def _begun(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _no_report(folder: Path) -> Path:
    """Figures cost more than these trainings, and can be drawn again from saved arrays."""
    return folder / "report.html"
