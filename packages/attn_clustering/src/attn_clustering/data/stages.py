"""Steps of a data preparation that are skipped when, and only when, nothing they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab_shared.files import atomic_write

FORMAT = 1
"""Raise when a stage writes other things from the same inputs, so that old folders are made anew."""


def stage(
    folder: Path,
    name: str,
    files: Sequence[str],
    inputs: Mapping[str, Any],
    make: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Run `make`, which writes `files` into `folder` and returns facts, unless its manifest says that it was done.

    Done means: `NAME.manifest.json` records equal `inputs` (JSON-able; hashes of what the step reads, and its
    settings), and every file has the recorded content hash. Returns the manifest {"inputs", "outputs", "facts"}.
    """
    path = folder / f"{name}.manifest.json"
    inputs = json.loads(json.dumps({"format": FORMAT, **inputs}))
    old = _read(path)
    if old is not None and old.get("inputs") == inputs:
        outputs = old.get("outputs", {})
        if set(outputs) == set(files) and all(hash_file(folder / f) == outputs[f] for f in files):
            return old
    path.unlink(missing_ok=True)  # from here on the files are in the making
    facts = dict(make())
    manifest = {"inputs": inputs, "outputs": {f: hash_file(folder / f) for f in files}, "facts": facts}
    atomic_write(path, json.dumps(manifest, indent=1) + "\n")
    return manifest


def hash_file(path: Path) -> str | None:
    """BLAKE2b of a file's content; None when there is no such file."""
    if not path.is_file():
        return None
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
