"""rh_memory's files: its own zeros, and the tables of others."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st

from readers.base import Files, Reader, equal, files_of


@cache
def _first_zeros() -> Any:
    from rh_memory.zeros.generate import main
    from rh_memory.zeros.store import load

    with TemporaryDirectory() as name:
        main(200, Path(name) / "z.npy", "cpu")
        zeros = load(Path(name) / "z.npy")
        return np.array(zeros.centre), np.array(zeros.offset)


def zeros_file() -> Reader:
    """FILE.npy with FILE.json."""
    from rh_memory.zeros.store import Zeros, load, save

    centre, offset = _first_zeros()
    seed = files_of(lambda folder: save(folder / "zeros.npy", Zeros(centre, offset, {"first_index": 1})))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}, print], dtype=object), allow_pickle=True)
    zipped = io.BytesIO()
    np.savez(zipped, a=np.arange(3))
    raw = seed["zeros.npy"]

    def signed(data: bytes, count: int = 200) -> Files:
        manifest = {"count": count, "sha256": hashlib.sha256(data).hexdigest()}
        return {"zeros.npy": data, "zeros.json": json.dumps(manifest).encode()}

    headers = st.text(max_size=60).map(lambda text: text.encode("latin1", "replace"))
    made = headers.map(lambda h: signed(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(h)) + h + raw[128:]))
    shapes = st.sampled_from([b"(2, 200)", b"(-2, 200)", b"(2, 99999999999999)", b"(2,)", b"()", b"(200, 2)", b"x"])
    types = st.sampled_from([b"<f8", b">f8", b"|O", b"<f4", b"<U9", b"|V8"])
    typed = st.tuples(shapes, types).map(lambda st_: signed(raw.replace(b"(2, 200)", st_[0]).replace(b"<f8", st_[1])))

    def read(folder: Path) -> Any:
        zeros = load(folder / "zeros.npy")
        return np.array(zeros.centre), np.array(zeros.offset)

    def check(folder: Path, value: Any) -> None:
        assert all(x.dtype == np.float64 and x.ndim == 1 for x in value)
        if (folder / "zeros.npy").read_bytes() == raw:
            assert equal(value, (centre, offset))

    seeds: list[Files] = [seed, signed(pickled.getvalue(), 2), signed(zipped.getvalue(), 3)]
    return Reader(seeds, read, check, [made, typed])


def zero_tables() -> Reader:
    """Odlyzko's text, plain and gzipped, and Platt's binary files."""
    from rh_memory.zeros.tables import read_platt, read_text

    centre, offset = _first_zeros()
    lines = [f"{int(c)}{f'{o:.9f}'[1:]}" for c, o in zip(*_whole_and_rest(centre, offset), strict=True)]
    text = "\n".join(lines).encode() + b"\n"
    numbered = "\n".join(f"{i + 1} {line}" for i, line in enumerate(lines)).encode() + b"\n"
    count = 100
    height = centre + offset
    steps = np.diff(height[:count], prepend=14.0) * 2.0**40
    records = b"".join(int(step * 2**61).to_bytes(13, "little") for step in steps)
    platt = struct.pack("<QddQQ", 1, 14.0, math.ceil(height[count - 1]), 0, count) + records
    seeds: list[Files] = [
        {"zeros.txt": text},
        {"zeros.txt": numbered},
        {"zeros.txt.gz": gzip.compress(text, mtime=0)},
        {"zeros.dat": platt},
    ]

    def read(folder: Path) -> Any:
        file = next(folder.iterdir())
        return read_platt(file) if file.suffix == ".dat" else read_text(file)

    def check(folder: Path, value: Any) -> None:
        file = next(folder.iterdir())
        assert np.isfinite(value.height).all()
        assert (np.diff(value.height) > 0).all()
        if file.suffix != ".dat":
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            words = [line.split()[-1] for line in data.split(b"\n") if line.strip()]
            said = [float(word) for word in words if re.fullmatch(rb"\d+\.?\d*", word)]
            assert np.allclose(value.height[-1] - value.height[0], said[-1] - said[-len(value)], rtol=1e-9)

    rows = st.lists(
        st.floats(0, 500).map(lambda x: f"{x:.6f}") | st.text("0123456789.eE+-_ \t", max_size=9), max_size=9
    )
    made = rows.map(lambda rows: {"zeros.txt": "\n".join(rows).encode()})
    headers = st.binary(min_size=8, max_size=120).map(lambda data: {"zeros.dat": data})
    return Reader(seeds, read, check, [made, headers])


def _whole_and_rest(centre: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    whole = np.floor(centre + offset)
    return whole, centre - whole + offset
