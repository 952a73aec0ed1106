"""Files that are not whole: cut short under their final names, or left behind under temporary ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np


def half_written(folder: Path) -> list[str]:
    """Files under their final names that cannot be read. Temporary ones, and files that grow by lines, do not count."""
    problems = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file() or file.suffix not in _READERS:
            continue
        try:
            _READERS[file.suffix](file)
        except Exception as error:  # whatever a reader raises, the file is not whole
            problems.append(f"{file.relative_to(folder)} is half-written ({type(error).__name__}: {error})")
    return problems


def _read_parquet(file: Path) -> None:
    data = file.read_bytes()
    if len(data) < 12 or data[:4] != b"PAR1" or data[-4:] != b"PAR1":
        raise ValueError(f"{len(data)} bytes without both end markers")


def _read_csv(file: Path) -> None:
    if not file.read_text().endswith("\n"):
        raise ValueError("its last line has no end")


def _read_npz(file: Path) -> None:
    with np.load(file, allow_pickle=False) as arrays:
        dict(arrays)


def _read_safetensors(file: Path) -> None:
    from safetensors.torch import load_file

    load_file(file)


_READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda file: json.loads(file.read_text()),
    ".safetensors": _read_safetensors,
    ".npy": lambda file: np.load(file, allow_pickle=False),
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders in a folder whose work is finished. Locks stay by design."""
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".tmp", ".part") or ".part." in file.name or file.name == ".parts"
    ]
