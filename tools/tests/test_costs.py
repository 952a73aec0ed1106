"""COSTS.md is what tools/costs.py writes, and its arithmetic is that of the records."""

from __future__ import annotations

import json
from pathlib import Path

import costs
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_tool_writes() -> None:
    assert (ROOT / "COSTS.md").read_text() == costs.page(costs.PRICE), "run `python tools/costs.py --write`"


def test_hours_are_work_over_the_recorded_speed() -> None:
    rows = json.loads((ROOT / "packages/iceaggr/results/bench/iceaggr-cuda.json").read_text())["rows"]
    rate = next(row["events_per_s"] for row in rows if row["stage"] == "train 5M")
    trained = next(cost for cost in costs.neutrinos() if "train 5M" in cost.work)
    assert trained.hours * 3600 * rate == pytest.approx(4 * 131_953_924)
    found = costs.zeros()
    assert found[1].hours / found[0].hours > 1e9 / 162e6  # higher zeros cost more each


def test_compiling_is_that_of_each_package() -> None:
    for package, name in costs.COMPILED.items():
        file = ROOT / "packages" / package / "results" / "bench" / f"{name}.json"
        found = json.loads(file.read_text())
        rows = found if isinstance(found, list) else found["rows"]
        first = sorted(row["first_step_s"] for row in rows if "first_step_s" in row)
        assert f"{first[0]:.0f} to {first[-1]:.0f} s in {package}" in costs.page(costs.PRICE)


def test_a_price_changes_the_money_and_nothing_else() -> None:
    def cells(price: float) -> list[list[str]]:
        return [line.split("|") for line in costs.page(price).splitlines() if line.startswith("| ")]

    for usual, double in zip(cells(costs.PRICE), cells(2 * costs.PRICE), strict=True):
        assert usual[:4] + usual[5:] == double[:4] + double[5:]
    assert cells(costs.PRICE) != cells(2 * costs.PRICE)
    assert "--price 8" in costs.page(8.0)
