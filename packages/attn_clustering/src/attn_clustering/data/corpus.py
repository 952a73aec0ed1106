"""Real text as sequences with topics: documents -> paragraphs -> topics -> BPE -> token pools -> sequences.

Documents are split into training and held-out before anything else. Sequences have the same segment structure as the
micro-languages; a segment is a stretch of its topic's pool, each pool is read from beginning to end and over again.

Folder: paragraphs.jsonl, topics.npy, tokenizer.json, {train,val}.pool.npy, {train,val}.{tokens,topics}.npy (uint16 and
uint8, N x T, memory-mapped on reading) and one *.manifest.json per stage.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.arrays import load_array, save_array
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.progress import Counter, Progress

from attn_clustering.data import counter, segments
from attn_clustering.data.dedup import concatenate, drop_shared
from attn_clustering.data.languages import Sequences, Split
from attn_clustering.data.settings import CorpusConfig
from attn_clustering.data.sources import documents, files_in
from attn_clustering.data.stages import hash_file, stage
from attn_clustering.data.tokenizer import encode, load_tokenizer, train_tokenizer
from attn_clustering.data.topics import NO_TOPIC, assign_topics

SPLITS: tuple[Split, Split] = ("train", "val")
_SEQUENCES = 5  # word of the keys of this module


def prepare(config: CorpusConfig, out: Path) -> Path:
    """Make or complete the corpus folder `out`; stages whose inputs have not changed are kept. Returns `out`.

    Raises UserError for sources that cannot be read and text that is too small for the settings.
    """
    make_folder(out)
    fields = asdict(config)

    def settings(*names: str) -> dict[str, Any]:
        return {name: fields[name] for name in names}

    paragraphs = stage(
        out,
        "paragraphs",
        ["paragraphs.jsonl"],
        {
            "sources": _source_hashes(config),
            **settings("text_field", "topic_field", "max_documents", "min_words", "max_words", "val_fraction", "seed"),
        },
        lambda: _paragraphs(config, out),
    )
    topics = stage(
        out,
        "topics",
        ["topics.npy"],
        {"paragraphs": paragraphs["outputs"], **settings("embedder", "embedding_model", "clusters", "seed")},
        lambda: _topics(config, out),
    )
    tokenizer = stage(
        out,
        "tokenizer",
        ["tokenizer.json"],
        {"paragraphs": paragraphs["outputs"], **settings("vocab")},
        lambda: _tokenizer(config, out),
    )
    pools = stage(
        out,
        "pools",
        [f"{split}.pool.npy" for split in SPLITS],
        {
            "paragraphs": paragraphs["outputs"],
            "topics": topics["outputs"],
            "tokenizer": tokenizer["outputs"],
            **settings("clusters", "dedup_ngram"),
        },
        lambda: _pools(config, out),
    )
    stage(
        out,
        "sequences",
        [f"{split}.{what}.npy" for split in SPLITS for what in ("tokens", "topics")],
        {
            "pools": pools["outputs"],
            "bounds": {split: pools["facts"][split]["bounds"] for split in SPLITS},
            "names": topics["facts"]["names"],
            **settings("vocab", "seq_len", "segments", "min_segment", "train_sequences", "val_sequences", "seed"),
        },
        lambda: _sequences(config, out, pools["facts"], topics["facts"]["names"]),
    )
    return out


def load(folder: Path, split: Split = "train") -> Sequences:
    """All sequences of a split. Raises UserError for a folder not prepared, or damaged."""
    facts, hashes = describe(folder), _manifest(folder)["outputs"]
    for name in (f"{split}.tokens.npy", f"{split}.topics.npy"):
        if hash_file(folder / name) != hashes.get(name):
            raise UserError(f"{folder / name} is missing or damaged: run `attn-clustering prepare` again")
    tokens_NT = load_array(folder / f"{split}.tokens.npy", mmap_mode="r")
    topics_NT = torch.from_numpy(load_array(folder / f"{split}.topics.npy"))
    if tokens_NT.max(initial=0) >= facts["vocab"] or int(topics_NT.max()) >= len(facts["names"]):
        raise UserError(f"{folder} has tokens or topics beyond those of its manifest: prepare it again")
    counts_NK = torch.stack([(topics_NT == k).sum(dim=1) for k in range(len(facts["names"]))], dim=1)
    n_topics = counts_NK.shape[1]
    dominant_N = (counts_NK * n_topics + torch.arange(n_topics - 1, -1, -1)).argmax(dim=1).to(torch.uint8)
    tokens = torch.from_numpy(tokens_NT.astype(np.int32))
    return Sequences(tokens, topics_NT, dominant_N)


def describe(folder: Path) -> dict[str, Any]:
    """Facts of a prepared folder: "names" of the topics, "vocab", "seq_len", "segments", "min_segment", and per split
    "sequences" and "passes" over each topic's pool. Raises UserError when the folder was not prepared."""
    facts: dict[str, Any] = _manifest(folder)["facts"]
    return facts


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "sequences.manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} is no prepared corpus (it has no {path.name}): run `attn-clustering prepare` first")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        facts, hashes = manifest["facts"], manifest["outputs"]
        good = all(isinstance(name, str) for name in facts["names"]) and isinstance(hashes, dict)
        good = good and all(type(facts[name]) is int for name in ("vocab", "seq_len", "min_segment"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}): run `attn-clustering prepare` again") from error
    if not good:
        raise UserError(f"{path} is damaged: run `attn-clustering prepare` again")
    return manifest


