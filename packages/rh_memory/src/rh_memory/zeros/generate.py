"""The first N zeros, verified, in a file: computed chunk by chunk, written as they come, resumed where a kill hit.

Every chunk stands alone: it computes a block more than it needs on both sides, pins N at both of its borders by
Turing's method, and is accepted only if it holds exactly the zeros between. If not, it is sampled more finely.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections import Counter as Histogram
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder, storage_error
from lab_shared.progress import Counter
from torch import Tensor

from rh_memory import __version__
from rh_memory.zeros.layout import WIDTH
from rh_memory.zeros.roots import find_zeros
from rh_memory.zeros.store import file_sha256, locked, manifest_path, write_manifest
from rh_memory.zeros.theta import MAX_HEIGHT, height_of_count, smooth_count
from rh_memory.zeros.verify import count_below, gram_statistics

ALGORITHM = "block Riemann-Siegel 1"
"""Changes whenever the numbers could: a part file of another version is not continued."""
START = 8
"""No zero lies below 14."""
_SAMPLES_PER_GAP = (8.0, 16.0, 32.0)
_FIRST_BORDER = 1024
"""Borders lie above this, where Turing's bound holds."""
_ZEROS_PER_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}


class GenerationError(UserError):
    """Zeros cannot be computed as asked, or could not be verified."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """The zeros with N(lower) < n <= N(upper), verified to be all."""

    before: int  # N(lower)
    centre: Tensor
    offset: Tensor
    statistics: dict[str, Any]


def compute_chunk(lower: int, upper: int, device: torch.device | str = "cpu") -> Chunk:
    """All zeros in [lower, upper), with N(lower), from two runs of Turing's method.

    lower: 8 (below it there are none) or an integer >= 1000; upper = lower + a multiple of 32, at least 1024. Raises
    GenerationError if the zeros found cannot be shown to be all of them even with 32 samples per mean gap.
    """
    device = torch.device(device)
    pad = 0 if lower == START else WIDTH
    blocks = (upper - lower + pad) // WIDTH + 1
    for samples in _SAMPLES_PER_GAP:
        centre, offset, counts = find_zeros(lower - pad, blocks, device, samples)
        heights = centre + offset
        borders = torch.tensor([lower, upper], dtype=torch.float64, device=device)
        first, last = torch.searchsorted(heights, borders).tolist()
        before = (0, 0) if lower == START else count_below(lower, _around(heights, first), WIDTH)
        after = count_below(upper, _around(heights, last), WIDTH)
        if before[0] == before[1] and after[0] == after[1] and after[0] - before[0] == last - first:
            gram = gram_statistics(heights, before[0] - first, lower, upper)
            return Chunk(
                before[0],
                centre[first:last],
                offset[first:last],
                {**gram, **counts, "samples_per_gap": samples, "begin": lower, "end": upper, "zeros": last - first},
            )
    raise GenerationError(
        f"{last - first:,} zeros found for {lower} <= t < {upper}; Turing's method allows N({lower}) in {before} and "
        f"N({upper}) in {after}: the list cannot be shown to be complete, please report this"
    )


def _around(heights: Tensor, index: int) -> np.ndarray:
    """The heights within a block of heights[index], and some more."""
    return heights[max(0, index - 8 * WIDTH) : index + 8 * WIDTH].cpu().numpy()


def main(
    count: int,
    out: str | Path,
    device: torch.device | str | None = None,
    resume: bool = True,
    zeros_per_chunk: int | None = None,
    chunk_of: Callable[[int, int], Chunk] | None = None,
) -> dict[str, Any]:
    """Write the first `count` zeros to `out` (.npy, float64 (2, count): centre and offset) and their manifest.

    device: default cuda when there is one. resume: continue a part file that an interrupted call for the same count
    left; its finished chunks are not computed again. zeros_per_chunk: default by device (bounds memory, and what a kill
    can cost). chunk_of: from where the chunk [lower, upper) comes; computed by default. Returns the manifest. Raises
    GenerationError, StorageError.
    """
    out = checked(out, count)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    planned = chunk_borders(count, device, zeros_per_chunk)  # before a file is made that could not be filled
    started = time.monotonic()
    make_folder(out.parent)
    with locked(out), _PartFile(out, count, resume) as part, Counter("zeros", count, "zeros") as counter:
        borders = part.borders or planned
        for lower, upper in list(pairwise(borders))[len(part.chunks) :]:
            chunk = compute_chunk(lower, upper, device) if chunk_of is None else chunk_of(lower, upper)
            if chunk.before != part.found:
                raise GenerationError(
                    f"{part.found:,} zeros found below {lower}, Turing's method counts {chunk.before:,}: "
                    "the lists of neighbouring chunks do not join, please report this"
                )
            part.append(borders, chunk)
            counter.show(min(part.found, count))
        statistics = {
            "seconds": round(time.monotonic() - started, 3),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
        }
        return part.finish(statistics)


def ensure(count: int, out: Path, device: torch.device | str | None = None, zeros_per_chunk: int | None = None) -> None:
    """`main`, unless the file and its manifest are there: then only a note that a kill left beside them is removed."""
    with locked(out):
        done = out.exists() and manifest_path(out).exists()
        if done:
            _note_path(out).unlink(missing_ok=True)
    if not done:
        main(count, out, device, zeros_per_chunk=zeros_per_chunk)


def checked(out: str | Path, count: int) -> Path:
    """`out` as a path. Raises GenerationError for another ending than .npy, for a folder, and for no zeros."""
    out = Path(out)
    if out.suffix != ".npy":
        raise GenerationError(f"--out {out}: the file must end in .npy")
    if out.is_dir():
        raise GenerationError(f"--out {out} is a folder: name a file")
    if count < 1:
        raise GenerationError(f"{count} zeros: the count must be at least 1")
    return out


def chunk_borders(count: int, device: torch.device | str, zeros_per_chunk: int | None = None) -> list[int]:
    """`plan` with the number of zeros in a chunk that suits the device."""
    return plan(count, zeros_per_chunk or _ZEROS_PER_CHUNK.get(torch.device(device).type, 1 << 18))


def plan(count: int, zeros_per_chunk: int) -> list[int]:
    """Borders of chunks from 8 to where N(t) >= count for certain: |S| < 4 up to MAX_HEIGHT.

    Raises GenerationError for counts beyond MAX_HEIGHT.
    """
    top = height_of_count(count + 4)
    if top + 4 * WIDTH > MAX_HEIGHT:
        raise GenerationError(
            f"{count:,} zeros reach t = {top:.3g}; phases are exact up to {MAX_HEIGHT:.3g}, "
            f"{math.floor(smooth_count(MAX_HEIGHT) / 1e6)} million zeros"
        )
    chunks = max(1, round(count / zeros_per_chunk))
    heights = [height_of_count(count * k / chunks) for k in range(1, chunks)] + [top]
    borders = [START + WIDTH * math.ceil((max(h, _FIRST_BORDER) - START) / WIDTH) for h in heights]
    return [START, *dict.fromkeys(borders)]


def _note_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.part.json")


class _PartFile:
    """`.NAME.part`, the array as far as it is known, and `.NAME.part.json`, the chunks that are safely in it."""

    def __init__(self, out: Path, count: int, resume: bool) -> None:
        self._out, self._count = out, count
        self._path = out.with_name(f".{out.name}.part")
        self._state_path = _note_path(out)
        self.borders: list[int] = []
        self.chunks: list[dict[str, Any]] = []
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2, count)})
        self._header = header.getvalue()
        self._size = len(self._header) + 16 * count
        state = self._read_state() if resume else None
        if state:
            self.borders, self.chunks = state["borders"], state["chunks"]

    @property
    def found(self) -> int:
        """Zeros in the finished chunks; a few more than `count` at the end."""
        return sum(chunk["zeros"] for chunk in self.chunks)

    def __enter__(self) -> _PartFile:
        try:
            # Unbuffered writes rather than a memory map, for which a full disk is a SIGBUS.
            self._file = open(self._path, "r+b" if self.chunks else "w+b")
            self._write(0, self._header)
            self._file.truncate(self._size)
        except OSError as error:
            raise storage_error(self._path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, borders: list[int], chunk: Chunk) -> None:
        """Write a chunk, and only then the note that it is there. Raises StorageError."""
        begin = self.found
        keep = max(0, min(len(chunk.centre), self._count - begin))
        try:
            for row, values in enumerate((chunk.centre, chunk.offset)):
                self._write(len(self._header) + 8 * (row * self._count + begin), values[:keep].cpu().numpy().tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(self._path, error) from error
        self.borders = borders
        self.chunks.append(chunk.statistics)
        state = {"algorithm": ALGORITHM, "count": self._count, "borders": borders, "chunks": self.chunks}
        atomic_write(self._state_path, json.dumps(state))

    def finish(self, statistics: dict[str, Any]) -> dict[str, Any]:
        """Put the array and its manifest in place."""
        self._file.close()
        manifest = {
            "count": self._count,
            "first_index": 1,
            "source": "computed",
            "algorithm": ALGORITHM,
            "version": __version__,
            **_merge(self.chunks),
            **statistics,
            "sha256": file_sha256(self._path),
        }
        manifest_path(self._out).unlink(missing_ok=True)
        try:
            os.replace(self._path, self._out)
        except OSError as error:
            raise storage_error(self._out, error) from error
        write_manifest(self._out, manifest)
        self._state_path.unlink(missing_ok=True)
        return manifest

    def _write(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        self._file.write(data)

    def _read_state(self) -> dict[str, Any] | None:
        """The state of an interrupted run of the same count and algorithm, if there is one that can be read."""
        try:
            state: dict[str, Any] = json.loads(self._state_path.read_text())
            if (state["algorithm"], state["count"]) != (ALGORITHM, self._count):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        complete = bool(state["chunks"]) and state["chunks"][-1]["end"] == state["borders"][-1]
        if complete and not self._path.exists() and self._out.exists() and not manifest_path(self._out).exists():
            os.replace(self._out, self._path)  # killed between putting the array in place and its manifest
        return state if self._path.exists() and self._path.stat().st_size == self._size else None


def _merge(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the chunks' statistics say of the whole."""
    histogram: Histogram[str] = Histogram()
    for chunk in chunks:
        histogram.update(chunk["s_histogram"])
    return {
        "verdict": "complete",
        "evidence": "N(t) pinned by Turing's method at both borders of every chunk, and as many zeros found between",
        "verified_to": chunks[-1]["end"],
        "zeros_below": sum(chunk["zeros"] for chunk in chunks),
        "chunks": len(chunks),
        "gram_points": sum(chunk["gram_points"] for chunk in chunks),
        "s_histogram": dict(sorted(histogram.items(), key=lambda item: int(item[0]))),
        "rosser_exceptions": [e for chunk in chunks for e in chunk["rosser_exceptions"]],
        "near_misses": sum(chunk["near_misses"] for chunk in chunks),
        "hidden_pairs": sum(chunk["hidden_pairs"] for chunk in chunks),
        "samples_per_gap": max(chunk["samples_per_gap"] for chunk in chunks),
    }
