"""Zeros dealt out to jobs: the same bytes as from one process, and no chunk computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lab_shared.errors import UserError
from rh_memory.cli import main as command
from rh_memory.zeros import shards
from rh_memory.zeros.generate import Chunk, main
from rh_memory.zeros.shards import generate_sharded

COUNT = 9000
OPTIONS = {"zeros_per_chunk": 2500, "workers": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "zeros.npy"
    main(COUNT, out, "cpu", zeros_per_chunk=2500)
    return out


def same(a: Path, b: Path) -> None:
    assert a.read_bytes() == b.read_bytes()
    manifests = [json.loads(path.with_suffix(".json").read_text()) for path in (a, b)]
    for manifest in manifests:
        del manifest["seconds"]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("n", [1, 3])
def test_shards_make_the_same_bytes(tmp_path: Path, whole: Path, n: int) -> None:
    generate_sharded(COUNT, tmp_path / "zeros.npy", "cpu", shards=n, **OPTIONS)
    same(tmp_path / "zeros.npy", whole)
    assert not list(tmp_path.glob(".*shards"))


def test_no_chunk_is_computed_twice(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = shards.compute_chunk

    def fails_after_two(lower: int, *args: Any) -> Chunk:
        if len(computed) == 2:
            raise ValueError("the node is lost")
        computed.append(lower)
        return compute(lower, *args)

    monkeypatch.setattr(shards, "compute_chunk", fails_after_two)
    with pytest.raises(UserError, match="the node is lost"):
        generate_sharded(COUNT, tmp_path / "zeros.npy", "cpu", shards=2, **OPTIONS)
    before = list(computed)

    def counts(lower: int, *args: Any) -> Chunk:
        computed.append(lower)
        return compute(lower, *args)

    monkeypatch.setattr(shards, "compute_chunk", counts)
    generate_sharded(COUNT, tmp_path / "zeros.npy", "cpu", shards=3, **OPTIONS)  # dealt out in another way
    assert len(before) == 2
    assert sorted(computed) == sorted(set(computed))
    same(tmp_path / "zeros.npy", whole)


def test_more_shards_than_chunks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shards=9: 9,000 zeros are computed in 4 chunks"):
        generate_sharded(COUNT, tmp_path / "zeros.npy", "cpu", shards=9, **OPTIONS)


@pytest.mark.slow
def test_the_command_shards(tmp_path: Path) -> None:
    for name, flags in (("one", []), ("two", ["--shards", "2", "--workers", "2"])):
        argv = ["zeros", "--count", "600000", "--device", "cpu", "--out", str(tmp_path / f"{name}.npy"), *flags]
        assert command(argv) == 0
    same(tmp_path / "one.npy", tmp_path / "two.npy")
