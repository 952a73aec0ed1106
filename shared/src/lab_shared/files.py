"""Files that are either the old version or the new one, never half of each; and JSON that every reader takes."""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError

_WAY_OUT = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "your quota is used up: free some space, or choose a folder on another disk",
    errno.EFBIG: "the file-size limit of this process (ulimit -f) is too low",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.EEXIST: "a file of this name is in the way: choose another folder",
    errno.EISDIR: "a folder of this name is in the way: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name, or a folder less deep",
}


class StorageError(UserError):
    """A file or folder could not be written; the message names it, the reason and the way out."""


def storage_error(path: Path, error: OSError) -> StorageError:
    """The StorageError that tells what `error` means for `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    way_out = _WAY_OUT.get(error.errno or 0, "check the disk and the path")
    return StorageError(f"cannot write {path}: {reason}; {way_out}")


def make_folder(path: Path) -> None:
    """Create the folder `path` and its parents. Raises StorageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from error


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `path` so that a crash, kill or full disk at any moment leaves the old content or the new one.

    The data goes to a temporary file in the same folder (a rename is atomic only within one file system),
    reaches the disk before the rename, and the folder entry after it. A link stays, and the file it names is written;
    what is no file (/dev/null, a pipe) is written to as it is. Raises StorageError; the old file is then untouched.
    """
    try:
        raw = data.encode() if isinstance(data, str) else data
    except UnicodeEncodeError as error:
        odd = error.object[max(0, error.start - 40) : error.end]
        raise StorageError(f"cannot write {path}: {odd!r} in it is no Unicode; is it a name to be changed?") from error
    temporary = path
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        if path.exists() and not (target.is_file() or target.is_dir()):
            path.write_bytes(raw)
            return
        temporary = target.with_name(f".{target.name}.tmp")
        with open(temporary, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        if temporary != path:
            with suppress(OSError):  # there is none where the folder or the name is what is wrong
                temporary.unlink()  # give a full disk its space back
        raise storage_error(path, error) from error


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: tensors and numpy arrays as numbers and lists of them, numbers that are not finite as null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(path: Path) -> None:
    """Make renames and deletions in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
