"""Exact resume states and shareable weights, as safetensors. Nothing here loads a pickle.

A checkpoint is one file (lab_shared.tree_file).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab_shared.dist import unwrap
from lab_shared.files import StorageError, atomic_write, make_folder
from lab_shared.tree_file import CheckpointError, encode_tree, load_tree, pack, parse, read_bytes

# --- the checkpoints of a run ---


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` finished optimiser steps stands."""
    return folder / f"step_{step:09d}.safetensors"


def checkpoint_files(folder: Path) -> list[Path]:
    """Those in a folder, oldest first."""
    return sorted(folder.glob("step_*.safetensors"))


def save_checkpoint(folder: Path, step: int, tree: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`. Raises StorageError.

    Until the new file stands complete under its name nothing is deleted, so a failure costs no earlier
    checkpoint.
    """
    make_folder(folder)
    path = checkpoint_path(folder, step)
    try:
        atomic_write(path, encode_tree(tree))
    except StorageError as error:
        kept = checkpoint_files(folder)
        raise StorageError(
            f"{error}. {f'{kept[-1]} is intact' if kept else 'No checkpoint was written yet'}."
        ) from error
    for old in checkpoint_files(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest readable checkpoint's tree, and a line for each damaged one passed over.

    The tree is None when the folder has no checkpoint. Damaged files newer than that are renamed to end in .damaged, so
    that they neither stand in the way nor count when pruning. Raises CheckpointError, and renames nothing, when there
    are checkpoints and all are damaged, each time anew: starting from zero is the user's call. And for a file that
    cannot be read now (no permission, a disk that fails): it may be whole.
    """
    damaged: list[Path] = []
    skipped: list[str] = []
    for path in reversed(checkpoint_files(folder)):
        try:
            tree = load_tree(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not path.is_dir():
                way_out = "make it readable, or move it away to go on from the one before"
                raise CheckpointError(f"{error}: {way_out}") from error
            damaged.append(path)
            skipped.append(f"{error}; using the one before")
            continue
        for bad in damaged:
            bad.rename(bad.with_suffix(".damaged"))
        return tree, skipped
    if damaged:
        raise CheckpointError(
            f"no readable checkpoint in {folder}: start a new run, or delete that folder to begin this one again. "
            f"{skipped[0].removesuffix('; using the one before')}"
        )
    return None, []


# --- models ---


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live parameters and persistent buffers, named as without DDP and torch.compile."""
    return {name.replace("_orig_mod.", ""): x for name, x in unwrap(model).state_dict().items()}


def assign_tensors(model: nn.Module, saved: Mapping[str, Tensor], source: str) -> None:
    """Copy `saved` into the model's tensors in place. Nothing is copied unless everything fits.

    Names the model ties to one tensor count as one: any of them suffices, and if several are given they must
    agree. A floating-point type is converted to the model's. Raises CheckpointError listing every missing,
    unexpected and misshapen tensor; `source` says in it where `saved` came from.
    """
    live = model_tensors(model)
    groups: dict[tuple, list[str]] = {}
    for name, x in live.items():
        identity = (x.device, x.data_ptr(), x.shape, x.stride()) if x.numel() else (name,)
        groups.setdefault(identity, []).append(name)
    problems = [f"unexpected {name}" for name in saved if name not in live]
    chosen: dict[str, Tensor] = {}
    for names in groups.values():
        given = [name for name in names if name in saved]
        if not given:
            problems.append(f"missing {' = '.join(names)}")
            continue
        target, x = live[given[0]], saved[given[0]]
        if x.shape != target.shape:
            problems.append(f"{given[0]} has shape {tuple(x.shape)}, the model wants {tuple(target.shape)}")
        elif x.dtype != target.dtype and not (x.is_floating_point() and target.is_floating_point()):
            problems.append(f"{given[0]} has type {x.dtype}, the model wants {target.dtype}")
        elif any(not torch.equal(saved[name], x) for name in given[1:]):
            problems.append(f"{' and '.join(given)} are one tensor in the model but differ")
        chosen[given[0]] = x
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"{source} does not fit the model: {shown}")
    with torch.no_grad():
        for name, x in chosen.items():
            live[name].copy_(x)


def save_weights(path: Path, model: nn.Module, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's tensors alone, for sharing: plain safetensors, each tied tensor once.

    Raises StorageError.
    """
    import safetensors.torch

    tensors: dict[str, Tensor] = {}
    seen: dict[tuple, str] = {}
    for name, x in model_tensors(model).items():
        pack(x, name, tensors, seen)
    atomic_write(path, safetensors.torch.save(tensors, {"format": "pt", **(metadata or {})}))


def load_weights(path: str | Path, model: nn.Module) -> dict[str, str]:
    """Copy a weights file into `model` and return the file's metadata.

    Raises CheckpointError for a file that is damaged or does not fit (see assign_tensors).
    """
    tensors, metadata = parse(read_bytes(Path(path)), str(path))
    assign_tensors(model, tensors, str(path))
    return metadata


# --- random numbers ---


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device.

    Equal seeds give equal runs on the CPU at equal thread counts.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may still draw from the global generator
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random generator a step on `device` can draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned. Raises CheckpointError for a state of another kind of device."""
    if (state["cuda"] is not None) != (device.type == "cuda"):
        raise CheckpointError(
            f"the checkpoint was written on {'cuda' if state['cuda'] is not None else 'cpu'}, this run is on "
            f"{device.type}: resume on the same kind of device"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
