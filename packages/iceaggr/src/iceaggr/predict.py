"""Directions from a trained run: over an event store, into a submission file, or for one event's picture."""

from __future__ import annotations

import csv
import math
import os
import sys
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lab_shared.attention import Mask
from lab_shared.checkpoint import load_weights
from lab_shared.errors import UserError
from lab_shared.files import make_folder
from lab_shared.progress import Counter
from lab_shared.runs import finished_run, pick_device
from torch import nn

from iceaggr.calibrate import CALIBRATION, load_calibration
from iceaggr.config import TrainConfig
from iceaggr.data.batches import one_pass
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables, rotate_z
from iceaggr.data.kaggle import KaggleFolder, test_first
from iceaggr.data.prepare import data_label, folder_geometry
from iceaggr.data.pulse_batches import PulseBatch, one_pass_of_pulses
from iceaggr.data.pulses import TokenBatch
from iceaggr.data.schema import N_SENSORS
from iceaggr.directions import angles_to_vector, vector_to_angles
from iceaggr.losses import mean_vector
from iceaggr.models.build import Model, build_model
from iceaggr.models.hierarchical import pulse_inputs
from iceaggr.submission import angle_text, check_sample, check_submission


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


def model_inputs(batch: TokenBatch | PulseBatch) -> tuple[Any, ...]:
    """The arguments of the model that batches of this kind are for."""
    if isinstance(batch, PulseBatch):
        return pulse_inputs(batch)
    return batch.features_TF, token_mask(batch), batch.cls_E


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass's number format; the input projection, the head and the losses stay in float32."""
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def load_run(run_dir: Path, device: torch.device) -> tuple[TrainConfig, Model]:
    """The configuration and trained model of a run folder, the model in evaluation mode on `device`."""
    config, weights = finished_run(run_dir, TrainConfig, "iceaggr")
    model = build_model(config.model)
    load_weights(weights, model)
    return config, model.to(device).eval()


def predict_events(
    model: nn.Module,
    cache: EventCache,
    index_N: np.ndarray,
    config: TrainConfig,
    tables: Tables,
    counter: Counter | None = None,
) -> np.ndarray:
    """Raw direction vectors (N, 3) float32 of the events at these positions of the store, in their order.

    The vector of a mixture is that of its mean (`iceaggr.losses.mean_vector`). With config.tta = n > 1 the events are
    looked at n times, turned about the vertical axis in even steps, and the n vectors, turned back, are averaged.
    """
    total_N3 = np.zeros((index_N.size, 3))
    for turn in range(config.tta):
        angle = 2 * math.pi * turn / config.tta
        out_NC = torch.from_numpy(predict_outputs(model, cache, index_N, config, tables, counter, angle=angle))
        back_N = torch.full((index_N.size,), -angle, dtype=torch.float64)
        total_N3 += rotate_z(mean_vector(out_NC).double(), back_N).numpy()
    return (total_N3 / config.tta).astype(np.float32)


@torch.inference_mode()
def predict_outputs(
    model: nn.Module,
    cache: EventCache,
    index_N: np.ndarray,
    config: TrainConfig,
    tables: Tables,
    counter: Counter | None = None,
    *,
    angle: float = 0.0,
) -> np.ndarray:
    """What the head says, float32, for these events turned by `angle` (rad) about the vertical axis, in their order.

    (N, 3), or (N, 4 K) of a mixture, to be read by `iceaggr.losses.mixture_parts`. Directions stay in the turned frame.
    """
    device = tables.device
    gpu = device.type == "cuda"
    # Batches larger than in training keep a GPU busy while the host prepares the next one. An event is never split,
    # and the largest possible one has a token for each DOM and the CLS token.
    budget = max(token_budget(config, device) * (4 if gpu else 1), N_SENSORS + 1)
    order, vectors, done = [], [], 0
    was_training = model.training
    model.eval()
    batches: Any = one_pass_of_pulses if config.model.arch == "hierarchical" else one_pass
    for batch in batches(cache, index_N, config.model, tables, token_budget=budget, static=gpu, angle=angle):
        with autocast(config, device):
            out_EC = model(*model_inputs(batch))
        order.append(batch.index_E)
        # Left on the device, as reading it would stop the stream; a copy, as a CUDA graph writes over its output.
        vectors.append(out_EC[: batch.n_events].float().clone())
        done += batch.n_events
        if counter is not None:
            counter.show(done)
    model.train(was_training)
    components = config.model.head_mixture
    out_NC = np.empty((index_N.size, 3 if components == 1 else 4 * components), dtype=np.float32)
    if order:
        place = np.empty(int(index_N.max()) + 1, dtype=np.int64)
        place[index_N] = np.arange(index_N.size)
        out_NC[place[np.concatenate(order)]] = torch.cat(vectors).cpu().numpy()
    return out_NC


def predict_folder(
    run_dir: Path,
    folder: Path,
    out: Path,
    *,
    max_events: int | None = None,
    device: str | None = None,
    strict: bool = False,
    split: Literal["auto", "train", "test"] = "auto",
) -> int:
    """Write event_id, azimuth, zenith and kappa (not with strict) of every event of a folder, in its order.

    Angles in radians say where the neutrino came from; kappa is divided by the temperature of RUN/calibration.json, if
    `iceaggr calibrate` has left one. split: "auto" is test where there is one and train otherwise. Works file by file,
    so memory does not grow with the folder; the csv is checked against the competition's format and then appears at
    once. Returns the number of events.

    Raises:
        SubmissionError: the folder's tables disagree about which events it has.
        UserError: `out` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder: give --out a file, such as {out / 'submission.csv'}")
    make_folder(out.parent)
    where = pick_device(device)
    config, model = load_run(run_dir, where)
    calibration = load_calibration(run_dir)
    temperature = 1.0 if calibration is None else calibration.temperature
    source = test_first(folder) if split == "auto" else KaggleFolder(folder, split)
    tables = Tables.of(folder_geometry(folder, config.data.geometry), where)
    total = source.n_events if max_events is None else min(max_events, source.n_events)
    partial = out.with_name(out.name + ".partial")
    ids: list[np.ndarray] = []
    done = 0
    try:
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
                azimuth, zenith = (angle_text(angle) for angle in vector_to_angles(v_N3))
                kappa = (f"{x:.9g}" for x in np.linalg.norm(v_N3, axis=1) / temperature)
                rows = zip(cache.event_id[keep].tolist(), azimuth, zenith, kappa, strict=True)
                writer.writerows(row[:3] if strict else row for row in rows)
                ids.append(cache.event_id[keep])
                done += keep.size
                counter.show(done)
        if done == source.n_events:
            check_sample(source, np.concatenate(ids))
        check_submission(partial, chain.from_iterable(map(np.ndarray.tolist, ids)), strict=strict)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    said = f"kappa as the model gives it (no {CALIBRATION})" if calibration is None else calibration.said(run_dir)
    print(f"iceaggr: {said}", file=sys.stderr)
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
        geometry = folder_geometry(folder, config.data.geometry)  # the array that `predict` looks at
        v_3 = predict_events(model, store, np.zeros(1, dtype=np.int64), config, Tables.of(geometry, where))[0]
        kappa = float(np.linalg.norm(v_3))
        predicted = v_3 / kappa
        if calibration := load_calibration(run_dir):
            kappa /= calibration.temperature
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
