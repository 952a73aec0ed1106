"""The files of an event store: flat little-endian arrays that grow shard by shard, and a manifest.

NAME.bin holds one array, with the source's batch files one after the other. manifest.json says how far each
of them (a shard) reaches, with checksums, and is replaced only after the shard's bytes are on disk: whatever
lies beyond the last listed shard is the remains of a killed build and is cut off by the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder, storage_error

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

PULSE_ARRAYS = {"word": "<u4", "charge": "<u2"}
ESCAPE_ARRAYS = {"escape_index": "<i8", "escape_time": "<i8", "escape_charge": "<f4"}
EVENT_ARRAYS = {
    "end": "<i8",  # pulses up to and with the event
    "event_id": "<i8",
    "n_doms": "<u2",
    "azimuth": "<f8",  # rad, labelled sources only
    "zenith": "<f8",
}
TRUTH_ARRAYS = {  # simulated events only
    "type": "<i1",  # 0 cascade, 1 track
    "energy": "<f4",  # GeV
    "vertex_x": "<f4",  # m, where the neutrino interacted; not in stores made before it was kept
    "vertex_y": "<f4",
    "vertex_z": "<f4",
}
ARRAYS = PULSE_ARRAYS | ESCAPE_ARRAYS | EVENT_ARRAYS | TRUTH_ARRAYS
"""Type of each array of a store."""


class CacheError(UserError):
    """A store that is unfinished, damaged, of another format, or made from other files."""


@dataclass(frozen=True)
class Extent:
    """How much of a store is there: rows of its per-event, per-pulse and per-escaped-pulse arrays."""

    events: int = 0
    pulses: int = 0
    escapes: int = 0

    def rows(self, name: str) -> int:
        """Rows of array `name`."""
        if name in PULSE_ARRAYS:
            return self.pulses
        return self.escapes if name in ESCAPE_ARRAYS else self.events


@dataclass
class Manifest:
    """What manifest.json holds. A shard is {"file", "fingerprint", "cut", "extent" (its end), "blake2b"}."""

    arrays: list[str]
    meta_fingerprint: str | None
    shards: list[dict[str, Any]]
    complete: bool = False
    version: int = FORMAT_VERSION

    @property
    def extent(self) -> Extent:
        return Extent(**self.shards[-1]["extent"]) if self.shards else Extent()

    def write(self, folder: Path) -> None:
        atomic_write(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CacheError if the file is absent, not a manifest, or of another version."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            if not {"shards", "arrays"} <= values.keys():
                raise CacheError(
                    f"{folder} is not an event store: its {MANIFEST} is of something else; choose another folder"
                )
            if values["version"] != FORMAT_VERSION:
                raise CacheError(
                    f"{folder} has store version {values['version']}, this program reads {FORMAT_VERSION}: "
                    "delete it and build it again"
                )
            manifest = cls(**values)
            manifest._check()
            return manifest
        except FileNotFoundError as error:
            raise CacheError(f"{folder} is not an event store: it has no {MANIFEST}") from error
        except CacheError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged ({error!s:.300}): delete the store and build it again") from error

    def _check(self) -> None:
        """Raises ValueError, or what a wrong type raises, for a manifest that no build writes.

        The names become file names, so only those of `ARRAYS` are let through.
        """
        names = set(self.arrays)
        always = PULSE_ARRAYS.keys() | ESCAPE_ARRAYS.keys() | {"end", "event_id", "n_doms"}
        if len(names) < len(self.arrays) or not names <= ARRAYS.keys() or (self.shards and not always <= names):
            raise ValueError("it lists arrays that no store has, or lacks some")
        if type(self.complete) is not bool or (self.complete and not self.shards):
            raise ValueError("it says neither that the build is complete nor that it is not")
        before = [0, 0, 0]
        for shard in self.shards:
            extent = list(asdict(Extent(**shard["extent"])).values())
            grown = all(type(n) is int and n >= m for n, m in zip(extent, before, strict=True))
            if not grown or shard["blake2b"].keys() != names or type(shard["cut"]) is not bool:
                raise ValueError(f"its entry of {shard['file']!s:.80} makes no sense")
            hash((shard["file"], shard["fingerprint"]))
            before = extent

    @classmethod
    def continued(cls, folder: Path, files: Iterable[Path], meta_file: Path | None) -> Manifest:
        """The manifest of the store in `folder`, or an empty one.

        Raises:
            CacheError: the folder holds something else, or a store made from batch files or a meta table that differ
                from these.
        """
        meta = None if meta_file is None else fingerprint(meta_file)
        if not (folder / MANIFEST).exists():
            ours = {".lock", f".{MANIFEST}.tmp", *(array_file(folder, name).name for name in ARRAYS)}
            if others := sorted({path.name for path in folder.iterdir()} - ours):
                raise CacheError(f"{folder} is not an event store: it holds {others[0]}; choose another folder")
            return cls(arrays=[], meta_fingerprint=meta, shards=[])
        manifest = cls.read(folder)
        now = {file.name: file for file in files}
        known = {shard["file"]: shard["fingerprint"] for shard in manifest.shards}
        changed = [name for name, was in known.items() if name not in now or fingerprint(now[name]) != was]
        if changed or manifest.meta_fingerprint != meta:
            what = changed[0] if changed else "meta table"
            raise CacheError(f"{folder} was made from another {what}: delete it or choose another folder")
        return manifest


def array_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def open_arrays(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The memory-mapped arrays. Raises CacheError for a file whose size is not what the manifest says."""
    arrays = {}
    for name in manifest.arrays:
        file, rows = array_file(folder, name), manifest.extent.rows(name)
        size = file.stat().st_size if file.exists() else -1
        if size != rows * np.dtype(ARRAYS[name]).itemsize:
            what = f"has {size:,} bytes instead of {rows * np.dtype(ARRAYS[name]).itemsize:,}"
            raise CacheError(f"{file} {what if size >= 0 else 'is missing'}: delete the store and build it again")
        # An empty file cannot be mapped.
        arrays[name] = np.memmap(file, ARRAYS[name], mode="r") if rows else np.empty(0, ARRAYS[name])
    return arrays


