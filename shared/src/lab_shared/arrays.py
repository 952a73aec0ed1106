"""numpy files: written whole or not at all, read without pickles and with one error for every way they can be bad."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np

from lab_shared.errors import UserError
from lab_shared.files import atomic_write


class ArrayFileError(UserError):
    """A .npy or .npz file that is missing, damaged, or holds pickled objects; the message names it."""


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically. Raises StorageError, and ValueError for an array of objects."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a compressed .npz file atomically. Raises StorageError."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # typed as if a name could be allow_pickle
    atomic_write(path, buffer.getvalue())


def load_array(path: str | Path, *, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array of a .npy file, memory-mapped if asked. Raises ArrayFileError."""
    try:
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"
        if not archive:
            array: np.ndarray = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
            return array
    except Exception as error:  # numpy's parsers of headers and sizes raise a dozen kinds; the file is at fault in all
        raise _unreadable(path, error) from error
    raise ArrayFileError(f"{path} is an archive of arrays (.npz) where one array (.npy) should be: make it again")


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array of a .npz file. Raises ArrayFileError."""
    try:
        # Opened here, because numpy leaves a file open that is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # and so do zipfile and zlib
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> ArrayFileError:
    if isinstance(error, FileNotFoundError):
        return ArrayFileError(f"there is no {path}")
    # numpy takes what it does not know for a pickle, and says how to load that all the same
    reason = (
        "no array of numbers" if "pickle" in str(error) else " ".join(str(error).split())[:200] or type(error).__name__
    )
    return ArrayFileError(f"{path} is not a readable numpy file ({reason}): make or fetch it again")
