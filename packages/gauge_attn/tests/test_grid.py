import json
import math
from dataclasses import replace

import pytest
import torch
from gauge_attn import cells as grid_cells
from gauge_attn import grid
from gauge_attn.comparisons import FAILS, HOLDS, UNDECIDED
from gauge_attn.config import DataConfig
from gauge_attn.hypotheses import l_regression
from gauge_attn.irreps import Irreps
from gauge_attn.records import pack, unpack
from gauge_attn.report import write_report
from gauge_attn.verdicts import verdicts
from lab_shared.errors import UserError


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(cell, seed, *, loss=4.0, row_std=(0.03, 0.03), noise=None, initial=(), grid_name="g", **settings):
    heads = [
        {"layer": 0, "head": l, "label": f"ℓ{l}", "l": l, "kappa": 1.0, "row_std": r, "entropy_ratio": 0.5 - 0.1 * l,
         "attended_kl": 0.1, "logit_std": math.exp(l)}
        for l, r in enumerate(row_std)
    ]  # fmt: skip
    common = {"spec": "1x0e+1x1e", "kappa_mode": "shared", "alignment": 0.0, "gauge_fixed": False, "window": 64}
    return {
        "grid": grid_name,
        "cell": cell,
        "seed": seed,
        "settings": common | settings,
        "summary": {
            "label": "generated numbers", "loss": loss, "perplexity": math.exp(loss), "heads": heads,
            "noise": noise or {}, "initial": list(initial), "grad_norm_max": 1.0,
            "diversity": {"kl_std": 0.01, "kl_mean": 0.02},
        },
    }  # fmt: skip


def status(runs, claim):
    return next(v["status"] for v in verdicts(runs) if claim in v["claim"])


def test_low_spin_claim_is_decided_by_the_interval():
    def sharp(values):
        return [run("free", i, row_std=(0.02, v)) for i, v in enumerate(values)]

    assert status(sharp([0.110, 0.111, 0.112]), "cannot be sharp") == FAILS
    assert status(sharp([0.03, 0.031, 0.032]), "cannot be sharp") == HOLDS
    assert status(sharp([0.09, 0.12, 0.10]), "cannot be sharp") == UNDECIDED
    assert status(sharp([0.12]), "cannot be sharp") == UNDECIDED  # one seed decides nothing
    scattered = [run("other", i, row_std=(0.02, v)) for i, v in enumerate([0.02, 0.09, 0.14])]
    assert status(sharp([0.03, 0.031, 0.032]) + scattered, "cannot be sharp") == UNDECIDED


def test_differences_need_an_interval_without_zero():
    def pair(a, b):
        return [run("frozen", i, loss=x) for i, x in enumerate(a)] + [
            run("learned", i, loss=x) for i, x in enumerate(b)
        ]

    assert status(pair([4.2, 4.21, 4.19], [4.0, 4.0, 4.0]), "H7") == HOLDS
    assert status(pair([3.8, 3.81, 3.79], [4.0, 4.0, 4.0]), "H7") == FAILS
    assert status(pair([4.2, 3.7, 4.1], [4.0, 4.0, 4.0]), "H7") == UNDECIDED
    assert status(pair([4.2], [4.0]), "H7") == UNDECIDED


def test_order_that_noise_reproduces_is_no_capacity():
    def seed_c(l1):
        noise = {"0": 0.026, "1": 0.035}
        again = run("seed-c-original", 0, row_std=(0.026, 0.9), noise=noise)  # other arithmetic, no further seed
        return [*(run("seed-c", i, row_std=(0.026, v), noise=noise) for i, v in enumerate(l1)), again]

    assert status(seed_c([0.035, 0.036, 0.034]), "capacity") == FAILS
    assert status(seed_c([0.070, 0.071, 0.072]), "capacity") == HOLDS
    assert status(seed_c([0.030, 0.060, 0.070]), "capacity") == UNDECIDED


