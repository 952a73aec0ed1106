"""tools/bench_scaling.py on the CPU: one process, then two under torchrun, and a record of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_scaling
import pytest


@pytest.mark.slow
def test_it_measures_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.json"
    options = ["--device", "cpu", "--only", "smoke language model", "--lines", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *options])
    assert bench_scaling.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2]
    assert rows[0]["speedup"] == 1.0
    assert rows[1]["speedup"] == pytest.approx(rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"])
    assert "smoke language model x 2" in capfd.readouterr().out
