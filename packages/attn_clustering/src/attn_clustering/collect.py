"""`attn-clustering collect DIR --out RECORD`: the record of a matrix, small enough to be committed.

RECORD is laid out like the matrix, so that `attn-clustering report RECORD` draws its page again. Left out are weights,
plans and probes; most of the training log (validation losses are all kept); per-head arrays of runs that the report
shows in no figure of their own, and attention maps of all but two runs. A run without arrays stays without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import save_arrays
from lab_shared.files import atomic_write, make_folder
from lab_shared.run import read_metrics

from attn_clustering.folders import check_new_folder
from attn_clustering.report_data import PER_HEAD, entropy_curve, read_matrix

TRAIN_LINES = 25
"""Lines of a training log that are kept, equally far apart and with the last."""
MAPS = 2
"""Runs whose example attention is kept."""
OF_ALL = ("excess_lag", "recurrence", "boundary_accuracy")
OF_FIRST_SEED = (*PER_HEAD, "boundary_accuracy", "qk_singular_values", "ov_singular_values", "alignment_chance")
ENVIRONMENT = (
    "git_sha",
    "git_dirty",
    "diff_sha256",
    "lock_sha256",
    "python",
    "versions",
    "cuda",
    "device",
    "processes",
)


def collect(folder: Path, out: Path) -> str:
    """Write the record of the matrix in `folder` to `out`; returns a line about it.

    Raises UserError when `folder` is no analysed matrix, or `out` has something in it.
    """
    check_new_folder(out)
    files = read_matrix(folder)
    make_folder(out)
    for name in ("experiment.json", "levels.json"):
        if (folder / name).is_file():
            atomic_write(out / name, (folder / name).read_text())
    first = [r["run"]["name"] for r in files.first_seed()]
    for summary in files.summaries:
        name = summary["folder"]
        source, target = folder / name, out / name
        make_folder(target / "analysis")
        for small in ("config.json", "DONE.json", "analysis/analysis.json"):
            if (source / small).is_file():
                atomic_write(target / small, _compact(json.loads((source / small).read_text())))
        atomic_write(target / "metrics.jsonl", "".join(_compact(line) for line in _thinned(source)))
        if name in files.arrays:
            kept = _arrays(files.arrays[name], name in first, name in first[:MAPS])
            save_arrays(target / "analysis" / "arrays.npz", **kept)
    atomic_write(out / "environment.json", json.dumps(_environments(folder), indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{out}: {len(files.summaries)} runs, {size / 1000:,.0f} kB"


def _arrays(arrays: Mapping[str, np.ndarray], first_seed: bool, with_map: bool) -> dict[str, Any]:
    if not first_seed:
        return {name: arrays[name] for name in OF_ALL if name in arrays}
    kept: dict[str, Any] = {name: arrays[name] for name in OF_FIRST_SEED if name in arrays}
    kept["entropy_by_position"], kept["entropy_tokens"] = entropy_curve(arrays)
    if with_map and "example_pattern" in arrays:
        # The page shows 64 shades; the rest would not compress.
        kept |= {"example_pattern": arrays["example_pattern"] & 0xFC, "example_topics": arrays["example_topics"]}
    return kept


def _thinned(run: Path) -> list[dict[str, Any]]:
    records = read_metrics(run)
    train = [i for i, record in enumerate(records) if record["split"] == "train"]
    keep = {train[i] for i in np.linspace(0, len(train) - 1, min(TRAIN_LINES, len(train))).round().astype(int)}
    return [record for i, record in enumerate(records) if record["split"] != "train" or i in keep]


def _environments(folder: Path) -> list[dict[str, Any]]:
    """What the runs stood on, each combination once with the number of runs."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*/manifest.json")):
        manifest = json.loads(path.read_text())
        facts = json.dumps({key: manifest[key] for key in ENVIRONMENT if key in manifest})
        found[facts] = found.get(facts, 0) + 1
    return [{**json.loads(facts), "runs": n} for facts, n in found.items()]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
