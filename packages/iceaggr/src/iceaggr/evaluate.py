"""Scores on held-out events: the model beside a random guess and the line fits, on the same events, with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import load_array, save_array, save_arrays
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.progress import Counter
from lab_shared.runs import pick_device
from torch import nn

from iceaggr.baselines import LineFitVariant, line_fit, random_directions
from iceaggr.config import TrainConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.prepare import SIMULATED, SplitError, data_label, folder_geometry, refuse_overlap
from iceaggr.data.pulses import Pulses
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.metrics import opening_angle_deg, summary
from iceaggr.predict import load_run, predict_events, predict_outputs
from iceaggr.report_text import PREDICTORS

TRAINED_ON = "train_event_ids.npy"
SHOWN = 6  # events drawn in the report
# The line fit every result is compared with is the best of its variants on simulated data.
LINE_FITS: dict[str, LineFitVariant] = {"linefit": "windowed_hlc", "linefit_hlc": "hlc", "linefit_all": "all"}


def remember_training_events(run_dir: Path, event_ids: np.ndarray) -> None:
    """Keep the ids a run trains on, so that it is never scored on them."""
    ids = np.sort(event_ids)
    if ids.size and ids[0] >= 0 and ids[-1] < 2**32:
        ids = ids.astype(np.uint32)
    save_array(run_dir / TRAINED_ON, ids)


def baseline_errors(cache: EventCache, index_N: np.ndarray, tables: Tables, *, seed: int) -> dict[str, np.ndarray]:
    """Opening angles in degrees (N,) of a random guess and of each line-fit variant."""
    true_N3 = cache.direction_E3[index_N]
    errors = {"random": opening_angle_deg(random_directions(index_N.size, seed=seed).numpy(), true_N3)}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in LINE_FITS}
    for rows in np.array_split(np.arange(index_N.size), -(-index_N.size // 5000)):
        pulses = cache.gather(index_N[rows]).to(tables.device)
        for name, variant in LINE_FITS.items():
            direction_E3 = line_fit(pulses, tables.xyz_S3, variant).direction_E3.cpu().numpy()
            parts[name].append(opening_angle_deg(direction_E3, true_N3[rows]))
    return errors | {name: np.concatenate(part) for name, part in parts.items()}


def score_events(
    model: nn.Module,
    cache: EventCache,
    index_N: np.ndarray,
    config: TrainConfig,
    tables: Tables,
    counter: Counter | None = None,
) -> dict[str, np.ndarray]:
    """Per-event arrays (N,) of a labelled store: truth, prediction, and the error in degrees of every predictor."""
    v_N3 = predict_events(model, cache, index_N, config, tables, counter)
    pred_azimuth, pred_zenith = vector_to_angles(v_N3)
    components: dict[str, np.ndarray] = {}
    if config.model.head_mixture > 1:
        out_NC = predict_outputs(model, cache, index_N, config, tables)
        components = {f"out_{i}": out_NC[:, i] for i in range(out_NC.shape[1])}
    errors = baseline_errors(cache, index_N, tables, seed=config.seed)
    assert cache.azimuth is not None  # direction_E3 has refused unlabelled stores
    assert cache.zenith is not None
    return {
        "event_id": cache.event_id[index_N],
        "azimuth": cache.azimuth[index_N],
        "zenith": cache.zenith[index_N],
        "pred_azimuth": pred_azimuth,
        "pred_zenith": pred_zenith,
        "kappa": np.linalg.norm(v_N3, axis=1),
        "n_pulses": cache.n_pulses_E[index_N],
        "n_doms": cache.n_doms[index_N],
        "error_deg": opening_angle_deg(v_N3, cache.direction_E3[index_N]),
        **components,
        **{f"{name}_error_deg": values for name, values in errors.items()},
        **{name: values[index_N] for name, values in (cache.truth or {}).items()},
    }


def summarise(arrays: dict[str, np.ndarray], *, label: str) -> dict[str, Any]:
    """Arrays of `score_events` -> {"label", "n_events", "predictors", "by"}, ready for JSON and for `table`."""
    kinds = np.where(arrays["type"] == 1, "track", "cascade") if "type" in arrays else None
    model = summary(arrays["error_deg"], zenith=arrays["zenith"], n_pulses=arrays["n_pulses"], event_type=kinds)
    by = model.pop("by")
    predictors = {name: summary(arrays[f"{name}_error_deg"]) for name in ("random", *LINE_FITS)}
    for figures in predictors.values():
        del figures["by"]
    return {
        "label": label,
        "n_events": int(arrays["event_id"].size),
        "predictors": predictors | {"model": model},
        "by": by,
    }


def write_evaluation(
    run_dir: Path,
    model: nn.Module,
    cache: EventCache,
    index_N: np.ndarray,
    config: TrainConfig,
    tables: Tables,
    *,
    label: str,
    folder: Path | None = None,
    oracle: int = 0,
) -> dict[str, Any]:
    """Score, and save evaluation.json, predictions.npz and display.npz in the run folder for its report.

    oracle: fit the simulator's likelihood to this many of the events, which come from the simulated `folder`.
    """
    with Counter("evaluating", index_N.size, "events") as counter:
        arrays: dict[str, Any] = score_events(model, cache, index_N, config, tables, counter)
    result = summarise(arrays, label=label)
    if folder is not None and label == SIMULATED:
        pulses = cache.gather(index_N[:oracle]).to("cpu") if oracle else None
        _add_oracle(result, folder, pulses, tables)
    shown: dict[str, Any] = display_arrays(cache, index_N, arrays, tables)
    save_arrays(run_dir / "predictions.npz", **arrays)
    save_arrays(run_dir / "display.npz", **shown)
    atomic_write(run_dir / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def _add_oracle(result: dict[str, Any], folder: Path, pulses: Pulses | None, tables: Tables) -> None:
    """The row of the information limit; without it "oracle" says why there is none."""
    if pulses is None:
        result["oracle"] = "not computed: `iceaggr evaluate RUN --data DIR --oracle N` or `iceaggr oracle --data DIR`"
        return
    from iceaggr.oracle.run import held_out_errors

    try:
        figures = summary(held_out_errors(folder, pulses, tables.device))
    except UserError as error:  # after hours of training a missing column is no reason to stop
        result["oracle"] = f"not computed: {error}"
        return
    del figures["by"]
    model = result["predictors"].pop("model")
    result["predictors"] |= {"oracle": figures, "model": model}


def display_arrays(
    cache: EventCache, index_N: np.ndarray, arrays: dict[str, np.ndarray], tables: Tables
) -> dict[str, np.ndarray]:
    """A few events to look at, spread over multiplicity and not chosen by how well they came out."""
    by_size = np.argsort(arrays["n_pulses"], kind="stable")
    picked = by_size[(np.linspace(0.3, 0.995, SHOWN) * (by_size.size - 1)).round().astype(int)]
    pulses = cache.gather(index_N[picked])
    xyz_P3 = tables.xyz_S3.cpu().numpy()[pulses.sensor_P.numpy()]
    predicted_E3 = angles_to_vector(arrays["pred_azimuth"][picked], arrays["pred_zenith"][picked])
    return {
        "event_id": arrays["event_id"][picked],
        "offsets": pulses.offsets_E1.numpy(),
        **{axis: xyz_P3[:, i] for i, axis in enumerate("xyz")},
        "sensor": pulses.sensor_P.numpy(),
        "time": pulses.time_P.numpy(),
        "charge": pulses.charge_P.numpy(),
        "auxiliary": pulses.auxiliary_P.numpy(),
        "true": cache.direction_E3[index_N[picked]],
        "predicted": predicted_E3,
        "kappa": arrays["kappa"][picked],
        "array_xyz": tables.xyz_S3.cpu().numpy(),
    }


def evaluate_folder(
    run_dir: Path,
    folder: Path,
    *,
    max_events: int | None = None,
    device: str | None = None,
    drop_seen: bool = False,
    oracle: int = 0,
) -> dict[str, Any]:
    """Score a run on a labelled folder, file by file; the result carries its table under "text".

    oracle: fit the simulator's likelihood to this many of the events of a simulated folder.

    Raises:
        SplitError: the folder has no labels, or shares events with what the run was trained on.
    """
    where = pick_device(device)
    config, model = load_run(run_dir, where)
    seen = load_array(Path(run_dir) / TRAINED_ON)
    source = KaggleFolder(folder)
    tables = Tables.of(folder_geometry(folder, config.data.geometry), where)
    total = source.n_events if max_events is None else min(max_events, source.n_events)
    parts: list[dict[str, np.ndarray]] = []
    for_oracle: Pulses | None = None
    done = 0
    with Counter("evaluating", total, "events") as counter:
        for batch_id in source.batch_ids:
            if done == total:
                break
            cache = EventCache.in_memory(source.read_batch(batch_id))
            if cache.azimuth is None:
                raise SplitError(f"{folder} has no azimuth and zenith to score against: use `iceaggr predict`")
            index_N = np.arange(min(cache.n_events, total - done))
            done += index_N.size
            if drop_seen:
                index_N = index_N[~np.isin(cache.event_id[index_N], seen)]
            else:
                refuse_overlap(seen, cache.event_id[index_N])
            if index_N.size:
                parts.append(score_events(model, cache, index_N, config, tables))
                if oracle and for_oracle is None:
                    for_oracle = cache.gather(index_N[:oracle])  # of the first file, which is enough for any interval
            counter.show(done)
    if not parts:
        raise SplitError(f"the run was trained on every event of {folder}: there is nothing to score")
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    result = summarise(arrays, label=data_label(folder))
    if result["label"] == SIMULATED:
        _add_oracle(result, folder, for_oracle, tables)
    return result | {"text": table(result)}


def table(result: dict[str, Any]) -> str:
    """The one table of a run: every predictor on the same held-out events, degrees, 95% intervals."""

    def cell(x: dict[str, float]) -> str:
        return (
            f"{x['value']:6.2f} [{x['low']:6.2f}, {x['high']:6.2f}]" if x["low"] is not None else f"{x['value']:6.2f}"
        )

    lines = [
        f"Opening angle in degrees on {result['n_events']:,} held-out events ({result['label']}), 95% intervals",
        f"{'':28}  {'mean':^24}  {'median':^24}  {'10%':>6} {'90%':>6}",
    ]
    for name, text in PREDICTORS.items():
        if name not in result["predictors"]:
            if name in result:
                lines.append(f"{text:28}  {result[name]}")
            continue
        p = result["predictors"][name]
        text += f" (on {p['n']:,} of them)" if p["n"] != result["n_events"] else ""
        lines.append(
            f"{text:28}  {cell(p['mean_deg']):24}  {cell(p['median_deg']):24}  "
            f"{p['p10']['value']:6.1f} {p['p90']['value']:6.1f}"
        )
    return "\n".join(lines)
