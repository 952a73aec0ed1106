"""COSTS.md is what tools/costs.py writes, and its arithmetic is that of the records."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def costs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("costs", ROOT / "tools" / "costs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["costs"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tool_writes(costs: ModuleType) -> None:
    assert (ROOT / "COSTS.md").read_text() == costs.page(costs.PRICE), "run `python tools/costs.py --write`"


def test_hours_are_work_over_the_recorded_speed(costs: ModuleType) -> None:
    rows = json.loads((ROOT / "packages/iceaggr/results/bench/iceaggr-cuda.json").read_text())["rows"]
    rate = next(row["events_per_s"] for row in rows if row["stage"] == "train 5M")
    trained = next(cost for cost in costs.neutrinos() if "train 5M" in cost.work)
    assert trained.hours * 3600 * rate == pytest.approx(4 * 131_953_924)
    found = costs.zeros()
    assert found[1].hours / found[0].hours > 1e9 / 162e6  # higher zeros cost more each


def test_a_price_changes_the_money_and_nothing_else(costs: ModuleType) -> None:
    def cells(price: float) -> list[list[str]]:
        return [line.split("|") for line in costs.page(price).splitlines() if line.startswith("| ")]

    for usual, double in zip(cells(costs.PRICE), cells(2 * costs.PRICE), strict=True):
        assert usual[:4] + usual[5:] == double[:4] + double[5:]
    assert cells(costs.PRICE) != cells(2 * costs.PRICE)
    assert "--price 8" in costs.page(8.0)