def test_four_taylor_terms_that_change_nothing_decide_nothing():
    def pair(l1, l2):
        changed = [
            run("taylor4", i, row_std=(0.03, 0.04 + a, 0.05 + b)) for i, (a, b) in enumerate(zip(l1, l2, strict=True))
        ]
        return changed + [run("exact", i, row_std=(0.03, 0.04, 0.05)) for i in range(3)]

    none, some = [0.001, -0.001, 0.0], [0.01, 0.011, 0.012]
    assert status(pair(none, some), "H4") == HOLDS
    assert status(pair(some, some), "H4") == FAILS
    assert status(pair(none, none), "H4") == UNDECIDED


def test_closed_form_is_held_to_ten_percent():
    def with_ratio(ratio):
        return [run("x", 0, initial=[{"l": 0, "row_std": 0.03 * ratio, "predicted": 0.03}] * 3)]

    assert status(with_ratio(1.05), "H1") == HOLDS
    assert status(with_ratio(1.3), "H1") == FAILS


def test_closed_form_is_decided_by_the_model_farthest_off():
    def untrained(l, ratio):
        return {"l": l, "row_std": 0.03 * ratio, "predicted": 0.03}

    near = [run("x", i, initial=[untrained(0, 1.01), untrained(1, 1.02 + i / 100)]) for i in range(5)]
    verdict = next(v for v in verdicts([*near, run("x", 5, initial=[untrained(2, 0.85)])]) if "H1" in v["claim"])
    assert verdict["status"] == FAILS
    assert "largest 15.0% at ℓ2; beyond 10% are 1 of 11 means over the heads of an l (ℓ2 1 of 1)" in verdict["measured"]
    # What begins as the same model and differs in its training is one model.
    trained = [run("other", i, loss=3.0, alignment=1.0, initial=near[i]["summary"]["initial"]) for i in range(5)]
    assert "0 of 10 means" in next(v["measured"] for v in verdicts([*near, *trained]) if "H1" in v["claim"])


def test_runs_that_two_grids_share_count_once():
    def free(grid_name, cell, seeds):
        return [
            run(cell, s, row_std=(0.02, 0.03 + 0.01 * s), kappa_mode="learnable", grid_name=grid_name) for s in seeds
        ]

    once, shared = free("h2", "19,learnable,none", range(5)), free("specs", "19,learnable,none", range(3))
    assert l_regression([*once, *shared]) == l_regression(once)
    assert l_regression(once)["runs"] == 5
    fixed = [run("gauge-fixed", s, gauge_fixed=True, grid_name=g) for g in ("h5", "h7") for s in range(3)]
    assert "over 3 runs" in next(v["measured"] for v in verdicts(fixed) if "H5" in v["claim"])


def test_verdicts_name_their_statistic():
    initial = [{"l": 0, "row_std": 0.03, "predicted": 0.03}]
    runs = [
        run("19,learnable,none", s, kappa_mode="learnable", initial=initial, row_std=(0.02 + s, 1)) for s in range(4)
    ]
    runs += [run("gauge-fixed", s, gauge_fixed=True) for s in range(3)]
    named = {v["claim"][:2]: v["test"] for v in verdicts(runs) if "test" in v}
    assert named["H1"].startswith("the untrained model farthest off")
    assert named["H5"].startswith("the head farthest off")
    assert named["Sh"].startswith("least squares; percentile bootstrap over runs")
    assert named["ro"] == "by definition, no data"
    assert len(named) == 4  # the others are Student's t over seeds


