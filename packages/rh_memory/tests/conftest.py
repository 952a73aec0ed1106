"""Zeros for tests: a committed table of certified ones, and the first 20,000 as this package computes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rh_memory.zeros.generate import main
from rh_memory.zeros.store import Zeros, load


@pytest.fixture(scope="session")
def certified() -> SimpleNamespace:
    """n, high, low: zero number n is high + low, from Arb (python-flint 0.9, acb.zeta_zero, 160 bits).

    The first 1000, single ones up to 2,001,052, the eight tightest pairs among those, 100 from 137,000 and from
    1,747,000, and 16 around the first exception to Rosser's rule. `test_the_certified_zeros_are_arbs` recomputes some.
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
