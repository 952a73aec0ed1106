"""lab_shared's files: resume states, weights, configurations, run folders."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st

from readers.base import JSON, Files, Reader, equal, files_of


def checkpoint() -> Reader:
    """Resume states; and ones put together by a stranger, with a checksum that is right."""
    import safetensors.torch
    from lab_shared import tree_file

    tree = {
        "model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(0), "h": torch.ones(3, dtype=torch.bfloat16)},
        "optim": {"state": {0: {"step": 3, "avg": torch.full((2, 2), 0.5)}}, "groups": [{"betas": (0.9, 1)}]},
        "rng": [{"python": (3, tuple(range(20)), None), "numpy": np.arange(9, dtype=np.uint64)}],
        "loop": {"step": 7, "best": math.inf, "name": "é"},
    }  # fmt: skip
    seed = {"step_000000007.safetensors": tree_file.encode_tree(tree)}
    tensors = {"a": torch.arange(4, dtype=torch.uint8), "b": torch.ones(2)}
    marks = st.dictionaries(
        st.sampled_from(["~tensor", "~array", "~dict", "~tuple", "dtype", "shape", "x"]),
        st.sampled_from(["a", "b", "c", "../a", "|O", "<u4", "V1", "|S99", [2], [-1], [4], [10**9], 3, None, [[{}, 1]]])
        | JSON,
        max_size=4,
    )
    forged = st.recursive(marks | JSON, lambda inner: st.lists(inner, max_size=3), max_leaves=4)

    def forge(packed: Any) -> Files:
        header = {"format": 1, "blake2b": tree_file.digest_of(packed, tensors), "tree": packed}
        return {"step_000000007.safetensors": safetensors.torch.save(tensors, {"checkpoint": json.dumps(header)})}

    def check(folder: Path, value: Any) -> None:
        original = (folder / "step_000000007.safetensors").read_bytes() != seed["step_000000007.safetensors"]
        header_len = struct.unpack("<Q", (folder / "step_000000007.safetensors").read_bytes()[:8])[0]
        assert header_len < 10**6
        plain = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor, np.ndarray)
        assert isinstance(value, plain)
        if original and isinstance(value, dict) and value.keys() == tree.keys():
            assert equal(value, tree), "accepted with another content than was written"

    def read(folder: Path) -> Any:
        return tree_file.load_tree(folder / "step_000000007.safetensors")

    return Reader([seed], read, check, [forged.map(forge)])


def weights() -> Reader:
    """A weights file for a model."""
    from lab_shared.checkpoint import load_weights, save_weights
    from torch import nn

    def read(folder: Path) -> Any:
        model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        load_weights(folder / "weights.safetensors", model)
        return model.state_dict()

    def check(folder: Path, value: Any) -> None:
        assert {name: tuple(x.shape) for name, x in value.items()} == shapes

    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    return Reader([files_of(lambda folder: save_weights(folder / "weights.safetensors", model))], read, check)


def config() -> Reader:
    """config.json of all four packages."""
    from attn_clustering.config import RunConfig
    from attn_clustering.experiments import EXPERIMENTS, run_config
    from gauge_attn.config import PRESETS as GAUGE
    from gauge_attn.config import TrainConfig as Gauge
    from iceaggr.config import PRESETS as ICE
    from iceaggr.config import TrainConfig as Ice
    from lab_shared.config import from_json, read_config, to_json
    from rh_memory.config import PRESETS as ZEROS
    from rh_memory.config import TrainConfig as Zeros

    configs = {
        "ice": (Ice, next(iter(ICE.values()))[1]),
        "zeros": (Zeros, next(iter(ZEROS.values()))[1]),
        "gauge": (Gauge, next(iter(GAUGE.values()))[1]),
        "attn": (RunConfig, run_config(EXPERIMENTS["smoke"][1], "mha", "shuffled", 0)),
    }
    seeds: list[Files] = [{f"{name}.json": to_json(config).encode()} for name, (_, config) in configs.items()]

    def read(folder: Path) -> Any:
        file = next(folder.glob("*.json"))
        return read_config(configs[file.stem][0], file)

    def check(folder: Path, value: Any) -> None:
        assert from_json(type(value), to_json(value)) == value

    def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        inner = [p for key, x in value.items() for p in paths(x, (*path, key))] if isinstance(value, dict) else []
        return [path, *inner] if path else inner

    def replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)} if path else new

    @st.composite
    def changed(draw: st.DrawFn) -> Files:
        seed = draw(st.sampled_from(seeds))
        ((name, text),) = seed.items()
        value = json.loads(text)
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths(value)))
            value = replaced(value, path, draw(st.sampled_from([0, -1, 1, 10**400, 1e300, "", [], {}, True]) | JSON))
        return {name: json.dumps(value).encode("utf-8", "replace")}

    return Reader(seeds, read, check, [changed()])


def run_folder() -> Reader:
    """A run folder that is opened again: manifest.json, config.json, metrics.jsonl."""
    from lab_shared import run

    without_git: Any = patch.object(run, "record_session", lambda *_: {})  # git is slow and beside the point

    def make(folder: Path) -> None:
        command = "again {path}"
        with (
            without_git,
            run.Run.create(
                folder, FuzzConfig(), seed=3, project="fuzz", resume_command=command, wandb="disabled"
            ) as started,
        ):
            for step in range(1, 4):
                started.log(step, "train", {"loss": 1.0 / step})
        (folder / "run.lock").unlink()

    def read(folder: Path) -> Any:
        with without_git, run.Run.open(folder) as opened:
            config = opened.config(FuzzConfig)
            opened.rewind(2)
            return opened.seed, opened.resume_command, config, run.read_metrics(folder)

    def check(folder: Path, value: Any) -> None:
        seed, command, config, records = value
        assert type(seed) is int
        assert isinstance(command, str)
        assert type(config.steps) is int
        assert all(record["step"] <= 2 for record in records)

    return Reader([files_of(make)], read, check)


@dataclass(frozen=True)
class FuzzConfig:
    """The configuration of a run without options."""

    steps: int = 3
    rate: float = 0.5
