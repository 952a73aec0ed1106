"""Caches, downloads and generators that get killed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scenarios.base import Scenario, digests, made_up_events, nothing


def simulate() -> Scenario:
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

    return Scenario(nothing, work, outcome, done, (write, "iter_events", lambda *_, stream, **__: str(stream)))


def cache() -> Scenario:
    """iceaggr's event store."""
    from iceaggr.data.cache import build_cache, open_cache
    from iceaggr.data.kaggle import KaggleFolder
    from iceaggr.data.storefiles import MANIFEST, Manifest

    def prepare(inputs: Path) -> None:
        made_up_events(inputs / "events", files=8, events=40)

    def work(inputs: Path, folder: Path) -> None:
        build_cache(inputs / "events", folder)
        open_cache(folder).verify()

    def done(folder: Path) -> set[str]:
        if not (folder / MANIFEST).exists():
            return set()
        return {shard["file"] for shard in Manifest.read(folder).shards}

    unit = (KaggleFolder, "read_batch", lambda source, batch: source.batch_files[batch].name)
    return Scenario(prepare, work, lambda folder: digests(folder, "*.bin", MANIFEST), done, unit)


def zeros() -> Scenario:
    """rh_memory's zeros of zeta, chunk by chunk."""
    from rh_memory.zeros import generate

    def work(inputs: Path, folder: Path) -> None:
        generate.ensure(12_000, folder / "zeros.npy", "cpu", zeros_per_chunk=1000)

    def done(folder: Path) -> set[str]:
        state = folder / ".zeros.npy.part.json"
        return {str(chunk["begin"]) for chunk in json.loads(state.read_text())["chunks"]} if state.exists() else set()

    unit = (generate, "compute_chunk", lambda lower, *_: str(lower))
    return Scenario(nothing, work, lambda folder: digests(folder, "zeros.npy"), done, unit)


def gue() -> Scenario:
    """rh_memory's store of simulated GUE spacings: one file and its manifest."""
    from rh_memory.data import controls

    def work(inputs: Path, folder: Path) -> None:
        for seed in range(4):
            controls.default_gue(700, seed, folder)

    def done(folder: Path) -> set[str]:
        return {file.stem.removeprefix("gue_700_seed") for file in folder.glob("gue_*.json")}

    unit = (controls, "gue_spacings", lambda n, seed: str(seed))
    return Scenario(nothing, work, lambda folder: digests(folder, "*.npy", "*.json"), done, unit)


def corpus() -> Scenario:
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


def download() -> Scenario:
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
