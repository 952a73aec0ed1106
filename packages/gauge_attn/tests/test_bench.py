import json

import pytest
import torch
from gauge_attn import bench, bench_cases
from gauge_attn.bench import main, requirements, table
from gauge_attn.bench_cases import DENSE_DIAGONAL, DENSE_FULL, EAGER, Case, alternating, dense_row
from gauge_attn.rounding import precision_table

CPU = torch.device("cpu")


@pytest.mark.slow
def test_bench_measures_every_section_and_writes_its_record(tmp_path, capsys):
    result = main("cpu", tmp_path / "bench.json", quick=True)
    rows = result["rows"]
    assert {row["section"] for row in rows} == {"speed", "memory", "layouts", "precision"}
    assert all(row["ms"] > 0 for row in rows if row["section"] != "precision")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["label"] == "generated data"
    assert requirements(rows, gpu=False) == record["requirements"] == []  # not at these lengths
    for row in rows:
        row["n"] *= 8
    assert {r["required"] for r in requirements(rows, gpu=False)} == {">= 50"}
    assert len(record["rows"]) == len(rows)
    assert "name dense reference, full covariance" in capsys.readouterr().err
    assert result["text"].startswith("speed (generated data)")


def test_the_error_table_ranks_the_number_formats():
    rows = precision_table("cpu", n_tokens=32)
    assert all(row["fp32 TV"] < 1e-5 and row["fp16 TV"] < 0.02 and row["bf16x3 TV"] < 0.02 for row in rows)
    assert all(row["fp32 TV"] < row["fp16 TV"] for row in rows)
    assert "seed-like, l=2, kappa=0.0086" in table(rows)


def test_every_section_has_its_stages_and_the_required_ones_come_first():
    for device in ("cpu", "cuda"):
        found = bench.stages(torch.device(device), quick=False)
        assert {s.section for s in found} == set(bench.SECTIONS) - ({"dense"} if device == "cpu" else set())
    assert [s.name for s in found[:3]] == ["speed, N = 1024", f"{DENSE_DIAGONAL}, N = 1024", "memory"]
    assert found[-1].name.startswith(DENSE_FULL)


def test_a_budget_leaves_stages_out_and_a_failure_ends_no_other(tmp_path, monkeypatch):
    def broken(rows):
        yield {"section": "memory", "name": "a", "n": 1, "ms": 1.0}
        raise RuntimeError("CUDA out of memory\nmore")

    clock = iter([0.0, 1.0, 2.0, 30.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    done = bench.Stage("layouts", "fine", lambda rows: [{"section": "layouts", "name": "b", "n": len(rows), "ms": 2.0}])
    late = bench.Stage("speed", "late", broken)
    monkeypatch.setattr(bench, "stages", lambda *_: [bench.Stage("memory", "broken", broken), done, late])
    result = main("cpu", tmp_path / "bench.json", budget_s=10)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["left out"] == ["late"]
    assert record["failed"] == {"broken": "CUDA out of memory"}
    assert [row["name"] for row in record["rows"]] == ["a", "b"]
    assert record["rows"][1]["n"] == 1
    assert "left out after 10 s: late" in result["text"]
    assert "broken FAILED" in result["text"]


def test_cases_take_turns():
    calls = []

    def traced(name):
        def function(x):
            calls.append(name)
            return x.square().sum()

        return function

    leaf = (torch.ones(3, requires_grad=True),)
    rows = alternating("speed", 3, [Case(name, traced(name), leaf) for name in "ab"])
    assert calls == [*"aabb", *(bench_cases.ROUNDS * ("a" * 8 + "b" * 8))]
    assert rows[0]["times features"] == rows[0]["lowest"] == 1
    assert rows[1]["lowest"] <= rows[1]["times features"] <= rows[1]["highest"]


@pytest.mark.parametrize(("limit_s", "why"), [(0.01, "stopped after 0.01 s"), (60.0, "exit code 1")])
def test_a_dense_reference_that_does_not_compile_in_time_is_measured_without(monkeypatch, limit_s, why):
    monkeypatch.setattr(
        bench_cases.sys, "executable", "false" if why.startswith("exit") else bench_cases.sys.executable
    )
    row = dense_row(DENSE_DIAGONAL, CPU, n_batch=1, n=8, limit_s=limit_s)
    assert row["name"] == DENSE_DIAGONAL + EAGER
    assert row["ms"] > 0
    assert row["note"].endswith(why)


@pytest.mark.slow
def test_a_dense_reference_is_measured_by_a_process_of_its_own():
    row = dense_row(DENSE_DIAGONAL, CPU, n_batch=1, n=8, limit_s=120.0)
    assert (row["section"], row["name"], row["n"]) == ("speed", DENSE_DIAGONAL, 8)
    assert "note" not in row


def test_requirements_name_what_they_compare():
    rows = [
        {"section": "speed", "name": "features, mean", "n": 1024, "ms": 1.0, "times features": 1.0},
        {"section": "speed", "name": "plain attention of width 24", "n": 1024, "ms": 0.8, "times features": 0.8},
        {"section": "speed", "name": DENSE_DIAGONAL + EAGER, "n": 1024, "ms": 700.0, "times features": 700.0},
        {"section": "memory", "name": "x", "n": 2048, "ms": 1.0, "growth": 2.0},
    ]
    found = {r["what"]: r for r in requirements(rows, gpu=True)}
    assert found[f"times faster than the {DENSE_DIAGONAL}{EAGER}, N = 1024"]["met"]
    assert found["times the duration of plain attention of the same padded width, N = 1024"]["measured"] == 1.25
    assert len(found) == 3
