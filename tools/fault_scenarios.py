"""What `make faults` kills: trainings, checkpoints, caches, downloads and generators, each as work that can be redone.

Everything is tiny and on one CPU thread. Packages are imported by the scenario that needs them, before the processes
that get killed are forked.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """Work in a folder that may die at any moment and is then called again.

    prepare(inputs): makes what the work reads, once. work(inputs, folder): starts, or goes on where it was killed.
    outcome(folder): name -> digest of everything that must come out the same. done(folder): names of the units of work
    that the folder says are finished. unit: (owner, function, name of the unit from the call's arguments); a call for
    a unit that was done already is work done twice.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path, Path], None]
    outcome: Callable[[Path], dict[str, str]]
    done: Callable[[Path], set[str]]
    unit: tuple[Any, str, Callable[..., str]]


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Relative path -> SHA-256 of the files that match."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- training: every package's own loop, data, evaluation and run folder ---


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


def _train_iceaggr() -> Scenario:
    from iceaggr import train
    from iceaggr.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

    vars(train)["write_report"] = _no_report
    model = ModelConfig(features="summary", d_model=16, d_hidden=32, layers=2, heads=2, head_hidden=16, dom_cap=32)

    def prepare(inputs: Path) -> None:
        _made_up_events(inputs / "events", files=2, events=100)

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


def _train_rh_memory() -> Scenario:
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


def _train_attn_clustering() -> Scenario:
    from attn_clustering import train
    from attn_clustering.config import EXPERIMENTS, DataConfig, ModelConfig, OptimConfig, run_config
    from attn_clustering.data.settings import LANGUAGES

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

    return _training(_nothing, work)


def _train_gauge_attn() -> Scenario:
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

    return _training(_nothing, work)


def _checkpointing() -> Scenario:
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

    return _training(_nothing, work)


@dataclass(frozen=True)
class _Nothing:
    """The configuration of a loop without options."""

    steps: int = 20


# --- data: caches, downloads, generators ---


def _simulate() -> Scenario:
    """iceaggr's simulated folders: a file is done when the part of the event table that comes after it is there."""
    from iceaggr.sim import write

    def work(inputs: Path, folder: Path) -> None:
        write.simulate_folder(folder, 60, seed=3, events_per_file=15)

    def outcome(folder: Path) -> dict[str, str]:
        return digests(folder, "*.parquet", "*/*.parquet", "*.csv", "simulation.json")

    def done(folder: Path) -> set[str]:
        if (folder / "simulation.json").exists():
            return {str(batch) for batch in range(1, 5)}
        return {file.stem.removeprefix("truth_") for file in (folder / ".parts").glob("truth_*.parquet")}

    return Scenario(_nothing, work, outcome, done, (write, "iter_events", lambda *_, stream, **__: str(stream)))


def _cache() -> Scenario:
    """iceaggr's event store."""
    from iceaggr.data.cache import build_cache, open_cache
    from iceaggr.data.kaggle import KaggleFolder
    from iceaggr.data.storefiles import MANIFEST, Manifest

    def prepare(inputs: Path) -> None:
        _made_up_events(inputs / "events", files=8, events=40)

    def work(inputs: Path, folder: Path) -> None:
        build_cache(inputs / "events", folder)
        open_cache(folder).verify()

    def done(folder: Path) -> set[str]:
        if not (folder / MANIFEST).exists():
            return set()
        return {shard["file"] for shard in Manifest.read(folder).shards}

    unit = (KaggleFolder, "read_batch", lambda source, batch: source.batch_files[batch].name)
    return Scenario(prepare, work, lambda folder: digests(folder, "*.bin", MANIFEST), done, unit)


def _zeros() -> Scenario:
    """rh_memory's zeros of zeta, chunk by chunk."""
    from rh_memory.zeros import generate

    def work(inputs: Path, folder: Path) -> None:
        file = folder / "zeros.npy"
        if not (file.exists() and file.with_suffix(".json").exists()):
            generate.main(12_000, file, "cpu", zeros_per_chunk=1000)

    def done(folder: Path) -> set[str]:
        state = folder / ".zeros.npy.part.json"
        return {str(chunk["begin"]) for chunk in json.loads(state.read_text())["chunks"]} if state.exists() else set()

    unit = (generate, "compute_chunk", lambda lower, *_: str(lower))
    return Scenario(_nothing, work, lambda folder: digests(folder, "zeros.npy"), done, unit)


def _gue() -> Scenario:
    """rh_memory's store of simulated GUE spacings: one file and its manifest."""
    from rh_memory.data import controls

    def work(inputs: Path, folder: Path) -> None:
        for seed in range(4):
            controls.default_gue(700, seed, folder)

    def done(folder: Path) -> set[str]:
        return {file.stem.removeprefix("gue_700_seed") for file in folder.glob("gue_*.json")}

    unit = (controls, "gue_spacings", lambda n, seed: str(seed))
    return Scenario(_nothing, work, lambda folder: digests(folder, "*.npy", "*.json"), done, unit)


