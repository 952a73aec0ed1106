"""Trees of plain values, tensors and arrays as one safetensors file. Nothing here loads a pickle.

Every tensor stands under its path in the tree ("model.head.weight", "optim.state.3.exp_avg", "rng.0.torch"), everything
else as JSON in the header beside a checksum of the whole content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab_shared.errors import UserError

_FORMAT = 1


class CheckpointError(UserError):
    """A file that is damaged, or does not fit the model; the message names it and the reason."""


def encode_tree(tree: Mapping[str, Any]) -> bytes:
    """A tree of plain values, tensors and arrays as the bytes of one safetensors file.

    Plain values: dicts, lists, tuples, numbers, strings, None. Types and dict keys come back as they were; a
    tensor that appears twice (tied weights) is stored once. Raises TypeError with the place of anything else.
    """
    import safetensors.torch

    tensors: dict[str, Tensor] = {}
    packed = pack(tree, "", tensors, {})
    header = {"format": _FORMAT, "blake2b": digest_of(packed, tensors), "tree": packed}
    # One metadata entry, because safetensors writes several in random order: equal states are equal bytes.
    return safetensors.torch.save(tensors, {"checkpoint": json.dumps(header)})


def decode_tree(data: bytes, source: str = "the data") -> dict[str, Any]:
    """What `encode_tree` encoded, tensors on the CPU.

    Raises CheckpointError, naming `source`, when the data are damaged or something else.
    """
    tensors, metadata = parse(data, source)
    try:
        header = json.loads(metadata["checkpoint"])
        form, recorded, packed = header["format"], header["blake2b"], header["tree"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged or no checkpoint: its header has no state") from error
    if form != _FORMAT:
        raise CheckpointError(f"{source} is a checkpoint of format {form!r}, this program reads {_FORMAT}")
    if recorded != digest_of(packed, tensors):
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
    return decode_tree(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def parse(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def digest_of(packed: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(packed).encode(), digest_size=32)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        if x.numel():
            digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
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
            return {key: pack(x, f"{prefix}{key}", tensors, seen) for key, x in value.items()}
        pairs = [[pack(k, "", {}, {}), pack(x, f"{prefix}{k}", tensors, seen)] for k, x in value.items()]
        return {"~dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [pack(x, f"{prefix}{i}", tensors, seen) for i, x in enumerate(value)]
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
