"""`attn-clustering analyze RUN`: everything that is measured on one trained model.

Reads RUN/config.json, DONE.json and weights.safetensors; writes into RUN/analysis:
    analysis.json          settings, per-layer numbers, intervals, the numbers comparisons use; written last
    arrays.npz             per-head arrays for figures
    probes.safetensors     the probes' weights, for transfer to the model after DroPE
Done once, it is skipped until the weights, the settings or the parent's probes change.

What is measured, and how: `measurements.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import save_arrays
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.runs import pick_device
from torch import Tensor

from attn_clustering.analysis.regression import full_float32
from attn_clustering.folders import read_object
from attn_clustering.measurements import AnalysisConfig, analyse
from attn_clustering.runs import load_run, parent_folder, read_summary, vocabulary

FORMAT = 1
"""Raised when the meaning of the files changes, so that old ones are made again."""


def main(
    run_folder: str | Path,
    *,
    device: str | None = None,
    data: str | None = None,
    settings: AnalysisConfig | None = None,
) -> dict[str, Any]:
    """Analyse a finished run; returns what analysis.json holds, with a table for people under "text".

    data: folder of the prepared corpus, if it has moved.
    Raises UserError when the run is not finished or its data are not there.
    """
    folder, settings = Path(run_folder), settings or AnalysisConfig()
    where = pick_device(device)
    model, config = load_run(folder, where)
    summary = read_summary(folder)
    parent = parent_folder(config, folder) / "analysis" / "probes.safetensors" if config.recal else None
    inputs = {
        "format": FORMAT,
        "settings": asdict(settings),
        "weights": _digest(folder / "weights.safetensors"),
        "parent_probes": _digest(parent) if parent is not None and parent.is_file() else None,
        "data": data,
    }
    result = _done(folder, inputs)
    if result is None:
        if data is not None:
            config = replace(config, data=replace(config.data, corpus=data, language=None))
        if vocabulary(config.data) > config.model.vocab:
            raise UserError(
                f"{folder} knows {config.model.vocab:,} tokens, its data have {vocabulary(config.data):,}: "
                "it cannot be analysed on them"
            )
        transfer = parent if inputs["parent_probes"] else None
        with full_float32():
            result, arrays, tensors = analyse(model, config, summary, settings, transfer)
        result = {"inputs": inputs, **result}
        _save(folder / "analysis", result, arrays, tensors)
    return result | {"text": table(result)}


def table(result: dict[str, Any]) -> str:
    """The run's probe accuracies and attention statistics for a terminal."""
    run, probe, attention = result["run"], result["probe"], result["attention"]
    loss = result["training"].get("val_loss")
    lines = [
        f"{run['name']} ({run['data']}), " + ("imported" if loss is None else f"validation loss {loss:.4f} nats"),
        "topic probe after block (0: the embedding), held-out sequences, 95% intervals",
    ]
    rows = zip(probe["accuracy"], probe["low"], probe["high"], probe["permuted"], strict=True)
    lines += [
        f"  {i:2}  {value:.4f} [{low:.4f}, {high:.4f}]  permuted labels {permuted:.4f}"
        for i, (value, low, high, permuted) in enumerate(rows)
    ]
    lines.append(
        f"  token alone {probe['token']:.4f}" + (f", Bayes filter {probe['bayes']:.4f}" if probe["bayes"] else "")
    )
    lines.append("attention, mean over heads (entropy in nats)")
    lines += [f"  {name:22} {value:8.4f}" for name, value in attention.items()]
    return "\n".join(lines)


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _done(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / "analysis" / "analysis.json"
    if not path.is_file():
        return None
    result = read_object(path, "delete it to analyse the run again")
    return result if result.get("inputs") == inputs else None


def _save(folder: Path, result: dict[str, Any], arrays: dict[str, np.ndarray], tensors: dict[str, Tensor]) -> None:
    import safetensors.torch

    make_folder(folder)
    save_arrays(folder / "arrays.npz", **arrays)
    atomic_write(folder / "probes.safetensors", safetensors.torch.save(tensors))
    atomic_write(folder / "analysis.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