def _corpus() -> Scenario:
    """attn_clustering's corpus: paragraphs, topics, tokenizer, pools, sequences."""
    from attn_clustering.data import corpus
    from attn_clustering.data.settings import CorpusConfig

    def prepare(inputs: Path) -> None:
        rng = random.Random(7)
        words = {topic: [f"{topic}{rng.randrange(10**6)}" for _ in range(60)] for topic in ("sea", "sky", "sun")}
        with open(inputs / "documents.jsonl", "w") as file:
            for _ in range(240):
                topic = rng.choice(list(words))
                text = "\n\n".join(" ".join(rng.choices(words[topic], k=60)) for _ in range(2))
                file.write(json.dumps({"text": text, "topic": topic}) + "\n")

    def work(inputs: Path, folder: Path) -> None:
        config = CorpusConfig(
            sources=(str(inputs / "documents.jsonl"),),
            topic_field="topic",
            embedder="given",
            clusters=3,
            vocab=400,
            seq_len=64,
            min_segment=16,
            val_fraction=0.3,
        )
        corpus.prepare(config, folder)

    def done(folder: Path) -> set[str]:
        return {file.name.removesuffix(".manifest.json") for file in folder.glob("*.manifest.json")}

    # `stage` calls what makes a stage only when it is not done; the name of that function is the stage's.
    original = corpus.stage

    def stage(folder: Path, name: str, files: Any, inputs: Any, make: Callable[[], Any]) -> Any:
        return original(folder, name, files, inputs, lambda: vars(corpus)["made"](name, make))

    vars(corpus).update(stage=stage, made=lambda name, make: make())
    outcome = ("*.npy", "*.json", "paragraphs.jsonl")
    return Scenario(
        prepare, work, lambda folder: digests(folder, *outcome), done, (corpus, "made", lambda name, _: name)
    )


def _download() -> Scenario:
    """gauge_attn's pinned text files, fetched here from a folder, and the split made of them."""
    from gauge_attn.data import text

    contents = {f"{name}.parquet": b"PAR1" + random.Random(name).randbytes(300_000) + b"PAR1" for name in text.SPLITS}

    def prepare(inputs: Path) -> None:
        for name, content in contents.items():
            (inputs / name).write_bytes(content)

    def work(inputs: Path, folder: Path) -> None:
        text.PINS["wikitext-2"] = [
            text.Pin(name, (inputs / name).resolve().as_uri(), len(content), hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        ]
        text._find("wikitext-2", str(folder))

    def done(folder: Path) -> set[str]:
        return {file.name for file in folder.glob("wikitext-2/*.parquet")}

    unit = (text, "_download", lambda pin, *_: pin.name)
    return Scenario(prepare, work, lambda folder: digests(folder, "wikitext-2/*"), done, unit)


def _made_up_events(folder: Path, *, files: int, events: int) -> None:
    """A labelled folder in Kaggle's format whose pulses mean nothing; `events` in each file."""
    import numpy as np
    import torch
    from iceaggr.data.kaggle import write_batch, write_meta
    from iceaggr.data.pulses import Pulses
    from iceaggr.data.schema import Events

    rng, tables = np.random.default_rng(5), {}
    for batch in range(1, files + 1):
        counts_E = rng.integers(5, 60, events)
        ends_E, n = counts_E.cumsum(), int(counts_E.sum())
        event_P, time_P = np.repeat(np.arange(events), counts_E), rng.integers(5_000, 30_000, n)
        ids_E = 1000 * batch + np.arange(events)
        azimuth_E, zenith_E = rng.uniform(0, 6, events), rng.uniform(0, 3, events)
        pulses = Pulses(
            event_id_E=torch.from_numpy(ids_E),
            offsets_E1=torch.from_numpy(np.append(0, ends_E)),
            sensor_P=torch.from_numpy(rng.integers(0, 5160, n).astype(np.int32)),
            time_P=torch.from_numpy(time_P[np.lexsort((time_P, event_P))].astype(np.int32)),
            charge_P=torch.from_numpy((rng.integers(1, 400, n) / 40).astype(np.float32)),
            auxiliary_P=torch.from_numpy(rng.random(n) < 0.6),
            azimuth_E=None,
            zenith_E=None,
        )
        write_batch(folder / "train" / f"batch_{batch}.parquet", pulses)
        tables[batch] = Events(ids_E, ends_E - counts_E, ends_E - 1, azimuth_E, zenith_E)
    write_meta(folder / "train_meta.parquet", tables)


def _begun(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _nothing(inputs: Path) -> None:
    pass


def _no_report(folder: Path) -> Path:
    """Figures cost more than these trainings, and can be drawn again from saved arrays."""
    return folder / "report.html"


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "train-iceaggr": _train_iceaggr,
    "train-attn-clustering": _train_attn_clustering,
    "train-gauge-attn": _train_gauge_attn,
    "train-rh-memory": _train_rh_memory,
    "checkpointing": _checkpointing,
    "iceaggr-simulate": _simulate,
    "iceaggr-cache": _cache,
    "rh-memory-zeros": _zeros,
    "rh-memory-gue": _gue,
    "attn-clustering-corpus": _corpus,
    "gauge-attn-download": _download,
}
