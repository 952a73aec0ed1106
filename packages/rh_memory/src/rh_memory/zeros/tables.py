"""Published tables of zeros: Odlyzko's text files and the binary files of Platt's computation on LMFDB.

Text (zeros1 ... zeros6 of https://www-users.cse.umn.edu/~odlyzko/zeta_tables/): one height per line, or an index and a
height; a header may say `gamma - 267653395647`, and then that number is to be added. Compressed with gzip or not.

Binary (`zeros_*.dat`, https://www.lmfdb.org/zeros/zeta/): little-endian; a uint64 number of blocks; per block two
float64 t0, t1, two uint64 N(t0), N(t1), and N(t1) - N(t0) records of 13 bytes, each the distance to the next zero
(the first from t0) in units of 2^-101.

What a table claims is checked: order, duplicates, gaps, and how many zeros N(t) = theta/pi + 1 + S allows.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.errors import UserError

from rh_memory.data.unfold import spacings
from rh_memory.zeros.store import Zeros, file_sha256, manifest_path, read_manifest, save
from rh_memory.zeros.theta import smooth_count

_LONGEST_SPACING = 5.0
"""The longest unfolded spacing accepted: 3.3 is the record of the first 2 million zeros, 4.5 that near zero 10^22."""
_DRIFT_RUN = 50
"""Zeros over which S is averaged: its mean strays from 0 by far less than a half."""
_FIRST_ZERO = 14.134725
_EXACT_INTEGERS = 2**52
_COUNTABLE = 1e13
"""Above this height float64 cannot hold N(t) to a fraction of one zero."""
_RECORD = np.dtype([("low", "<u8"), ("middle", "<u4"), ("high", "u1")])
_NUMBER = re.compile(r"\d{1,30}(\.\d*)?")
_BASE = re.compile(r"gamma\s*-\s*(\d{1,30})")


class TableError(UserError):
    """A table of zeros cannot be trusted; the message names the place."""


class MalformedTableError(TableError):
    """A line or block is not what the format says."""


class TruncatedTableError(TableError):
    """The table ends in the middle of a line, record or block."""


class NotMonotoneError(TableError):
    """A height is below the one before it."""


class DuplicateZeroError(TableError):
    """A height occurs twice."""


class GapError(TableError):
    """Two neighbours are further apart than zeros ever are."""


class DensityError(TableError):
    """There are more or fewer heights than N(t) allows: zeros are missing, or numbers that are none were put in."""


def import_table(file: str | Path, out: str | Path) -> dict[str, Any]:
    """Read `file` (binary if it ends in .dat), check it, write `out` (.npy) with its manifest; return the manifest.

    Raises a TableError that names the line or record, or StorageError.
    """
    file, out = Path(file), Path(out)
    if not file.is_file():
        raise TableError(f"no table at {file}")
    if out.suffix != ".npy":
        raise TableError(f"--out {out}: the file must end in .npy")
    if file.resolve() in (out.resolve(), manifest_path(out).resolve()):
        raise TableError(f"--out {out} and its manifest would replace the table {file}: choose another name")
    zeros = read_platt(file) if file.suffix == ".dat" else read_text(file)
    save(out, zeros)
    return read_manifest(out)


def read_text(file: Path) -> Zeros:
    """An Odlyzko-style table. Raises TableError with the line number."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="ascii") as f:
            text = f.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TruncatedTableError(f"{file} is not a readable text file: {error}") from error
    lines = text.split("\n")
    ends_cleanly = lines[-1].strip() == ""
    start, base = _header(file, lines)
    numbers: list[str] = []
    places: list[int] = []
    columns = len(lines[start].split())
    first_index = _index(file, start, lines[start].split()[0]) if columns == 2 else None
    for i in range(start, len(lines)):
        words = lines[i].split()
        if not words:
            continue
        if len(words) != columns or not _NUMBER.fullmatch(words[-1]):
            last = i == len(lines) - 1
            raise (TruncatedTableError if last else MalformedTableError)(
                f"{file}, line {i + 1}: {lines[i].strip()[:60]!r} is not "
                f"{'a height' if columns == 1 else 'an index and a height'}"
            )
        if first_index is not None and _index(file, i, words[0]) != first_index + len(numbers):
            raise MalformedTableError(
                f"{file}, line {i + 1}: the zero is numbered {words[0]}, but {first_index + len(numbers)} comes next"
            )
        numbers.append(words[-1])
        places.append(i + 1)
    whole, fraction = zip(*(w.partition(".")[::2] for w in numbers), strict=True)
    if not ends_cleanly and len(fraction) > 1 and len(fraction[-1]) < len(fraction[-2]):
        raise TruncatedTableError(
            f"{file}, line {places[-1]}: the last line {numbers[-1]!r} breaks off: no line end, fewer digits"
        )
    if base < _EXACT_INTEGERS:
        centre = np.array([float(int(w) + base) for w in whole])
        offset = np.array([float("0." + (f or "0")) for f in fraction])
    else:  # one centre, as float64 would round the integers away
        centre, offset = np.full(len(numbers), float(base)), np.array([float(w) for w in numbers])
    digits = max(len(f) for f in fraction)
    manifest = _check(file, centre, offset, lambda k: f"line {places[k]}", first_index, 10.0**-digits)
    return Zeros(centre, offset, {**manifest, "format": "text", "decimals": digits})


