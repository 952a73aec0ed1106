"""tools/bench_scaling.py on the CPU: one process, then two under torchrun, and a record of both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_measures_and_records(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    options = ["--device", "cpu", "--only", "smoke language model", "--lines", "2", "--out", str(out)]
    program = [sys.executable, str(ROOT / "tools" / "bench_scaling.py"), *options]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2]
    assert rows[0]["speedup"] == 1.0
    assert rows[1]["speedup"] == pytest.approx(rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"])
    assert "smoke language model x 2" in done.stdout
