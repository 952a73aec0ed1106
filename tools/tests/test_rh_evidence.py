"""Tables of zeta zeros: what "training" is a mean of, what was asked of scores and times, what is called a limit."""

from __future__ import annotations

import json

import pytest
import report
from evidence import rh_training, speeds
from evidence.record import read
from evidence.rh_runs import folders


@pytest.mark.parametrize(
    ("experiment", "steps"),
    [("explicit-small", [1120, 1140, 1160, 1180, 1200]), ("explicit, steps=16000", [15_960])],  # its rows are thinned
)
def test_training_is_the_mean_over_the_last_hundred_steps(experiment, steps):
    course = rh_training._course(experiment, 7)
    rows = read(f"{folders()[experiment, 7]}/metrics.jsonl")
    losses = [row["nll"] for row in rows if row["split"] == "train" and row["step"] in steps]
    assert len(losses) == len(steps)
    assert course["train"] == pytest.approx(sum(losses) / len(losses))
    assert course["gap"] == pytest.approx(course["last"] - course["train"])


def requirements() -> dict[str, list[str]]:
    lines = report.TABLES["rh_memory.requirements"]().splitlines()[2:]
    return {cells[0]: cells[1:] for line in lines for cells in [[x.strip() for x in line.strip("|").split("|")]]}


def test_what_was_asked_stands_beside_what_was_reached():
    asked = requirements()
    assert asked["e0"][:3] == ["nll_all <= -0.55", "-.478", "**NOT met** (2 of 3 seeds)"]  # no interval over two
    assert asked["e3, steps=3000"][0] == "nll_last <= -0.5"
    assert asked["e0-rope"][3:] == ["100 s of one H200", "109 to 111 s", "**NOT met**"]
    assert asked["explicit"][3:] == ["150 s of one H200", "144 to 145 s", "met"]
    assert asked["explicit-small, source=gue"][1].startswith(".4195 ")  # to three digits it would seem to be in range


def test_a_claim_about_nll_all_has_the_values_of_nll_all():
    claim = report.claims()["rh_memory/score-e0"]
    assert claim.metric.startswith("nll_all")
    assert sum(claim.values) / len(claim.values) == pytest.approx(-0.478, abs=5e-4)
    assert claim.interval is None
    assert report.claims()["rh_memory/training-time-e0-rope"].verdict == "NOT met"


def test_nothing_at_a_glance_is_called_a_limit():
    header = report.TABLES["lab.headline"]().splitlines()[0]
    assert header.endswith("| for comparison |")


def test_speeds_without_quartiles_do_not_announce_any(tmp_path):
    record, row = tmp_path / "speeds.json", {"stage": "train", "windows_per_s": 100.0}
    record.write_text(json.dumps([row]))
    assert speeds.table({"here": str(record)}).startswith("| median | unit |")
    spread = tmp_path / "spread.json"
    spread.write_text(json.dumps([row | {"quartiles": [99.0, 101.0]}]))
    assert speeds.table({"here": str(spread)}).startswith("| median [quartiles] | unit |")
