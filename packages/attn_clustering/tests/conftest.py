"""Fixtures of the tests: small languages, a naive sampler, slices of real text."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from attn_clustering.data.settings import SMOKE, LanguageConfig


@pytest.fixture(scope="session")
def tiny_permutation() -> LanguageConfig:
    """20 regular tokens, 12 positions, 1 to 3 segments: small enough to enumerate every segmentation."""
    return LanguageConfig(
        vocab=23, seq_len=12, topics=2, segments=(1, 3), min_segment=3, permutations=3, shared=0.34, seed=7
    )


@pytest.fixture(scope="session")
def tiny_dirichlet(tiny_permutation: LanguageConfig) -> LanguageConfig:
    return replace(tiny_permutation, kind="dirichlet", concentration=4.0, signatures=3)


@pytest.fixture(scope="session")
def tiny(tiny_permutation: LanguageConfig, tiny_dirichlet: LanguageConfig) -> dict[str, LanguageConfig]:
    """Both languages by kind."""
    return {"permutation": tiny_permutation, "dirichlet": tiny_dirichlet}


@pytest.fixture(scope="session")
def small(tiny_dirichlet: LanguageConfig) -> dict[str, LanguageConfig]:
    """Both languages with 125 regular tokens and 64 positions."""
    return {"permutation": SMOKE, "dirichlet": replace(SMOKE, kind="dirichlet", concentration=6.0)}


@pytest.fixture(scope="session")
def naive_labels() -> Callable[[LanguageConfig, np.random.Generator], np.ndarray]:
    """The topic of every position of one sequence, from the definition, with numpy's multinomial."""

    def make(config: LanguageConfig, rng: np.random.Generator) -> np.ndarray:
        n = int(rng.integers(config.segments[0], config.law.max_segments + 1))
        spare = config.seq_len - n * config.min_segment
        lengths = config.min_segment + rng.multinomial(spare, np.full(n, 1 / n))
        return np.repeat(rng.integers(0, config.topics, n), lengths)

    return make


@pytest.fixture(scope="session")
def real_documents() -> Callable[[int], list[dict[str, str]]]:
    """real_documents(n): every 90th textbook module, n of them, with text and topic."""
    root = os.environ.get("LAB_REFERENCE_DATA")
    if root is None:
        pytest.skip("needs LAB_REFERENCE_DATA, the folder with text/openstax_ccby.jsonl.gz")

    def read(n: int) -> list[dict[str, str]]:
        with gzip.open(Path(root) / "text" / "openstax_ccby.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, 0, 90 * n, 90)]

    return read