def append_shard(folder: Path, manifest: Manifest, arrays: dict[str, np.ndarray], shard: dict[str, Any]) -> None:
    """Writes a shard's arrays behind what the manifest lists, then lists it.

    `arrays` counts pulses from the beginning of the shard; `shard` brings file, fingerprint and cut.

    Raises:
        StorageError: the disk is full or not writable; the store is as before.
    """
    before = manifest.extent
    arrays = arrays | {
        "end": arrays["end"] + before.pulses,
        "escape_index": arrays["escape_index"] + before.pulses,
    }
    for name in manifest.arrays:
        file = array_file(folder, name)
        try:
            with file.open("r+b" if file.exists() else "w+b") as handle:
                handle.truncate(before.rows(name) * np.dtype(ARRAYS[name]).itemsize)
                handle.seek(0, os.SEEK_END)
                handle.write(np.ascontiguousarray(arrays[name], ARRAYS[name]).data)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise storage_error(file, error) from error
    added = Extent(len(arrays["end"]), len(arrays["word"]), len(arrays["escape_index"]))
    extent = Extent(before.events + added.events, before.pulses + added.pulses, before.escapes + added.escapes)
    sums = {name: checksum(np.asarray(arrays[name], ARRAYS[name])) for name in manifest.arrays}
    manifest.shards.append(shard | {"extent": asdict(extent), "blake2b": sums})
    manifest.write(folder)


def checksum(array: np.ndarray) -> str:
    return blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def fingerprint(file: Path) -> str:
    """Of a file's size and its first and last 64 KiB, where parquet keeps the statistics of every column."""
    with file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        digest = blake2b(str(size).encode(), digest_size=16)
        for at in (0, max(size - (1 << 16), 0)):
            handle.seek(at)
            digest.update(handle.read(1 << 16))
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other builders out of it; the system frees the lock of a process that
    dies.
    """
    make_folder(folder)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