def test_alignment_is_judged_over_all_pairs_of_cells():
    def matrix(rises):
        runs = []
        for mode, rise in rises.items():
            for seed in range(3):
                for alignment, more in (("none", 0.0), ("sum-1", rise)):
                    r = run(f"19,{mode},{alignment}", seed)
                    for h in r["summary"]["heads"]:
                        h["entropy_ratio"] += more + 0.001 * seed * (alignment == "sum-1")
                    runs.append(r)
        return runs

    assert status(matrix({"shared": 0.2, "dim": 0.1}), "every layout") == HOLDS
    assert status(matrix({"shared": 0.2, "dim": -0.0015}), "every layout") == UNDECIDED
    assert status(matrix({"shared": 0.2, "dim": -0.1}), "every layout") == FAILS
    assert not any("every layout" in v["claim"] for v in verdicts(matrix({"shared": 0.2})))


def test_regression_finds_a_planted_coefficient():
    def planted(c, seed):
        generator = torch.Generator().manual_seed(seed)
        r = run("x", seed, row_std=(0, 0, 0), kappa_mode="learnable")
        for h in r["summary"]["heads"]:
            h["logit_std"] = math.exp(torch.randn((), generator=generator).item())
            noise = 0.01 * torch.randn((), generator=generator).item()
            h["entropy_ratio"] = 0.7 - 0.2 * math.log(h["logit_std"]) + c * h["l"] + noise
        return r

    for c, expected in ((0.1, HOLDS), (0.0, UNDECIDED)):
        runs = [planted(c, s) for s in range(12)]
        fit = l_regression(runs)
        assert fit["l"] == pytest.approx(c, abs=0.02)
        assert fit["low"] <= fit["l"] <= fit["high"]
        assert status(runs, "beyond the spread") == expected


def test_packed_records_are_small_and_come_back():
    runs = [
        run("19,shared,none", s, loss=4.1234567, initial=[{"l": 0, "row_std": 0.03, "predicted": 0.03}]) for s in (0, 1)
    ]
    for r in runs:
        for h in r["summary"]["heads"]:
            h.update(uniform=0.01234567, removed=-0.002)
            del h["label"]
    back = unpack(json.loads(pack("g", runs)))
    assert [r["summary"]["loss"] for r in back] == [4.1235, 4.1235]
    assert back[0]["summary"]["heads"][1] | {"uniform": 0.0123} == back[0]["summary"]["heads"][1]
    assert [{**r, "summary": r["summary"].keys()} for r in back] == [
        {**r, "summary": r["summary"].keys()} for r in runs
    ]
    assert unpack(json.loads(pack("g", back))) == back
    many = [{**runs[0], "cell": f"c{i % 200}", "seed": i} for i in range(600)]
    for r in many:
        r["summary"] = {**r["summary"], "heads": r["summary"]["heads"] * 5}
    assert len(pack("g", many)) < 600_000


def test_low_spin_heads_that_cost_something_are_not_useless():
    def with_cost(costs):
        runs = [run("19,shared,none", i) for i in range(len(costs))]
        for r, cost in zip(runs, costs, strict=True):
            for h in r["summary"]["heads"]:
                h["uniform"] = cost
        return runs

    assert status(with_cost([0.01, 0.011, 0.012]), "worth nothing") == FAILS
    assert status(with_cost([-0.01, -0.011, -0.012]), "worth nothing") == HOLDS
    assert status(with_cost([0.01, -0.011, 0.002]), "worth nothing") == UNDECIDED


def test_the_order_that_kappa_times_d_removes_is_no_effect_of_l():
    def ordered(shared, dim):
        return [run("19,shared,none", i, row_std=(0.03, 0.04, 0.03 + x)) for i, x in enumerate(shared)] + [
            run("19,dim,none", i, row_std=(0.03, 0.03, 0.03 + x)) for i, x in enumerate(dim)
        ]

    assert status(ordered([0.03, 0.031, 0.029], [0.0, 0.001, -0.001]), "l itself") == FAILS
    assert status(ordered([0.03, 0.031, 0.029], [0.03, 0.029, 0.031]), "l itself") == HOLDS


def test_no_runs_no_verdict():
    assert [v["claim"][:7] for v in verdicts([run("x", 0)])] == ["Heads o", "row_std"]


