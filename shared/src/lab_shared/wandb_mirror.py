"""Weights & Biases beside metrics.jsonl: a mirror that never stops a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from lab_shared.progress import Progress

WandbMode = Literal["offline", "online", "disabled"]


def start_mirror(path: Path, facts: dict[str, Any], progress: Progress) -> Any:
    """A W&B run that keeps its files inside `path`, or None; the training goes on either way.

    facts: "wandb", the mode; "project"; "wandb_id", the same for every session of a run.
    """
    if facts["wandb"] == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        progress.line("wandb is not installed: metrics.jsonl is the only record (pip install wandb for the mirror)")
        return None
    except Exception as error:  # an installation that does not fit its own dependencies
        progress.line(f"wandb cannot be imported ({error}): metrics.jsonl is the only record")
        return None
    cache = os.environ.get("WANDB_CACHE_DIR")
    # Its logs go to ~/.cache otherwise.
    os.environ["WANDB_CACHE_DIR"] = str(path.resolve() / "wandb" / "cache")
    try:
        return wandb.init(
            mode=facts["wandb"],
            project=facts["project"],
            name=path.name,
            id=facts["wandb_id"],
            resume="allow",
            dir=str(path.resolve()),
            config=json.loads((path / "config.json").read_text(encoding="utf-8")),
            settings=wandb.Settings(console="off", silent=True, disable_code=True, x_disable_stats=True),
        )
    except Exception as error:  # a mirror must not stop the run, whatever breaks in it
        progress.line(f"wandb did not start ({error}): metrics.jsonl is the only record")
        return None
    finally:
        os.environ.pop("WANDB_CACHE_DIR")
        if cache is not None:
            os.environ["WANDB_CACHE_DIR"] = cache
