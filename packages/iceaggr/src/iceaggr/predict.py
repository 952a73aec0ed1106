"""Directions from a trained run: over an event store, into a submission file, or for one event's picture."""

from __future__ import annotations

import csv
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.attention import Mask
from lab_shared.checkpoint import load_weights
from lab_shared.config import from_json
from lab_shared.errors import UserError
from lab_shared.progress import Counter
from torch import nn

from iceaggr.config import TrainConfig
from iceaggr.data.batches import one_pass
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables, feature_width
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.prepare import data_label, folder_geometry
from iceaggr.data.pulses import TokenBatch
from iceaggr.data.schema import N_SENSORS
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.models.flat import FlatTransformer, build_model


def token_budget(config: TrainConfig, device: torch.device) -> int:
    """Tokens of one batch: the configured number, or what suits the device and holds the largest possible event."""
    largest = 1 + (config.model.dom_cap or N_SENSORS)
    return config.tokens_per_batch or max(largest, 4096 if device.type == "cpu" else 1 << 18)


def token_mask(batch: TokenBatch) -> Mask:
    """Every token attends to the tokens of its own event."""
    total = batch.features_TF.shape[0]
    mask = Mask.segments(batch.offsets_E1, total=total, max_len=min(total, N_SENSORS + 1))
    # built here once rather than by every layer of a compiled model
    return mask.prepare("flex" if batch.offsets_E1.is_cuda else "sdpa")


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass's number format; the input projection, the head and the losses stay in float32."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def pick_device(name: str | None) -> torch.device:
    """The named device, or the GPU when there is one. Raises UserError for a device that is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    return device


def load_run(run_dir: Path, device: torch.device) -> tuple[TrainConfig, FlatTransformer]:
    """The configuration and trained model of a run folder, the model in evaluation mode on `device`."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} is no run folder: it has no config.json")
    config = from_json(TrainConfig, path.read_text())
    weights = Path(run_dir) / "weights.safetensors"
    if not weights.exists():
        raise UserError(f"{run_dir} has no trained weights yet: finish it with `iceaggr train --resume {run_dir}`")
    model = build_model(config.model, feature_width(config.model))
    load_weights(weights, model)
    return config, model.to(device).eval()


@torch.inference_mode()
def predict_events(
    model: nn.Module,
    cache: EventCache,
    index_N: np.ndarray,
    config: TrainConfig,
    tables: Tables,
    counter: Counter | None = None,
) -> np.ndarray:
    """Raw direction vectors (N, 3) float32 of the events at these positions of the store, in their order."""
    device = tables.device
    gpu = device.type == "cuda"
    # Batches larger than in training keep a GPU busy while the host prepares the next one. An event is never split,
    # and the largest possible one has a token for each DOM and the CLS token.
    budget = max(token_budget(config, device) * (4 if gpu else 1), N_SENSORS + 1)
    order, vectors, done = [], [], 0
    was_training = model.training
    model.eval()
    for batch in one_pass(cache, index_N, config.model, tables, token_budget=budget, static=gpu):
        with autocast(config, device):
            v_E3 = model(batch.features_TF, token_mask(batch), batch.cls_E)
        order.append(batch.index_E)
        # Left on the device, as reading it would stop the stream; a copy, as a CUDA graph writes over its output.
        vectors.append(v_E3[: batch.n_events].float().clone())
        done += batch.n_events
        if counter is not None:
            counter.show(done)
    model.train(was_training)
    v_N3 = np.empty((index_N.size, 3), dtype=np.float32)
    if order:
        place = np.empty(int(index_N.max()) + 1, dtype=np.int64)
        place[index_N] = np.arange(index_N.size)
        v_N3[place[np.concatenate(order)]] = torch.cat(vectors).cpu().numpy()
    return v_N3


def predict_folder(
    run_dir: Path,
    folder: Path,
    out: Path,
    *,
    max_events: int | None = None,
    device: str | None = None,
    strict: bool = False,
) -> int:
    """Write event_id, azimuth, zenith and kappa (not with strict) of every event of a folder, in its order.

    Angles in radians say where the neutrino came from. Works file by file, so memory does not grow with the folder; the
    finished csv appears at once. Returns the number of events.
    """
    where = pick_device(device)
    config, model = load_run(run_dir, where)
    source = KaggleFolder(folder)
    tables = Tables.of(folder_geometry(folder, config.data.geometry), where)
    total = source.n_events if max_events is None else min(max_events, source.n_events)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    done = 0
    with partial.open("w", newline="") as handle, Counter("predicting", total, "events") as counter:
        writer = csv.writer(handle)
        writer.writerow(["event_id", "azimuth", "zenith"] + ([] if strict else ["kappa"]))
        for batch_id in source.batch_ids:
            if done == total:
                break
            pulses = source.read_batch(batch_id)
            cache = EventCache.in_memory(pulses)
            keep = np.arange(min(cache.n_events, total - done))
            v_N3 = predict_events(model, cache, keep, config, tables)
            azimuth, zenith = vector_to_angles(v_N3)
            kappa = np.linalg.norm(v_N3, axis=1)
            for row in zip(cache.event_id[keep], azimuth, zenith, kappa, strict=True):
                writer.writerow([int(row[0]), *(f"{x:.9g}" for x in (row[1:3] if strict else row[1:]))])
            done += keep.size
            counter.show(done)
    os.replace(partial, out)
    return done


def display_event(
    folder: Path, event_id: int, out: Path, *, run_dir: Path | None = None, device: str | None = None
) -> None:
    """Draw one event of a folder as HTML, with its true direction if known and a run's prediction if asked for."""
    from iceaggr.display import write_display
    from iceaggr.display_data import Event

    pulses = KaggleFolder(folder).read_event(event_id)
    geometry = folder_geometry(folder)
    true = predicted = kappa = None
    if pulses.azimuth_E is not None and pulses.zenith_E is not None:
        true = angles_to_vector(pulses.azimuth_E.numpy(), pulses.zenith_E.numpy())[0]
    if run_dir is not None:
        where = pick_device(device)
        config, model = load_run(run_dir, where)
        store = EventCache.in_memory(pulses)
        v_3 = predict_events(model, store, np.zeros(1, dtype=np.int64), config, Tables.of(geometry, where))[0]
        kappa = float(np.linalg.norm(v_3))
        predicted = v_3 / kappa
    sensor = pulses.sensor_P.numpy()
    event = Event(
        xyz=geometry.xyz[sensor],
        time=pulses.time_P.numpy(),
        charge=pulses.charge_P.numpy(),
        auxiliary=pulses.auxiliary_P.numpy(),
        sensor=sensor,
        true=true,
        predicted=predicted,
        event_id=event_id,
        kappa=kappa,
    )
    write_display(out, event, geometry.xyz, label=data_label(folder))
