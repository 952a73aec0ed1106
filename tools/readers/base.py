"""What a reader under test is, and what all of them need: files as bytes, equality, made-up JSON and documents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Files = Mapping[str, bytes]
"""Relative path -> content."""


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    seeds: folders of valid files. read(folder): what the program makes of the files. check(folder, value): raises
    AssertionError when a value that was accepted is not what the files say. made: files put together by hypothesis.
    """

    seeds: list[Files]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None]
    made: list[st.SearchStrategy[Files]] = field(default_factory=list)


def files_of(make: Callable[[Path], object]) -> Files:
    """The files that `make(folder)` writes."""
    with TemporaryDirectory() as name:
        make(Path(name))
        return {
            str(p.relative_to(name)): p.read_bytes()
            for p in sorted(Path(name).rglob("*"))
            if p.is_file() and ".lock" not in p.name
        }


def equal(a: Any, b: Any) -> bool:
    """Equality of trees of plain values, arrays and tensors, in value and type; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def same_as(expected: Any) -> Callable[[Path, Any], None]:
    """For formats that carry checksums: what is accepted is the original."""

    def check(folder: Path, value: Any) -> None:
        assert equal(value, expected), "accepted with another content than was written"

    return check


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def write(folder: Path, files: Files) -> None:
    """Put the files under `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


DOCUMENTS = [f"Document {i}.\nIt has words, né, and a line end.\n" * 3 for i in range(40)]
JSONL = "".join(json.dumps({"text": text, "topic": "ab"[i % 2]}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()
LINES = st.lists(
    (st.fixed_dictionaries({"text": st.text(max_size=20)}) | JSON).map(json.dumps) | st.text(max_size=9), max_size=30
)
MADE_JSONL = LINES.map(lambda lines: {"data.jsonl": "\n".join(lines).encode("utf-8", "replace")})
