"""Data for tests: random pulses of any size, the real events where they are at hand, sensor tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from iceaggr.config import ModelConfig
from iceaggr.data.features import Tables
from iceaggr.data.pulses import Pulses
from iceaggr.models.build import build_model
from torch import nn


@pytest.fixture(scope="session")
def real_mini() -> Path:
    """The Kaggle-layout folder with five real labelled events."""
    root = os.environ.get("LAB_REFERENCE_DATA")
    if root is None:
        pytest.skip("needs LAB_REFERENCE_DATA, the folder with iceaggr/kaggle_real_mini")
    return Path(root) / "iceaggr" / "kaggle_real_mini"


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
