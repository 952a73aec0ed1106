"""Zeros on disk: `FILE.npy` of shape (2, N) and `FILE.json`, which says where they come from and what was verified.

A height is kept as a pair, gamma = centre + offset, with |offset| <= 32: one float64 at gamma = 1e6 resolves 1e-10,
the pair 1e-15, and differences of neighbours keep that.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import ArrayFileError, load_array
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder, storage_error

DEFAULT_FOLDER = Path("data/rh_memory")


class ZerosError(UserError):
    """A file of zeros is missing, damaged, or shorter than asked for."""


@dataclass(frozen=True, eq=False)
class Zeros:
    """Heights gamma_n = centre + offset of consecutive zeros 1/2 + i gamma_n; float64 arrays (N,)."""

    centre: np.ndarray
    offset: np.ndarray
    manifest: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.centre)

    @property
    def height(self) -> np.ndarray:
        """gamma rounded to one float64: good to 1e-10 at 1e6, so not for differences."""
        return self.centre + self.offset


def manifest_path(path: Path) -> Path:
    """`FILE.json` beside `FILE.npy`."""
    return path.with_suffix(".json")


def save(path: Path, zeros: Zeros) -> None:
    """Write `path` and its manifest; a crash leaves the old pair, or files that `load` refuses. Raises StorageError."""
    make_folder(path.parent)
    buffer = io.BytesIO()
    np.save(buffer, np.stack([zeros.centre, zeros.offset]))
    data = buffer.getbuffer()
    manifest = {**zeros.manifest, "count": len(zeros), "sha256": hashlib.sha256(data).hexdigest()}
    manifest_path(path).unlink(missing_ok=True)
    atomic_write(path, bytes(data))
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write `FILE.json` beside `path`. Raises StorageError."""
    atomic_write(manifest_path(path), json.dumps(manifest, indent=2) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the zeros at `path`. Raises ZerosError if either file is missing or the manifest unreadable."""
    if not path.exists():
        raise ZerosError(f"no zeros at {path}: write them with `rh-memory zeros --count N --out {path}`")
    if path.is_dir():
        raise ZerosError(f"{path} is a folder: give a file that `rh-memory zeros` or `import` wrote")
    if path.suffix != ".npy":
        raise ZerosError(f"{path} is no .npy file: `rh-memory import {path} --out FILE.npy` reads tables of zeros")
    try:
        manifest = json.loads(manifest_path(path).read_text())
        if type(manifest["count"]) is not int or type(manifest["sha256"]) is not str:
            raise ValueError("count and sha256 should be a number and a text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ZerosError(
            f"{path} has no readable manifest {manifest_path(path).name} ({error}): generate or import it again"
        ) from error
    return manifest


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load(path: Path, count: int | None = None, *, verify: bool = True) -> Zeros:
    """The first `count` (default: all) zeros of `path`, memory-mapped.

    verify: compare the checksum, which reads the whole file. Raises ZerosError for missing or damaged files and for a
    count that the file does not hold.
    """
    path = Path(path)
    manifest = read_manifest(path)
    again = "generate or import it again"
    try:
        array = load_array(path, mmap_mode="r")
    except ArrayFileError as error:
        raise ZerosError(f"{error}, or {again}") from error
    if array.dtype != np.float64 or array.shape != (2, manifest["count"]):
        raise ZerosError(
            f"{path} holds {array.dtype} {array.shape}, its manifest says float64 (2, {manifest['count']}): {again}"
        )
    if verify and file_sha256(path) != manifest["sha256"]:
        raise ZerosError(f"{path} does not match the sha256 in {manifest_path(path).name}: {again}")
    n = array.shape[1] if count is None else count
    if not 1 <= n <= array.shape[1]:
        raise ZerosError(f"{n:,} zeros asked for, {path} holds {array.shape[1]:,}: generate a file with --count {n}")
    return Zeros(array[0, :n], array[1, :n], manifest)


def default_zeros(count: int, folder: Path | None = None, device: str = "cpu") -> Zeros:
    """The first `count` zeros from the cache in `folder`, generated there on first use.

    Processes that ask at the same time wait for the one that generates.
    """
    folder = DEFAULT_FOLDER if folder is None else Path(folder)
    make_folder(folder)
    path = folder / f"zeros_{count}.npy"
    with locked(folder / "zeros"):  # not `path` itself: `main` locks that
        from rh_memory.zeros.generate import ensure

        ensure(count, path, device)
    return load(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `.NAME.lock` beside `path`; the system drops it if the process dies."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        handle = open(lock, "w")  # noqa: SIM115 (closed below; only opening may fail here)
    except OSError as error:
        raise storage_error(lock, error) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
