"""Exact resume states and shareable weights, as safetensors. Nothing here loads a pickle.

A checkpoint is one file: every tensor under its path in the saved tree ("model.head.weight",
"optim.state.3.exp_avg", "rng.0.torch"), everything else as JSON in the header beside a checksum of the whole
content.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab_shared.dist import unwrap
from lab_shared.errors import UserError
from lab_shared.files import StorageError, atomic_write, make_folder

_FORMAT = 1
_PATTERN = "step_*.safetensors"


class CheckpointError(UserError):
    """A file that is damaged, or does not fit the model; the message names it and the reason."""


# --- trees of plain values <-> one safetensors file ---


def encode_tree(tree: Mapping[str, Any]) -> bytes:
    """A tree of plain values, tensors and arrays as the bytes of one safetensors file.

    Plain values: dicts, lists, tuples, numbers, strings, None. Types and dict keys come back as they were; a
    tensor that appears twice (tied weights) is stored once. Raises TypeError with the place of anything else.
    """
    import safetensors.torch

    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, "", tensors, {})
    header = {"format": _FORMAT, "blake2b": _digest(packed, tensors), "tree": packed}
    # One metadata entry, because safetensors writes several in random order: equal states are equal bytes.
    return safetensors.torch.save(tensors, {"checkpoint": json.dumps(header)})


def decode_tree(data: bytes, source: str = "the data") -> dict[str, Any]:
    """What `encode_tree` encoded, tensors on the CPU.

    Raises CheckpointError, naming `source`, when the data are damaged or something else.
    """
    tensors, metadata = _parse(data, source)
    try:
        header = json.loads(metadata["checkpoint"])
        form, recorded, packed = header["format"], header["blake2b"], header["tree"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged or no checkpoint: its header has no state") from error
    if form != _FORMAT:
        raise CheckpointError(f"{source} is a checkpoint of format {form!r}, this program reads {_FORMAT}")
    if recorded != _digest(packed, tensors):
        raise CheckpointError(f"{source} is damaged: its content does not have the recorded checksum")
    try:
        tree = _unpack(packed, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise CheckpointError(f"{source} was not written by this program ({reason})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{source} was not written by this program: its tree is a {type(tree).__name__}")
    return tree


def load_tree(path: Path) -> dict[str, Any]:
    """The tree in a file. Raises CheckpointError when it cannot be read, is damaged or something else."""
    return decode_tree(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _parse(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of any safetensors file."""
    import safetensors
    import safetensors.torch

    try:
        # Copies, because the loaded tensors would otherwise be views of one read-only buffer.
        tensors = {name: x.clone() for name, x in safetensors.torch.load(data).items()}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged or no safetensors file: {error}") from error
    return tensors, header.get("__metadata__") or {}


def _digest(packed: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(packed).encode(), digest_size=32)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        if x.numel():
            digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """JSON form of `value`; tensors go into `tensors` under `name`, `seen` knows those already there."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0 or identity not in seen:
            seen[identity] = _add(value.detach().cpu().contiguous(), name, tensors, seen)
        return {"~tensor": seen[identity]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        # As bytes, because safetensors has not every numpy type.
        raw = torch.from_numpy(np.frombuffer(bytearray(value.tobytes()), np.uint8))
        stored = _add(raw, name, tensors, seen)
        return {"~array": stored, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("~") for key in value):
            return {key: _pack(x, f"{prefix}{key}", tensors, seen) for key, x in value.items()}
        pairs = [[_pack(k, "", {}, {}), _pack(x, f"{prefix}{k}", tensors, seen)] for k, x in value.items()]
        return {"~dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_pack(x, f"{prefix}{i}", tensors, seen) for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"~tuple": items}
    raise TypeError(
        f"{name or 'the state'} is a {type(value).__name__}: a checkpoint holds dicts, lists, tuples, "
        "numbers, strings, None, tensors and numpy arrays; let the object's state_dict() return those"
    )


def _add(x: Tensor, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    """Put `x` into `tensors` under `name`, with a mark if that is taken; returns the name."""
    if x.numel():
        storage = x.untyped_storage().data_ptr()
        if storage in seen:
            x = x.clone()  # safetensors refuses overlapping memory
        seen[storage] = name
    while name in tensors:
        name += "'"
    tensors[name] = x
    return name


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(x, tensors) for x in value]
    if not isinstance(value, dict):
        return value
    if "~tensor" in value:
        return tensors[value["~tensor"]]
    if "~array" in value:
        raw = tensors[value["~array"]].numpy().tobytes()
        return np.frombuffer(raw, np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    if "~dict" in value:
        return {_unpack(key, tensors): _unpack(x, tensors) for key, x in value["~dict"]}
    if "~tuple" in value:
        return tuple(_unpack(x, tensors) for x in value["~tuple"])
    return {key: _unpack(x, tensors) for key, x in value.items()}


# --- the checkpoints of a run ---


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` finished optimiser steps stands."""
    return folder / f"step_{step:09d}.safetensors"


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
        kept = sorted(folder.glob(_PATTERN))
        raise StorageError(
            f"{error}. {f'{kept[-1]} is intact' if kept else 'No checkpoint was written yet'}."
        ) from error
    for old in sorted(folder.glob(_PATTERN))[:-keep]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest readable checkpoint's tree, and a line for each damaged one passed over.

    The tree is None when the folder has no checkpoint. Damaged files are renamed to end in .damaged, so that
    they neither stand in the way nor count when pruning. Raises CheckpointError when there are checkpoints
    and all are damaged: starting from zero is the user's call.
    """
    paths = sorted(folder.glob(_PATTERN), reverse=True)
    skipped: list[str] = []
    for path in paths:
        try:
            return load_tree(path), skipped
        except CheckpointError as error:
            skipped.append(f"{error}; using the one before")
            path.rename(path.with_suffix(".damaged"))
    if paths:
        raise CheckpointError(f"no readable checkpoint in {folder}; start a new run. {skipped[0]}")
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
        _pack(x, name, tensors, seen)
    atomic_write(path, safetensors.torch.save(tensors, {"format": "pt", **(metadata or {})}))


def load_weights(path: str | Path, model: nn.Module) -> dict[str, str]:
    """Copy a weights file into `model` and return the file's metadata.

    Raises CheckpointError for a file that is damaged or does not fit (see assign_tensors).
    """
    tensors, metadata = _parse(_read(Path(path)), str(path))
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