# --- stages ---


def _source_hashes(config: CorpusConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source in config.sources:
        path = Path(source)
        if source.startswith("hf:") or not path.exists():
            found[source] = None  # a missing file is reported when it is read
        elif path.is_dir():
            found[source] = {str(p.relative_to(path)): hash_file(p) for p in files_in(path)}
        else:
            found[source] = hash_file(path)
    return found


def _paragraphs(config: CorpusConfig, out: Path) -> dict[str, Any]:
    """One line per paragraph of the right length, no markup and not seen before; the split is its document's."""
    lines: list[str] = []
    seen: set[bytes] = set()
    totals = {"documents": 0, "paragraphs": 0, "duplicates": 0, "train": 0, "val": 0}
    console = Progress()
    for document in documents(config):
        totals["documents"] += 1
        if totals["documents"] % 2_000 == 0:  # how many there will be is not known
            console.line(f"reading: {totals['documents']:,} documents")
        split = "val" if _fraction(document.text, config.seed) < config.val_fraction else "train"
        for paragraph in re.split(r"\n\s*\n", document.text):
            text = " ".join(paragraph.split())
            if not config.min_words <= len(text.split()) <= config.max_words or text[0] in "={|":
                continue
            totals["paragraphs"] += 1
            digest = _digest(text.casefold())
            if digest in seen:
                totals["duplicates"] += 1
                continue
            seen.add(digest)
            totals[split] += 1
            row = {"text": text, "topic": document.topic, "split": split}
            lines.append(json.dumps(row, ensure_ascii=False))
    for split in SPLITS:
        if not totals[split]:
            raise UserError(
                f"no paragraph of {config.min_words} to {config.max_words} words among the {split} documents "
                f"({totals['documents']} read): add documents, or change min_words, max_words or val_fraction"
            )
    atomic_write(out / "paragraphs.jsonl", "\n".join(lines) + "\n")
    return totals


def _read_paragraphs(out: Path) -> tuple[list[str], list[str | None], np.ndarray]:
    rows = [json.loads(line) for line in (out / "paragraphs.jsonl").read_text(encoding="utf-8").split("\n") if line]
    is_train = np.array([row["split"] == "train" for row in rows])
    return [row["text"] for row in rows], [row["topic"] for row in rows], is_train


def _topics(config: CorpusConfig, out: Path) -> dict[str, Any]:
    texts, given, is_train = _read_paragraphs(out)
    found = assign_topics(config, texts, given, is_train)
    save_array(out / "topics.npy", found.topic_N)
    counts = np.bincount(found.topic_N, minlength=256)
    return {
        "names": found.names,
        "paragraphs": counts[: len(found.names)].tolist(),
        "dropped": int(counts[NO_TOPIC]),
        "stability_ari": found.stability,
    }


def _tokenizer(config: CorpusConfig, out: Path) -> dict[str, Any]:
    texts, _, is_train = _read_paragraphs(out)
    train_tokenizer([t for t, keep in zip(texts, is_train, strict=True) if keep], config.vocab, out / "tokenizer.json")
    return {}


def _pools(config: CorpusConfig, out: Path) -> dict[str, Any]:
    """Each split's tokens, topic after topic, in the order of the paragraphs, an EOS after each paragraph."""
    texts, _, is_train = _read_paragraphs(out)
    topic_N = np.load(out / "topics.npy", allow_pickle=False)
    tokenizer = load_tokenizer(out / "tokenizer.json")
    encoded: list[np.ndarray] = []
    with Counter("encoding", len(texts), "paragraphs") as progress:
        for ids in encode(tokenizer, texts):
            encoded.append(ids)
            progress.show(len(encoded))
    order = np.argsort(topic_N, kind="stable")
    order = order[topic_N[order] != NO_TOPIC]
    train = order[is_train[order]]
    train_pool = concatenate(encoded, train)
    val = drop_shared(encoded, order[~is_train[order]], train_pool, config.dedup_ngram)
    facts: dict[str, Any] = {"val_paragraphs_dropped": int((~is_train[order]).sum()) - len(val)}
    for split, chosen, pool in (("train", train, train_pool), ("val", val, concatenate(encoded, val))):
        sizes = np.bincount(
            topic_N[chosen], weights=[len(encoded[i]) for i in chosen], minlength=config.clusters
        ).astype(np.int64)
        if sizes.min() < config.seq_len:
            raise UserError(
                f"topic {int(sizes.argmin())} has {sizes.min():,} {split} tokens, less than seq_len={config.seq_len}: "
                "add text, or lower clusters or seq_len"
            )
        save_array(out / f"{split}.pool.npy", pool)
        facts[split] = {"bounds": [0, *sizes.cumsum().tolist()], "paragraphs": len(chosen)}
    return facts


def _sequences(config: CorpusConfig, out: Path, pools: dict[str, Any], names: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "names": names,
        "vocab": config.vocab,
        "seq_len": config.seq_len,
        "segments": config.segments,
        "min_segment": config.min_segment,
    }
    for number, split in enumerate(SPLITS):
        pool, bounds = np.load(out / f"{split}.pool.npy", allow_pickle=False), np.array(pools[split]["bounds"])
        wanted = config.train_sequences if split == "train" else config.val_sequences
        n = wanted or max(len(pool) // config.seq_len, 1)
        drawn = segments.draw(config.law, counter.key(config.seed, _SEQUENCES, number), torch.arange(n))
        lengths_S, topics_S = drawn.lengths_NM().flatten().numpy(), drawn.topics_NM.flatten().numpy()
        starts_S, sizes_K = np.zeros_like(lengths_S), np.diff(bounds)
        for k in range(len(sizes_K)):
            mine = topics_S == k
            starts_S[mine] = lengths_S[mine].cumsum() - lengths_S[mine]
        # Position of every token in its topic's endless tape: where its segment starts, plus how far into it.
        within = np.arange(n * config.seq_len) - np.repeat(lengths_S.cumsum() - lengths_S, lengths_S)
        tape = np.repeat(starts_S, lengths_S) + within
        topic = np.repeat(topics_S, lengths_S)
        tokens = pool[bounds[topic] + tape % sizes_K[topic]]
        save_array(out / f"{split}.tokens.npy", tokens.reshape(n, config.seq_len))
        save_array(out / f"{split}.topics.npy", topic.astype(np.uint8).reshape(n, config.seq_len))
        facts[split] = {
            "sequences": n,
            "passes": [round(float(lengths_S[topics_S == k].sum() / sizes_K[k]), 3) for k in range(len(sizes_K))],
        }
    return facts


# --- helpers ---


def _fraction(text: str, seed: int) -> float:
    return int.from_bytes(_digest(f"{seed}\n{text}")[:7], "little") / (1 << 56)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
