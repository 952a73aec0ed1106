"""The small files of finished runs, read back and put together by experiment: what verdicts and tables are made from.

A run is the folder that `rh-memory train` or a job of `rh-memory sweep` wrote, or the few files of it that are kept:
config.json, evaluation.json, metrics.jsonl, and diagnostics.json where `rh-memory diagnose` was there.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lab_shared.config import read_config
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.report_files import read_object
from lab_shared.run import read_metrics

from rh_memory.config import PRESETS, TrainConfig

CONTROLS = {
    "model.frequencies": "prime_powers",
    "model.frequency_top": None,
    "model.frequency_count": None,
    "model.frequency_seed": 0,
    "model.height": "true",
    "model.values": "prime_rotary",
}
"""What controls of explicit-formula attention change, and what they change it from."""
SMALL_FILES = (
    "config.json", "manifest.json", "evaluation.json", "diagnostics.json", "diagnostics_legacy.json", "physics.json",
)  # fmt: skip
_EVALUATED = ("label", "part", "nll_last", "nll_all", "nll_last_minus", "baselines")
_DIAGNOSED = ("run", "base")
_TRAINING_ROWS, _LAST_STEPS = 200, 100
_SAME_EXPERIMENT = {
    "seed", "wandb", "use_amp", "compile", "log_every", "eval_every", "eval_windows", "checkpoint_every",
    "data.file", "data.folder", "data.seed",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One run. experiment: the preset it is nearest to and the fields in which it differs from that."""

    name: str
    experiment: str
    preset: str
    config: TrainConfig
    evaluation: dict[str, Any] | None
    """None for a run that was stopped."""
    diagnostics: dict[str, Any] | None
    steps_done: int
    last_validation: dict[str, float] | None
    seconds: float | None
    """From the start of the run to its last metrics: with data, compilation and validations, without final scores."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def control_of(self) -> str | None:
        """The experiment it is a control of, None when it is no control."""
        fields = flat(self.config)
        plain = {**fields, **CONTROLS}
        if plain == fields or fields["model.inputs"] != "height":
            return None
        return _experiment(plain)[1]


def read(paths: Sequence[str | Path]) -> list[Record]:
    """The runs in these folders and in the folders below them, by experiment and seed.

    paths: folders, patterns, and files that `rh-memory diagnose --json` printed, for runs that are among the folders.
    Raises UserError for a path without runs, a file that is damaged, and two runs of one experiment and seed.
    """
    folders: dict[str, Path] = {}
    diagnosed: dict[str, dict[str, Any]] = {}
    for pattern in map(str, paths):
        found = sorted(Path(p) for p in glob.glob(pattern))
        runs = [config.parent for path in found if path.is_dir() for config in sorted(path.rglob("config.json"))]
        files = [path for path in found if path.is_file()]
        if not runs and not files:
            raise UserError(f"{pattern}: no run there; give folders that `rh-memory train` or `sweep` wrote")
        for run in runs:
            if folders.setdefault(run.name, run).resolve() != run.resolve():
                raise UserError(f"two runs are named {run.name}: {folders[run.name]} and {run}; give one of them")
        for file in files:
            printed = read_object(file) or {}
            for result in printed.get("runs", [printed]):
                if any(name not in result for name in _DIAGNOSED):
                    raise UserError(f"{file} is not what `rh-memory diagnose --json` printed: leave it out")
                diagnosed[result["run"]] = result
    if unknown := sorted(diagnosed.keys() - folders.keys()):
        raise UserError(f"there are diagnostics of {unknown[0]}, but its folder is not among those given")
    records = [_record(run, diagnosed.get(name)) for name, run in folders.items()]
    order = {name: i for i, name in enumerate(PRESETS)}
    records.sort(key=lambda r: (order[r.preset], r.experiment, r.seed))
    by_seed: dict[tuple[str, int], str] = {}
    for record in records:
        if record.evaluation is not None:
            other = by_seed.setdefault((record.experiment, record.seed), record.name)
            if other != record.name:
                raise UserError(f"{other} and {record.name} are both {record.experiment} with seed {record.seed}")
    return records


def finished(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Evaluated runs by experiment."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.evaluation is not None:
            found.setdefault(record.experiment, []).append(record)
    return found


def collect(runs: Sequence[Path], out: Path) -> list[Path]:
    """Copy the small files of runs to OUT/NAME, for keeping under version control; returns those folders.

    Metrics are thinned to every validation, about 200 rows of training and those of its last 100 steps; absolute paths
    lose their folders. Weights, checkpoints, predictions and reports stay behind. Raises UserError for a folder that is
    no run of this program and StorageError.
    """
    made = []
    for run in runs:
        if not (run / "config.json").is_file():
            raise UserError(f"{run} has no config.json, so it is no run")
        read_config(TrainConfig, run / "config.json")
        folder = out / run.name
        make_folder(folder)
        for name in SMALL_FILES:
            if (found := read_object(run / name)) is not None:
                atomic_write(folder / name, json.dumps(_without_folders(found), indent=1) + "\n")
        if (run / "metrics.jsonl").is_file():
            rows = read_metrics(run)
            train = [i for i, row in enumerate(rows) if row["split"] == "train"]
            last = rows[train[-1]]["step"] if train else 0
            end = [i for i in train if rows[i]["step"] > last - _LAST_STEPS]
            left_out = set(train) - {*train[:: max(1, len(train) // _TRAINING_ROWS)], *end}
            thin = [json.dumps(row) for i, row in enumerate(rows) if i not in left_out]
            atomic_write(folder / "metrics.jsonl", "".join(f"{line}\n" for line in thin))
        made.append(folder)
    return made


def _without_folders(value: Any) -> Any:
    """JSON data in which every string that is an absolute path is its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_folders(x) for x in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every field by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in asdict(config).items():
        found |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return found


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: flat(config) for name, (_, config) in PRESETS.items()}


def experiment(config: TrainConfig) -> tuple[str, str]:
    """(preset, experiment) of a configuration; see `Record`."""
    return _experiment(flat(config))


def _experiment(fields: Mapping[str, Any]) -> tuple[str, str]:
    """(preset, experiment): the preset with fewest other values, and its name with those values."""

    def others(preset: Mapping[str, Any]) -> list[str]:
        return [name for name in fields if name not in _SAME_EXPERIMENT and preset[name] != fields[name]]

    nearest = min(_presets(), key=lambda name: len(others(_presets()[name])))
    changed = [f"{name.rsplit('.', 1)[-1]}={fields[name]}" for name in others(_presets()[nearest])]
    return nearest, ", ".join([nearest, *changed])


def _record(run: Path, diagnostics: dict[str, Any] | None) -> Record:
    config = read_config(TrainConfig, run / "config.json")
    preset, name = experiment(config)
    if diagnostics is None:
        diagnostics = read_object(run / "diagnostics.json", _DIAGNOSED)
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    validations = [row for row in rows if row["split"] == "val"]
    return Record(
        run.name,
        name,
        preset,
        config,
        read_object(run / "evaluation.json", _EVALUATED),
        diagnostics,
        max((row["step"] for row in rows), default=0),
        validations[-1] if validations else None,
        rows[-1].get("time") if rows else None,
    )
