"""Data for tests: certified zeros (committed), the first 20,000 as this package computes them, and made-up spacings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import SpacingData, split
from rh_memory.dataset import Dataset
from rh_memory.zeros.generate import main
from rh_memory.zeros.store import Zeros, load, save


@pytest.fixture(scope="session")
def certified() -> SimpleNamespace:
    """n, high, low: zero number n is high + low, from Arb (python-flint 0.9, acb.zeta_zero, 160 bits).

    The first 1000, single ones up to 2,001,052, the eight tightest pairs among those, 100 from 137,000 on, 1000 from
    1,747,000 on, and 16 around the first exception to Rosser's rule. `test_the_certified_zeros_are_arbs` recomputes
    some.
    """
    return SimpleNamespace(**np.load(Path(__file__).parent / "zeta_zeros.npz"))


@pytest.fixture(scope="session")
def zeros_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the first 20,000 zeros, with its manifest."""
    path = tmp_path_factory.mktemp("zeros") / "zeros.npy"
    main(20_000, path, "cpu")
    return path


@pytest.fixture(scope="session")
def zeros(zeros_file: Path) -> Zeros:
    return load(zeros_file)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where slow tests keep the baselines on those zeros, made by whichever comes first."""
    return tmp_path_factory.mktemp("data")


def made_up_heights(n: int = 5300) -> np.ndarray:
    """Gaps that follow a simple rule (each from the two before it), from height 6e5."""
    s = 1 + 0.4 * np.sin(1.1 * np.arange(n))
    return 6e5 + np.cumsum(s) * (2 * np.pi / 11.5)


@pytest.fixture(scope="session")
def toy_dataset() -> Dataset:
    """Windows of 33 of those gaps."""
    gamma = made_up_heights()
    s = np.diff(gamma) * 11.5 / (2 * np.pi)
    centre = np.floor(gamma[1:])
    log_height = np.full(len(s), 11.5, np.float32)
    spacings = Spacings(s.astype(np.float32), centre, gamma[1:] - centre, log_height)
    return Dataset(spacings, SpacingData(spacings), split(len(s), width=33), "made-up spacings", 33, False)


@pytest.fixture
def made_up_file(tmp_path: Path) -> str:
    """Their heights as a file of zeros."""
    gamma = made_up_heights()
    save(tmp_path / "made_up.npy", Zeros(np.floor(gamma), gamma - np.floor(gamma)))
    return str(tmp_path / "made_up.npy")
