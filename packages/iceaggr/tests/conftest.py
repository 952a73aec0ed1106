"""Data for tests: random pulses of any size, the real events where they are at hand, sensor tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from iceaggr.config import ModelConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.pulses import Pulses
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.build import build_model
from iceaggr.models.flat import build_model as build_flat
from lab_shared.attention import Mask
from torch import nn
from torch.nn import functional as F


@pytest.fixture(scope="session")
def real_mini() -> Path:
    """The Kaggle-layout folder with five real labelled events."""
    root = os.environ.get("LAB_REFERENCE_DATA")
    if root is None:
        pytest.skip("needs LAB_REFERENCE_DATA, the folder with iceaggr/kaggle_real_mini")
    return Path(root) / "iceaggr" / "kaggle_real_mini"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tests' models are smaller than the cost of sharing them between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """tiny(arch="v2", seed=0, **changes of its ModelConfig): a flat model of ten features and width 32."""
    config = ModelConfig(slots=2, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16)

    def build(arch: str = "v2", seed: int = 0, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        return build_flat(replace(config, arch=arch, **changes), 4 + 3 * config.slots)

    return build


@pytest.fixture(scope="session")
def awake() -> Callable[..., nn.Module]:
    """awake(config, seed=0): a model whose zero-initialised parameters are random too: a fresh v2 ignores its DOMs."""

    def build(config: ModelConfig, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = build_model(config).eval()
        for p in model.parameters():
            if p.detach().abs().max() == 0:
                nn.init.normal_(p, std=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def make_pulses() -> Callable[..., Pulses]:
    """make_pulses(counts, seed=0, sensors=5160): valid labelled events with these numbers of pulses."""

    def make(counts: Sequence[int], *, seed: int = 0, sensors: int = 5160, labelled: bool = True) -> Pulses:
        rng = np.random.default_rng(seed)
        counts_E = np.asarray(counts)
        n, n_events = int(counts_E.sum()), len(counts_E)
        event_P = np.repeat(np.arange(n_events), counts_E)
        time_P = rng.integers(5_000, 30_000, n)
        time_P = time_P[np.lexsort((time_P, event_P))]
        return Pulses(
            event_id_E=torch.from_numpy(1000 + 7 * np.arange(n_events)),
            offsets_E1=torch.from_numpy(np.concatenate([[0], counts_E.cumsum()])),
            sensor_P=torch.from_numpy(rng.integers(0, sensors, n).astype(np.int32)),
            time_P=torch.from_numpy(time_P.astype(np.int32)),
            charge_P=torch.from_numpy((rng.integers(1, 400, n) / 40).astype(np.float32)),
            auxiliary_P=torch.from_numpy(rng.random(n) < 0.6),
            azimuth_E=torch.from_numpy(rng.random(n_events) * 2 * np.pi) if labelled else None,
            zenith_E=torch.from_numpy(np.arccos(rng.uniform(-1, 1, n_events))) if labelled else None,
        )

    return make


@pytest.fixture(scope="session")
def same_pulses() -> Callable[[Pulses, Pulses], None]:
    """Asserts that two batches are equal in every value and type."""

    def check(a: Pulses, b: Pulses) -> None:
        for name, x in vars(a).items():
            y = getattr(b, name)
            if x is None or y is None:
                assert x is y, name
            else:
                assert x.dtype == y.dtype, name
                assert torch.equal(x, y), name

    return check


@pytest.fixture(scope="session")
def tables() -> Tables:
    """Random sensor tables: the features only look them up."""
    rng = np.random.default_rng(5)
    array = SimpleNamespace(
        xyz=rng.uniform(-500, 500, (5160, 3)),
        scattering=rng.uniform(5, 90, 5160),
        rde=np.where(rng.random(5160) < 0.1, 1.35, 1.0),
        absorption=rng.uniform(20, 250, 5160),
    )
    return Tables.of(array, "cpu")


@pytest.fixture(scope="session")
def store(make_pulses: Callable[..., Pulses]) -> EventCache:
    """Twenty-five events of 1 to 150 pulses on few enough sensors that many DOMs have several."""
    counts = np.random.default_rng(3).integers(12, 150, 25)
    counts[:3] = (1, 5, 1)
    return EventCache.in_memory(make_pulses(counts, seed=4, sensors=90))


@pytest.fixture(scope="session")
def random_events() -> Callable[..., list[torch.Tensor]]:
    """random_events(counts, seed=0): the features (DOMs, 10) of events with these numbers of DOMs."""

    def make(counts: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(n, 10, generator=generator) for n in counts]

    return make


@pytest.fixture(scope="session")
def pack() -> Callable[..., tuple[torch.Tensor, Mask, torch.Tensor]]:
    """Features, mask and CLS rows of events given as (DOMs, F) tensors; unused rows and events at the end."""

    def make(
        events: Sequence[torch.Tensor],
        *,
        rows: int | None = None,
        capacity: int | None = None,
        cls_row: float = 0.0,
        device: str = "cpu",
    ) -> tuple[torch.Tensor, Mask, torch.Tensor]:
        lengths = torch.tensor([len(e) + 1 for e in events])
        used = int(lengths.sum())
        rows, capacity = rows or used, capacity or len(events)
        cls = torch.full((1, events[0].shape[1]), cls_row)
        tokens = torch.cat([torch.cat([cls, e]) for e in events])
        features_TF = F.pad(tokens, (0, 0, 0, rows - used))
        offsets_E1 = torch.full((capacity + 1,), used, dtype=torch.int32)
        offsets_E1[0] = 0
        offsets_E1[1 : len(events) + 1] = lengths.cumsum(0)
        cls_E = torch.full((capacity,), rows - 1)
        cls_E[: len(events)] = offsets_E1[: len(events)]
        return features_TF.to(device), Mask.segments(offsets_E1.to(device), rows), cls_E.to(device)

    return make


@pytest.fixture(scope="session")
def isotropic() -> Callable[[np.random.Generator, int], np.ndarray]:
    """isotropic(rng, n): (n, 3) random unit vectors."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        vectors = rng.normal(size=(n, 3))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return draw


@pytest.fixture
def predictions(isotropic: Callable[[np.random.Generator, int], np.ndarray]) -> dict[str, np.ndarray]:
    """3,000 events of a predictor that is better where kappa is large, and of a worse one beside it."""
    rng, n = np.random.default_rng(0), 3000
    true, kappa = isotropic(rng, n), np.exp(rng.normal(0.5, 1.0, n))
    predicted = true * kappa[:, None] + rng.normal(size=(n, 3))
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    line_fit = isotropic(rng, n)
    return {
        "event_id": np.arange(n),
        "azimuth": np.arctan2(true[:, 1], true[:, 0]) % (2 * np.pi),
        "zenith": np.arccos(true[:, 2]),
        "pred_azimuth": np.arctan2(predicted[:, 1], predicted[:, 0]) % (2 * np.pi),
        "pred_zenith": np.arccos(predicted[:, 2]),
        "kappa": kappa,
        "n_pulses": rng.integers(20, 400, n),
        "error_deg": opening_angle_deg(predicted, true),
        "linefit_error_deg": opening_angle_deg(line_fit, true),
        "type": rng.integers(0, 2, n),
        "energy": 10 ** rng.uniform(2, 6, n),
    }
