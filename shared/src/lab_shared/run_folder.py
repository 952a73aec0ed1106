"""A run's folder on its way to being a run: one lock, the facts in its manifest, one path for all ranks."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from lab_shared import manifest
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, storage_error
from lab_shared.wandb_mirror import WandbMode

_LARGEST_DIFF = 1_000_000  # characters


class RunError(UserError):
    """A run folder that is taken, locked, or no run; the message names it and what to do."""


def lock_folder(path: Path) -> int:
    """An exclusive lock held by this process: the kernel drops it when the process dies, however it dies."""
    file = path / "run.lock"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(file, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunError(
            f"{path} is in use by another run (process {holder}): wait for it or choose another folder"
        ) from error
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        raise storage_error(file, error) from error
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    except OSError as error:
        os.close(descriptor)
        raise storage_error(file, error) from error
    return descriptor


@contextmanager
def closed_on_error(descriptor: int) -> Iterator[int]:
    """Hand over the lock, and give it up if what happens under it fails."""
    try:
        yield descriptor
    except BaseException:
        os.close(descriptor)
        raise


def on_rank_0(start: Callable[[Path], int], path: Path, dist: Dist | None) -> tuple[Path, int | None]:
    """Let rank 0 `start` the folder while the others wait: (rank 0's path, its lock or None on other ranks).

    One path for all: a default made from the time of day would differ between ranks.
    """
    if dist is None or dist.world == 1:
        return path, start(path)
    lock, told = None, [""]
    try:
        if dist.rank == 0:
            lock = start(path)
            told = [str(path)]
    finally:
        torch.distributed.broadcast_object_list(told, src=0)
    if not told[0]:
        raise RunError("rank 0 could not start the run; its own message says why")
    return Path(told[0]), lock


def read_manifest(path: Path) -> dict[str, Any]:
    """What manifest.json says. Raises RunError when it is damaged."""
    file = path / "manifest.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error!s:.300}): start a new run in another folder") from error
    kinds = {"seed": int, "resume_command": str, "wandb": str, "project": str, "wandb_id": str, "resumes": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(facts, dict) or type(facts.get(name)) is not kind]
    if not wrong and facts["wandb"] not in get_args(WandbMode):
        wrong = ["wandb"]
    if wrong:
        raise RunError(f"{file} is damaged (no {', '.join(wrong)}): start a new run in another folder")
    return facts


def record_session(path: Path, seed: int, dist: Dist | None, diff_name: str) -> dict[str, Any]:
    """What one start of the run stood on (lab_shared.manifest), uncommitted changes kept as `path / diff_name`."""
    facts, diff = manifest.describe(seed, 1 if dist is None else dist.world)
    if 0 < len(diff) <= _LARGEST_DIFF:
        atomic_write(path / diff_name, diff)
        facts["diff"] = diff_name
    return facts
