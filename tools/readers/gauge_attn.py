"""gauge_attn's files: text, and the tokenizer of a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from readers.base import DOCUMENTS, JSON, JSONL, MADE_JSONL, Files, Reader


def gauge_text() -> Reader:
    """gauge_attn's text: .txt, .jsonl, .jsonl.gz and a folder of splits."""
    from gauge_attn.data.text import read_splits

    plain = "".join(DOCUMENTS).encode()
    seeds: list[Files] = [
        {"data.txt": plain},
        {"data.jsonl": JSONL},
        {"data.jsonl.gz": gzip.compress(JSONL, mtime=0)},
        {"all/train.txt": plain, "all/valid.txt": plain[:200], "all/test.raw": plain[200:500]},
    ]

    def read(folder: Path) -> Any:
        entry = next(folder.iterdir())
        return read_splits(str(entry), None, "documents" if ".jsonl" in entry.name else "contiguous")

    def check(folder: Path, value: Any) -> None:
        assert set(value) == {"train", "valid", "test"}
        for text in value.values():
            text.encode()  # what every tokenizer does with it
        entry = next(folder.iterdir())
        if entry.suffix == ".txt":
            assert "".join(value[name] for name in ("train", "valid", "test")) == entry.read_bytes().decode()

    return Reader(seeds, read, check, [MADE_JSONL])


def tokenizer() -> Reader:
    """gauge_attn's tokenizer.json of a run."""
    from gauge_attn.data.tokenizers import Tokenizer, train_tokenizer

    text = "".join(DOCUMENTS)
    made = [train_tokenizer("byte", text, 256), train_tokenizer("word", text, 12), train_tokenizer("bpe", text, 270)]
    seeds: list[Files] = [{"tokenizer.json": tokenizer.to_json().encode()} for tokenizer in made]

    def check(folder: Path, value: Any) -> None:
        symbols = value.encode("It has words.\n")
        assert symbols.min() >= 0
        assert symbols.max() < value.vocab
        value.decode(symbols.tolist())

    kinds = st.sampled_from(["byte", "word", "bpe", "x"]) | JSON
    symbols = st.lists(JSON | st.lists(st.integers(-1, 300)))
    changed = st.fixed_dictionaries({"kind": kinds, "symbols": symbols}).map(
        lambda facts: {"tokenizer.json": json.dumps(facts).encode("utf-8", "replace")}
    )
    return Reader(seeds, lambda folder: Tokenizer.read(folder / "tokenizer.json"), check, [changed])
