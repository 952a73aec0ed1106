"""Spacings without arithmetic: what a model gains here over the known limits would be leakage.

GUE: eigenvalues of random Hermitian matrices, whose local statistics the zeros share but whose primes they lack
(conditional entropy about 0.425 nats). Shuffled: the zeros' own spacings in random order (their marginal, 0.502 nats).
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.files import atomic_write, make_folder
from lab_shared.progress import Counter

from rh_memory.data.unfold import Spacings
from rh_memory.zeros.store import file_sha256, locked, manifest_path, write_manifest

LOG_HEIGHT = 11.5
"""log(gamma / 2 pi) given to a model with every control spacing: about the mean over the first 2 million zeros."""
SIZE = 1024
BULK = 0.75
"""Share of a matrix' spacings that is used, from its middle: eigenvalues within .63 of the semicircle's radius, where
their density is at least 77 % of that in the middle."""
_GENERATOR = 2  # raise it when the same seed gives other spacings


def gue_spacings(n: int, seed: int, *, size: int = SIZE) -> Spacings:
    """n unfolded bulk spacings of GUE matrices of `size` rows; simulated, on all cores.

    Eigenvalues come from the tridiagonal model (Dumitriu and Edelman, 2002): diagonal N(0, 1), off-diagonal
    chi_{2k} / sqrt 2 for k = size-1 .. 1, with spectrum on +-2 sqrt(size). They are unfolded by the semicircle law;
    matrices are independent, so `segment` is what one of them gives, BULK x size. Matrix i has a generator of its own,
    seeded with (seed, i): the spacings do not depend on the number of cores.
    """
    segment = int(BULK * size)
    matrices = -(-n // segment)
    s = np.empty((matrices, segment), np.float32)
    _dsterf()  # found here once, not by every thread
    with Counter("GUE matrices", matrices, "matrices") as counter, ThreadPoolExecutor(os.cpu_count()) as threads:
        for i, row in enumerate(threads.map(partial(_bulk_spacings, seed, size, segment), range(matrices))):
            s[i] = row
            counter.show(i + 1)
    return _without_height(s.reshape(-1)[:n], segment)


def default_gue(n: int, seed: int, folder: Path) -> Spacings:
    """`gue_spacings(n, seed)` from the cache in `folder`, simulated there on first use or when the file is damaged.

    Processes that ask at the same time wait for the one that simulates. Raises StorageError.
    """
    facts = {
        "data": "simulated GUE spacings",
        "count": n,
        "seed": seed,
        "size": SIZE,
        "bulk": BULK,
        "generator": _GENERATOR,
    }
    make_folder(folder)
    path = folder / f"gue_{n}_seed{seed}.npy"
    with locked(path):
        if not _is_whole(path, facts):
            buffer = io.BytesIO()
            np.save(buffer, gue_spacings(n, seed).s)
            data = buffer.getvalue()
            atomic_write(path, data)
            write_manifest(path, {**facts, "sha256": hashlib.sha256(data).hexdigest()})
    return _without_height(np.load(path, allow_pickle=False), int(BULK * SIZE))


def _is_whole(path: Path, facts: dict[str, Any]) -> bool:
    """Whether `path` holds what its manifest says, and its manifest says `facts`."""
    try:
        manifest = json.loads(manifest_path(path).read_text())
        return manifest == {**facts, "sha256": file_sha256(path)}
    except (OSError, ValueError):
        return False


def _bulk_spacings(seed: int, size: int, segment: int, matrix: int) -> np.ndarray:
    """(segment,) unfolded spacings from the middle of one matrix."""
    rng = np.random.default_rng([seed, matrix])
    diagonal = rng.standard_normal(size)
    off_diagonal = np.sqrt(rng.chisquare(2 * np.arange(size - 1, 0, -1)) / 2)
    first = (size - segment) // 2
    x = _tridiagonal_eigenvalues(diagonal, off_diagonal)[first : first + segment + 1] / (2 * np.sqrt(size))
    # size times the semicircle's distribution function, up to a constant.
    spacings: np.ndarray = np.diff(size / np.pi * (x * np.sqrt(1 - x * x) + np.arcsin(x)))
    return spacings


def _tridiagonal_eigenvalues(diagonal: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    """Ascending eigenvalues (n,) of a symmetric tridiagonal matrix, float64; both inputs are overwritten.

    LAPACK's dsterf, as scipy.linalg.eigvalsh_tridiagonal calls it, but other Python threads run meanwhile.
    """
    n, failed = ctypes.c_int(diagonal.size), ctypes.c_int(0)
    _dsterf()(ctypes.addressof(n), diagonal.ctypes.data, off_diagonal.ctypes.data, ctypes.addressof(failed))
    if failed.value:
        raise ArithmeticError(f"dsterf found no eigenvalues of a matrix of {diagonal.size} rows ({failed.value})")
    return diagonal


@cache
def _dsterf() -> Callable[[int, int, int, int], None]:
    """dsterf(n, diagonal, off_diagonal, info), all pointers, from the C interface that scipy documents for Cython."""
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__["dsterf"]
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    prototype = ctypes.CFUNCTYPE(None, *4 * [ctypes.c_void_p])
    function: Callable[[int, int, int, int], None] = prototype(pointer(capsule, name(capsule)))
    return function


def shuffled(spacings: Spacings, seed: int) -> Spacings:
    """The same spacings in random order, without their heights (which would tell where each came from)."""
    return _without_height(np.random.default_rng(seed).permutation(spacings.s), 0)


def _without_height(s: np.ndarray, segment: int) -> Spacings:
    """Constant log_height; the position of a gap's end is the sum of the spacings up to it."""
    position = np.cumsum(s, dtype=np.float64)
    centre = np.floor(position)
    return Spacings(s, centre, position - centre, np.full(len(s), LOG_HEIGHT, np.float32), segment)
