"""A record of many parts, each replaced when it is made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab_shared.files import atomic_write
from lab_shared.manifest import git_state


def put(record: Path, name: str, result: Mapping[str, Any]) -> None:
    """Put the result of one part into the JSON file `record`, with its commit and whether that was changed."""
    record.parent.mkdir(exist_ok=True)
    kept = json.loads(record.read_text()) if record.exists() else {}
    git, _ = git_state(Path(__file__).resolve())
    kept[name] = {**result, "git_sha": git["git_sha"], "git_dirty": git["git_dirty"]}
    atomic_write(record, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
