"""`make bench` reads every suite's record, and compares like with like."""

from __future__ import annotations

import json

import bench
import costs
import faults
import fuzz
import pytest
import reproduce
import walk
from evidence.record import ROOT
from evidence.speeds import Speed, speeds

RECORDS = [ROOT / f"{kept}-{device}.json" for _, kept in bench.SUITES.values() for device in ("cpu", "cuda")]


@pytest.mark.parametrize("path", [path for path in RECORDS if path.is_file()], ids=lambda path: path.stem)
def test_every_committed_record_is_read(path):
    found = speeds(json.loads(path.read_text()))
    assert found, "no speed in it"
    assert all(speed.value > 0 and speed.unit for speed in found.values())


def test_a_record_compared_with_itself_is_as_fast():
    record = json.loads((ROOT / "packages/iceaggr/results/bench/iceaggr-cuda.json").read_text())
    rows = bench.compare(record, record)
    assert all(row["ratio"] == 1 and not row["slower"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert (by_name["train small"]["required"], by_name["train small"]["met"]) == (">= 279,000", "met")


def test_slower_than_four_fifths_is_flagged():
    before = [{"name": "train", "windows_per_s": 100.0, "required": 90}, {"name": "step", "ms": 1.0}]
    now = [{"name": "train", "windows_per_s": 79.0, "required": 90}, {"name": "step", "ms": 1.24}]
    rows = {row["name"]: row for row in bench.compare(now, before)}
    assert rows["train"]["slower"]
    assert rows["train"]["met"] == "NOT met"
    assert not rows["step"]["slower"]
    assert rows["step"]["ratio"] == pytest.approx(1 / 1.24)
    text = bench.text(list(rows.values()))
    assert "x0.79  SLOWER" in text
    assert "NOT met" in text


def test_requirements_that_a_record_judges_itself_are_shown():
    record = {"rows": [], "requirements": [{"what": "ratio", "measured": 47.0, "required": ">= 50", "met": False}]}
    assert "NOT met" in bench.text(bench.compare(record, []))


def test_several_readouts_count_targets():
    one = {"name": "train e0", "windows_per_s": 10.0, "targets_per_s": 2560.0, "required": 9}
    many = {"name": "train e3", "windows_per_s": 10.0, "targets_per_s": 160.0, "required": 150}
    found = speeds([one, many])
    assert found["train e0"] == Speed("train e0", 10.0, "windows/s", 9)
    assert found["train e3"] == Speed("train e3", 160.0, "targets/s", 150)


def test_what_was_never_measured_before_has_no_ratio():
    assert "ratio" not in bench.compare([{"name": "new", "seconds": 1.0}], [])[0]


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        (reproduce, ["--only", "rh-e00", "--list"], "did you mean"),
        (reproduce, ["--gpus", "-1"], "-1 is not a positive whole number"),
        (reproduce, ["--minutes", "nan"], "nan is not a positive number"),
        (fuzz, ["--case", "0"], "0 is not a positive whole number"),
        (fuzz, ["--case", "3"], "name it with --only"),
        (fuzz, ["--only"], "expected at least one argument"),
        (faults, ["--only"], "expected at least one argument"),
        (faults, ["--only", "train-iceaggr", "--keep", "HERE"], "already"),
        (walk, ["--only", "no command has this"], "no command"),
        (walk, ["--record"], "add --run"),
        (walk, ["--seconds", "0"], "0 is not a positive number"),
        (costs, ["--price", "-1"], "-1 is not a positive number"),
        (bench, ["--only"], "expected at least one argument"),
        (bench, ["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_words_are_refused_before_any_work(tool, words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "train-iceaggr").mkdir()
    monkeypatch.setattr("sys.argv", ["tool", *(str(tmp_path) if word == "HERE" else word for word in words)])
    try:
        code = tool.main()
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert said in capsys.readouterr().err