@pytest.mark.parametrize("name", ["seed-repro", "h1", "h2", "specs", "all"])
def test_grids_are_lists_of_valid_runs(name):
    from gauge_attn.models import build_model

    cells = grid.cells(name)
    assert len(cells) >= 2
    for config in cells.values():
        Irreps(config.model.spec)
        with torch.device("meta"):
            build_model(config.model, 16, 8, config.optim)
    listed = grid.run_grid(name, only_list=True)["runs"]
    assert len(set(listed)) == len(listed) >= 3 * len(cells)


def test_layouts_compare_equal_widths():
    for k in (19, 28, 41, 108):
        assert Irreps(grid_cells.LAYOUTS[str(k)]).dim == Irreps(grid_cells.LAYOUTS[f"{k}-scalars"]).dim == k
    assert Irreps(grid_cells.LAYOUTS["25-pure-tensors"]).dim == Irreps(grid_cells.LAYOUTS["25-scalars"]).dim
    assert {Irreps(config.model.spec).dim for config in grid.cells("h2").values()} == {19}


def test_an_unknown_grid_names_those_there_are():
    with pytest.raises(UserError, match=r"no grid 'h9'.*seed-repro"):
        grid.cells("h9")


def test_smoke_grid_runs_resumes_and_reports(tmp_path, monkeypatch):
    data = DataConfig(keys=4, window=8, batch=4, val_windows=8)
    tiny = {name: replace(config, data=data) for name, config in grid.cells("smoke").items()}
    monkeypatch.setattr(grid, "cells", lambda name: tiny)
    result = grid.run_grid("smoke", tmp_path, steps=3, workers=1)
    assert {r["cell"] for r in result["runs"]} == {"free", "aligned", "frozen"}
    assert result["verdicts"]
    assert all(f"[{v['status']}] {v['claim']}" in result["text"] for v in result["verdicts"])
    saved = unpack(json.loads((tmp_path / "results.json").read_text()))
    assert saved[0]["summary"]["noise"].keys() == {"0", "1"}
    assert saved[0]["summary"]["initial"]
    assert {"uniform", "removed", "row_std"} <= saved[0]["summary"]["heads"][0].keys()
    page = (tmp_path / "report.html").read_text()
    assert "Verdicts" in page
    assert "generated induction language" in page
    assert (tmp_path / "figures/predicted.csv").exists()
    monkeypatch.setattr(grid, "noise_control", None)  # a second training would fail on it
    again = grid.run_grid("smoke", tmp_path, steps=3, workers=1)
    assert again["runs"] == result["runs"]
    whole = (tmp_path / "results.json").read_bytes()
    (tmp_path / "runs/frozen-seed=0/result.json").unlink()
    with pytest.raises(UserError, match="other settings"):
        grid.run_grid("smoke", tmp_path, steps=4, only_done=True)
    part = grid.run_grid("smoke", tmp_path, steps=3, only_done=True)
    assert part["runs"] == [r for r in result["runs"] if r["cell"] != "frozen"]
    with pytest.raises(UserError, match="no finished run"):
        grid.run_grid("smoke", tmp_path / "elsewhere", steps=3, only_done=True)
    (tmp_path / "results.json").write_bytes(whole)
    copy = tmp_path / "collected"  # the report is made from the collected records alone
    copy.mkdir()
    (copy / "results.json").write_bytes((tmp_path / "results.json").read_bytes())
    write_report(copy)
    assert (copy / "report.html").read_text() == page


def test_runs_that_share_a_gpu_are_not_compiled(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("lab_shared.sweep.run_jobs", lambda jobs, *_, **__: asked.append(jobs) or {})
    for options in ({"gpus_per_job": 0.1}, {"gpus_per_job": 0.1, "compile": True}, {}):
        with pytest.raises(KeyError):  # there are no summaries
            grid.run_grid("smoke", tmp_path, **options)
    assert [jobs[0].kwargs["config"]["compile"] for jobs in asked] == [False, True, None]
