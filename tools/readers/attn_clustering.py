"""attn_clustering's files: text, prepared corpora, saved orders, Qwen3 folders."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from readers.base import DOCUMENTS, JSON, JSONL, MADE_JSONL, Files, Reader, files_of


def attn_text() -> Reader:
    """attn_clustering's sources: .txt, .jsonl, .jsonl.gz, .parquet."""
    import polars as pl
    from attn_clustering.data.settings import CorpusConfig
    from attn_clustering.data.sources import documents

    table = io.BytesIO()
    pl.DataFrame({"text": DOCUMENTS[:5], "topic": list("abcab")}).write_parquet(table)
    seeds: list[Files] = [
        {"data.txt": "".join(DOCUMENTS).encode()},
        {"data.jsonl": JSONL},
        {"data.jsonl.gz": gzip.compress(JSONL, mtime=0)},
        {"data.parquet": table.getvalue()},
    ]

    def read(folder: Path) -> Any:
        return list(documents(CorpusConfig(sources=(str(next(folder.iterdir())),), topic_field="topic")))

    def check(folder: Path, value: Any) -> None:
        for document in value:
            document.text.encode()
            assert isinstance(document.topic, str)

    return Reader(seeds, read, check, [MADE_JSONL])


def prepared_corpus() -> Reader:
    """A folder that `attn-clustering prepare` has made, as training reads it."""
    from attn_clustering.data import corpus
    from attn_clustering.data.stages import stage

    rng = np.random.default_rng(1)
    arrays = {
        f"{split}.{what}.npy": rng.integers(0, top, (n, 16)).astype(kind)
        for split, n in (("train", 6), ("val", 3))
        for what, top, kind in (("tokens", 300, np.uint16), ("topics", 2, np.uint8))
    }

    def make(folder: Path) -> None:
        def write() -> dict[str, Any]:
            for name, array in arrays.items():
                np.save(folder / name, array)
            return {"names": ["a", "b"], "vocab": 300, "seq_len": 16, "segments": [1, 2], "min_segment": 4}

        stage(folder, "sequences", list(arrays), {}, write)

    def read(folder: Path) -> Any:
        return [vars(corpus.load(folder, split)) for split in corpus.SPLITS], corpus.describe(folder)

    seed = files_of(make)

    def check(folder: Path, value: Any) -> None:
        splits, facts = value
        assert all(isinstance(name, str) for name in facts["names"])
        for split, found in zip(corpus.SPLITS, splits, strict=True):
            assert np.array_equal(found["tokens_NT"].numpy(), arrays[f"{split}.tokens.npy"])
            assert np.array_equal(found["topics_NT"].numpy(), arrays[f"{split}.topics.npy"])

    manifest = json.loads(seed["sequences.manifest.json"])
    changed = st.tuples(st.sampled_from(sorted(manifest["facts"])), JSON).map(
        lambda kv: {**manifest, "facts": {**manifest["facts"], kv[0]: kv[1]}}
    )
    replaced = st.tuples(st.sampled_from(sorted(manifest)), JSON).map(lambda kv: {**manifest, kv[0]: kv[1]})
    made = (changed | replaced).map(
        lambda m: {**seed, "sequences.manifest.json": json.dumps(m).encode("utf-8", "replace")}
    )
    return Reader([seed], read, check, [made])


def plan() -> Reader:
    """attn_clustering's saved order of sequences (npz)."""
    from attn_clustering.data.ordering import Plan, plan

    made = plan("shuffled", torch.arange(12) % 3, steps=5, batch=4, seed=1)

    def check(folder: Path, value: Any) -> None:
        assert torch.equal(value.index_S, made.index_S)
        assert (value.steps, value.batch, value.kind) == (made.steps, made.batch, made.kind)

    seed = files_of(lambda folder: made.save(folder / "plan.npz"))
    return Reader([seed], lambda folder: Plan.load(folder / "plan.npz"), check)


def hugging_face() -> Reader:
    """A Qwen3 folder from the Hugging Face hub."""
    from attn_clustering.config import ModelConfig
    from attn_clustering.hf import export_model, import_hf
    from attn_clustering.model import Transformer

    small = ModelConfig(vocab=32, d_model=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8)
    torch.manual_seed(0)
    seed = files_of(lambda folder: export_model(Transformer(small), folder, max_len=16))
    config = json.loads(seed["config.json"])
    values: st.SearchStrategy[Any] = st.sampled_from([0, -1, 1, 3, 8.0, "8", None, [], {}, True, 10**30, 1e999]) | JSON
    changed = st.tuples(st.sampled_from(sorted(config)), values).map(lambda kv: {**config, kv[0]: kv[1]})
    made = changed.map(lambda c: {**seed, "config.json": json.dumps(c).encode("utf-8", "replace")})

    def check(folder: Path, value: Any) -> None:
        assert value.config.vocab == 32
        assert value.config.layers == 1
        with torch.no_grad():
            value(torch.zeros(1, 4, dtype=torch.long))

    return Reader([seed], import_hf, check, [made])