def _index(file: Path, line: int, word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise MalformedTableError(f"{file}, line {line + 1}: {word!r} is no number of a zero, which count from 1")
    return int(word)


def _header(file: Path, lines: list[str]) -> tuple[int, int]:
    """(index of the first line of numbers, what to add to every height)."""
    base = 0
    for i, line in enumerate(lines):
        words = line.split()
        if found := _BASE.search(line):
            base = int(found[1])
        if 1 <= len(words) <= 2 and all(_NUMBER.fullmatch(w) for w in words) and "." in words[-1]:
            return i, base
        if i > 100:
            break
    raise MalformedTableError(f"{file} holds no heights in its first 100 lines: it is not a table of zeros")


def read_platt(file: Path) -> Zeros:
    """A binary file of Platt's. Raises TableError with the block and record."""
    data = file.read_bytes()
    if len(data) < 8:
        raise TruncatedTableError(f"{file}: {len(data)} bytes, not even the number of blocks")
    (blocks,) = struct.unpack_from("<Q", data)
    position, centres, offsets, first_index, expected = 8, [], [], 0, None
    for block in range(1, blocks + 1):
        where = f"{file}, block {block} of {blocks}"
        if position + 32 > len(data):
            raise TruncatedTableError(f"{where}: the file ends at byte {len(data):,}, in or before the block's header")
        t0, t1, before, after = struct.unpack_from("<ddQQ", data, position)
        position += 32
        if not (0 <= t0 < t1 < 1e13) or after < before or not float(t0).is_integer():
            raise MalformedTableError(f"{where}: heights {t0:g} to {t1:g}, zeros {before} to {after}")
        if expected is not None and before != expected:
            raise GapError(f"{where}: it starts after zero {before}, the block before it ended at {expected}")
        count = after - before
        if position + 13 * count > len(data):
            complete = (len(data) - position) // 13
            raise TruncatedTableError(f"{where}: {complete:,} of {count:,} records of 13 bytes")
        record = np.frombuffer(data, _RECORD, count, position)
        position += 13 * count
        # Units of 2^-37 add up exactly in an int64; the 64 bits below them are small enough for float64.
        coarse = np.cumsum((record["high"].astype(np.int64) << 32) + record["middle"])
        whole = coarse >> 37
        fine = np.cumsum(record["low"].astype(np.float64)) * 2.0**-101
        centre, offset = t0 + whole, (coarse - (whole << 37)) * 2.0**-37 + fine
        if count and centre[-1] + offset[-1] > t1:
            raise MalformedTableError(
                f"{where}: its last zero lies at {centre[-1] + offset[-1]:.6f}, beyond its end {t1:g}"
            )
        centres.append(centre)
        offsets.append(offset)
        if expected is None:
            first_index = before + 1
        expected = after
    if position != len(data):
        raise MalformedTableError(f"{file}: {len(data) - position:,} bytes after the last block")
    if not expected or expected < first_index:
        raise MalformedTableError(f"{file} holds no zeros")
    centre, offset = np.concatenate(centres), np.concatenate(offsets)
    manifest = _check(file, centre, offset, lambda k: f"record {k + 1}", first_index, 2.0**-101)
    return Zeros(centre, offset, {**manifest, "format": "platt"})


def _check(
    file: Path, centre: np.ndarray, offset: np.ndarray, place: Any, first_index: int | None, resolution: float
) -> dict[str, Any]:
    """The manifest of a table that passes; first_index: what the table says the first zero's number is, if it does."""
    height = centre + offset
    gap = np.diff(centre) + np.diff(offset)
    for k in np.flatnonzero(gap <= 0)[:1]:
        a, b = height[k], height[k + 1]
        if gap[k] == 0:
            raise DuplicateZeroError(f"{file}, {place(k + 1)}: {b:.12g} occurs twice")
        raise NotMonotoneError(f"{file}, {place(k + 1)}: {b:.12g} comes after {a:.12g}")
    if height[0] < _FIRST_ZERO:
        raise DensityError(f"{file}, {place(0)}: {height[0]:.12g} lies below the first zero, 14.134725...")
    unfolded = spacings(centre, offset)
    for k in np.flatnonzero(unfolded > _LONGEST_SPACING)[:1]:
        raise GapError(
            f"{file}, {place(k + 1)}: from {height[k]:.12g} to {height[k + 1]:.12g} are {unfolded[k]:.1f} mean gaps; "
            f"neighbouring zeros are never more than {_LONGEST_SPACING:g} apart: zeros are missing there"
        )
    # S halfway over its jump at the k-th zero; its mean over a run tells of a single zero too many or too few.
    count = len(height)
    countable = height[0] < _COUNTABLE
    smooth = np.concatenate([[0.0], np.cumsum(unfolded)]) + (smooth_count(float(height[0])) if countable else 0.0)
    index = np.arange(count) + 0.5
    run = min(_DRIFT_RUN, count)
    mean = np.convolve(index - smooth, np.full(run, 1 / run), mode="valid")
    if not countable:
        before = -float(mean[0])  # judged by its own beginning
    elif first_index is None and height[0] > _FIRST_ZERO + 1:
        before = -round(mean[0])  # a table from the middle: its own beginning tells the number
    else:
        before = (first_index or 1) - 1
    for k in np.flatnonzero(np.abs(mean + before) > 0.6)[:1]:
        drift = mean[k] + before
        raise DensityError(
            f"{file}, {place(k)} to {place(k + run - 1)}: about {abs(drift):.1f} zeros "
            f"too {'many' if drift > 0 else 'few'} for N(t) near t = {height[k]:.12g}, "
            f"if the first height is zero number {before + 1:.0f}"
        )
    return {
        "source": file.name,
        "source_sha256": file_sha256(file),
        "first_index": before + 1 if countable else None,
        "resolution": resolution,
        "verdict": "consistent with N(t)",
        "evidence": f"ascending, no gap above {_LONGEST_SPACING:g}, S averages to 0 over every {run} zeros",
    }
