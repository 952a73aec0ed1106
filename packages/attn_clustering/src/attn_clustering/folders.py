"""What is found in a folder, or must not be: JSON that runs left, and folders that have to be new. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError


def read_object(path: Path, way_out: str, *keys: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, which ends in the way out, for anything else and without the keys,
    whose values are objects too."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {way_out}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: {way_out}")
    if missing := [key for key in keys if not isinstance(found.get(key), dict)]:
        raise UserError(f"{path} has no {', '.join(missing)}: {way_out}")
    return found


def check_new_folder(out: Path) -> None:
    """Raises UserError where `out` is a file, or a folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is {'not empty' if out.is_dir() else 'a file'}: choose a new folder")
