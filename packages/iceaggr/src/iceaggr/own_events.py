"""The events a run held out itself: found again, or simulated again, and scored after the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import load_array
from lab_shared.errors import UserError
from lab_shared.report_files import read_object
from lab_shared.runs import pick_device

from iceaggr.config import TrainConfig
from iceaggr.data.features import Tables
from iceaggr.data.prepare import STREAM, Prepared, prepare, refuse_overlap, split
from iceaggr.evaluate import TRAINED_ON, table, write_evaluation
from iceaggr.predict import load_run


def own_held_out(
    run_dir: Path, config: TrainConfig, device: str, *, first: int | None = None
) -> tuple[Prepared, np.ndarray]:
    """The store a run was judged on and the positions of its held-out events there, or of the first so many.

    device: a type, "cpu" or "cuda". Those of a stream are simulated again, no more than are wanted; another device type
    makes other ones. Nothing else is simulated.

    Raises:
        UserError: the run's events are not where it found them.
        SplitError: the run was trained on some of them.
    """
    own = config.data
    if own.data != STREAM:
        own = replace(own, data=str(_own_folder(run_dir, config)))
    elif first is not None:
        own = replace(own, val_events=min(first, own.val_events))
    prepared = prepare(own, seed=config.seed, device=device)
    held_out_E = split(prepared.cache, own)[1][:first]
    refuse_overlap(load_array(run_dir / TRAINED_ON), prepared.cache.event_id[held_out_E])
    return prepared, held_out_E


def evaluate_own(
    run_dir: Path, *, max_events: int | None = None, device: str | None = None, oracle: int = 0
) -> dict[str, Any]:
    """Score a trained run on its own held-out events and keep that in its folder, as training does at its end.

    For runs that `train` has not scored, those of a study, and for runs that moved to another machine: `report`,
    `calibrate`, `compare` and `analyze` work on what this leaves (evaluation.json, predictions.npz, display.npz), and
    what was there before is replaced. The table is under "text".

    Args:
        max_events: the first so many; default all.
        oracle: fit the simulator's likelihood to this many of them, if they lie in a simulated folder.

    Raises: as `own_held_out`.
    """
    run_dir, where = Path(run_dir), pick_device(device)
    config, model = load_run(run_dir, where)
    data, held_out_E = own_held_out(run_dir, config, where.type, first=max_events)
    result = write_evaluation(
        run_dir,
        model,
        data.cache,
        held_out_E,
        config,
        Tables.of(data.geometry, where),
        label=data.label,
        folder=data.folder,
        oracle=oracle,
    )
    return result | {"text": table(result)}


def _own_folder(run_dir: Path, config: TrainConfig) -> Path:
    """The folder a run was trained from, as its configuration names it. Never simulates."""
    if config.data.data is not None:
        folder = Path(config.data.data)
    else:
        manifest = read_object(run_dir / "manifest.json", ("cuda",))
        if manifest is None:
            raise UserError(f"{run_dir} has no manifest.json to say what its events were simulated on: give --data")
        device = "cpu" if manifest["cuda"] is None else "cuda"
        n = (config.data.train_events or 0) + config.data.val_events
        folder = Path(config.data.store) / f"simulated-{device}-{n}-seed{config.seed}"
    if not folder.is_dir():
        raise UserError(
            f"the events of {run_dir} are not at {folder}: start this where the run was started, "
            "or give --data a labelled folder"
        )
    return folder
