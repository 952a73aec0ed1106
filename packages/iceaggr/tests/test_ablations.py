"""Ablation studies: what they ask, their statistics, and a whole tiny one on simulated data."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from iceaggr.ablation_curves import by_variant, leaving_text, left_plateau, still_on_plateau
from iceaggr.ablation_report import collect, text
from iceaggr.ablation_runs import effective_rank, score_variant, train_variant
from iceaggr.ablation_stats import Contrast, contrasts, paired, verdicts
from iceaggr.ablations import Budget, Study, Variant, ablate, job_name, jobs, only_variants, settled, study
from iceaggr.cli import main
from iceaggr.config import STUDIES, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_parts
from iceaggr.models.build import build_model
from lab_shared.config import from_json
from lab_shared.errors import UserError

BUDGET = Budget(events=1000, held_out=100, epochs=2.0, seeds=(0, 1))
DATA = DataConfig(data="somewhere")


# --- what the studies are ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_studies_ask_about_rows_they_have_with_equal_budgets(name):
    of = study(name)
    for contrast in of.contrasts:
        assert {contrast.treated, contrast.control} <= of.variants.keys()
    configs = {n: settled(v, BUDGET, 1, DATA) for n, v in of.variants.items()}
    assert len({config.data.val_events for config in configs.values()}) == 1
    assert len({config.epochs for config in configs.values()}) == 1
    assert len({(config.tokens_per_batch, config.seed) for config in configs.values()}) == 1
    distinct = {json.dumps(job.kwargs, sort_keys=True) for job in jobs(of, BUDGET, DATA)}
    assert len(distinct) == len(jobs(of, BUDGET, DATA))
    for job in jobs(of, BUDGET, DATA):
        if "config" in job.kwargs:
            from_json(TrainConfig, json.dumps(job.kwargs["config"]))


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ("v1", 553_987),
        ("v2-linear-K16", 548_107),
        ("v2-mlp-K16", 564_619),
        ("v2-linear-K41", 608_395),
        ("v2-none-K41", 592_011),
        ("5M", 4_985_103),
        ("5M-less-data", 4_985_103),
    ],
)
def test_the_seed_table_has_the_seed_s_models(variant, parameters):
    """To the thousand that the seed gives: 554K, 548K, 565K, 608K, 592K, 5M."""
    model = build_model(study("seed-table").variants[variant].config.model)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_shares_of_the_events_and_the_seed_s_recipe():
    of = study("seed-table")
    assert settled(of.variants["5M-less-data"], BUDGET, 0, DATA).data.train_events == 77
    recipe = settled(of.variants["v1"], replace(BUDGET, recipe="seed"), 0, DATA).optim
    assert (recipe.optimizer, recipe.vmf_weight, recipe.rotate, recipe.schedule) == ("adamw", 0.0, False, "one_cycle")
    mixture = settled(study("v3").variants["mixture"], replace(BUDGET, recipe="seed"), 0, DATA).optim
    assert mixture.vmf_weight == 1


def test_smaller_batches_are_for_all_runs_of_a_study():
    variants = study("v3").variants.values()
    smaller = replace(BUDGET, tokens_per_batch=8192)
    assert {settled(v, smaller, 0, DATA).tokens_per_batch for v in variants} == {8192}
    assert {settled(v, BUDGET, 0, DATA).tokens_per_batch for v in variants} == {None}


def test_rotations_score_the_weights_that_are_there():
    listed = {job.name: job for job in jobs(study("v3"), BUDGET, DATA)}
    assert listed["tta-seed1"].needs == ("base-seed1",)
    assert listed["tta-seed1"].call is score_variant
    assert listed["all-seed1"].call is train_variant


def test_only_some_variants():
    of = only_variants(study("v3"), ["tta", "ema"])
    assert list(of.variants) == ["base", "ema", "tta"]
    assert {c.treated for c in of.contrasts} == {"tta", "ema"}
    with pytest.raises(UserError, match="no variant 'emma'"):
        only_variants(study("v3"), ["emma"])
    with pytest.raises(UserError, match="no study 'v4'"):
        study("v4")


def test_dry_run_lists_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "choices", "--dry-run", "--seeds", "5", "--json", "--events", "10"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "base-seed5" in listed["jobs"]
    assert listed["events_seen"] == 10 * 10 * 7
    assert not list(tmp_path.iterdir())


# --- statistics -------------------------------------------------------------------------------------


def noise(shift, *, seeds=3, n=400, spread=0.02, key=0):
    """(S, N) errors: a common part per event, a little noise per run, and each seed's own offset."""
    rng = np.random.default_rng([17, key])
    events = np.random.default_rng(9).uniform(10, 120, n)
    return events + shift + rng.normal(0, 2, (seeds, n)) + rng.normal(0, spread, (seeds, 1))


def test_paired_intervals_have_their_width_and_need_common_events():
    found = paired(noise(-1, key=1), noise(0, key=2))
    assert found["difference"] == pytest.approx(-1, abs=0.3)
    width = found["events_high"] - found["events_low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(2 * 2**2 / 3 / 400), rel=0.15)
    assert found["seeds_low"] < found["difference"] < found["seeds_high"]
    assert found["p"] < 0.001
    one = paired(noise(-1, seeds=1, key=1), noise(0, seeds=1, key=2))
    assert one["seeds_low"] is None
    with pytest.raises(UserError, match="not of the same runs"):
        paired(noise(0), noise(0, seeds=2))


def test_findings_need_both_kinds_of_evidence():
    errors = {
        "base": noise(0, key=1),
        "better": noise(-1, key=2),
        "worse": noise(1, key=3),
        "same": noise(0, key=4),
        "lucky": noise(-1, spread=3.0, key=5),
    }
    found = contrasts([Contrast(name, "base", name) for name in errors if name != "base"], errors)
    assert [c["finding"] for c in found] == ["lower", "higher", "not shown", "not shown"]
    assert found[3]["p_holm"] < 0.05, "over events alone the lucky seeds would have passed"
    alone = {name: x[:1] for name, x in errors.items()}
    (single,) = contrasts([Contrast("better", "base", "?")], alone)
    assert single["finding"] == "not shown", "one seed shows nothing"


def seed_table(shifts, *, seeds=3):
    of = study("seed-table")
    errors = {name: noise(shifts.get(name, 0), seeds=seeds, key=i) for i, name in enumerate(of.variants)}
    rank = {"head_rank": 200.0, "head_rank_untrained": 230.0, "head_rank_limit": 256}
    return {
        "label": "simulated data",
        "contrasts": contrasts(of.contrasts, errors),
        "rows": [{"name": name, **rank} for name in errors],
    }


def test_verdicts_follow_the_numbers():
    flat = verdicts(seed_table({}))
    assert [v["status"] for v in flat] == ["fails", "holds", "holds", "fails", "fails"]
    seed_was_right = verdicts(seed_table({"v1": 5, "5M-less-data": 1.2, "5M-head-128": 0.5}))
    assert [v["status"] for v in seed_was_right] == ["holds"] * 5
    worse = verdicts(seed_table({"v2-mlp-K16": 3, "v2-linear-K41": -3, "v2-none-K41": -3}))
    assert [v["status"] for v in worse[1:3]] == ["fails", "fails"]
    assert all("simulated data" in v["measured"] for v in flat)
    assert "untrained 230" in flat[4]["measured"]
    assert {v["status"] for v in verdicts(seed_table({"v1": 5}, seeds=1))} == {"undecided"}
    nothing = {"label": "simulated data", "contrasts": [], "rows": []}
    assert {v["status"] for v in verdicts(nothing)} == {"undecided"}


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.ones(5), torch.arange(1.0, 4))) == pytest.approx(1)
    p = np.array([3, 1]) / 4
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


# --- from files to the page -------------------------------------------------------------------------


def written_runs(out, of, budget, n=400):
    """The folders that the jobs of a study leave, with made-up errors."""
    rng = np.random.default_rng(0)
    ids = np.arange(n) * 7
    summaries = {"baselines": {"label": "simulated data", "device": "cpu", "n_events": n}}
    (out / "runs" / "baselines").mkdir(parents=True)
    baselines = {f"{x}_error_deg": rng.uniform(20, 160, n) for x in ("random", "linefit", "linefit_hlc", "linefit_all")}
    np.savez(out / "runs" / "baselines" / "errors.npz", event_id=ids, n_pulses=ids + 1, **baselines)
    for (i, name), seed in product(enumerate(of.variants), budget.seeds):
        folder = out / "runs" / job_name(name, seed)
        folder.mkdir()
        np.savez(folder / "errors.npz", event_id=ids, error_deg=noise(0.1 * i, n=n, seeds=1, key=10 * i + seed)[0])
        logged = [{"step": s, "split": "train", "angle_deg": 90.0 - s * i} for s in (2, 4, 8)]
        logged.append({"step": 8, "split": "val", "angle_deg": 0.0})
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)))
        summaries[job_name(name, seed)] = {
            "parameters": 1000 * (1 + i // 3), "train_events_per_s": None if seed else 1e5, "predict_events_per_s": 2e5,
            "head_rank": 5.0, "head_rank_untrained": 6.0, "head_rank_limit": 8,
        }  # fmt: skip
    return summaries


@pytest.mark.parametrize("name", ["seed-table", "scale"])
def test_collected_record_and_page(tmp_path, name):
    of = study(name)
    result = collect(of, BUDGET, tmp_path, written_runs(tmp_path, of, BUDGET))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [r["name"] for r in saved["rows"]] == list(of.variants)
    assert len(saved["contrasts"]) == len(of.contrasts)
    assert len(saved["verdicts"]) == (5 if name == "seed-table" else 0)
    assert text(saved) in result["text"]
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert list(by_variant(curves)) == list(of.variants)
    assert [run["seed"] for run in curves[:2]] == list(BUDGET.seeds)
    share = next(iter(of.variants.values())).share
    assert curves[0]["events"] == [round(share * part * 2000) for part in (0.25, 0.5, 1)]
    assert curves[-1]["angle_deg"] == [90 - step * (len(of.variants) - 1) for step in (2, 4, 8)]
    page = (tmp_path / "report.html").read_text()
    assert "simulated data" in page
    assert ">never / never</td>" in page
    assert "<svg" in page
    first = next(iter(of.variants))
    with np.load(tmp_path / "errors" / f"{first}.npz") as kept, np.load(tmp_path / "errors" / "events.npz") as events:
        assert kept["error_deg"].dtype == np.float16
        assert kept["error_deg"].shape == (2, events["event_id"].size)
        assert kept["error_deg"].mean() == pytest.approx(saved["rows"][0]["mean_deg"], abs=0.05)


def test_when_a_run_left_the_plateau():
    early, late, never = (
        {"events": [1000, 2000, 4000], "angle_deg": angles} for angles in ([90, 84.9, 60], [90, 85, 84], [90, 89, 85])
    )
    assert [left_plateau(run) for run in (early, late, never)] == [2000, 4000, None]
    assert [still_on_plateau(run, 0.5) for run in (early, late, never)] == [False, True, True]
    assert not still_on_plateau(late, 1)
    assert leaving_text([early, late, never]) == "2 / 4 / never"


def test_runs_scored_on_other_events_are_refused(tmp_path):
    of = study("choices")
    summaries = written_runs(tmp_path, of, BUDGET)
    odd = tmp_path / "runs" / job_name("zero-padding", 1) / "errors.npz"
    np.savez(odd, event_id=np.arange(400), error_deg=np.ones(400))
    with pytest.raises(UserError, match="zero-padding-seed1 was scored on other events"):
        collect(of, BUDGET, tmp_path, summaries)


@pytest.mark.slow
def test_a_whole_tiny_study_runs_once(tmp_path, capsys):
    """Simulated data: 60 held-out events say nothing about the models, only that the pieces fit."""
    base = TrainConfig(
        model=ModelConfig(slots=2, d_model=16, d_hidden=16, layers=1, heads=2, head_hidden=8),
        optim=OptimConfig(vmf_weight=1.0, rotate=True),
        tokens_per_batch=6000,
    )
    of = Study(
        "choices",
        {
            "base": Variant(base),
            "tta": Variant(with_parts(base, "tta"), scores="base"),
            "less": Variant(with_parts(base, "mixture", "ema"), share=0.5),
        },
        (Contrast("tta", "base", "turned"), Contrast("less", "base", "less data")),
    )
    budget = Budget(events=120, held_out=60, epochs=1.0, seeds=(0, 1), store=str(tmp_path / "store"))
    first = ablate(of, budget, tmp_path / "out")
    capsys.readouterr()
    again = ablate(of, budget, tmp_path / "out")
    assert "7 of 7 jobs are done already" in capsys.readouterr().err
    assert again == first
    rows = {r["name"]: r for r in first["rows"]}
    assert rows["less"]["events"] == 60
    assert rows["tta"]["train_events_per_s"] is None
    assert rows["tta"]["seed_means"] != rows["base"]["seed_means"]
    seen = [np.load(tmp_path / "out" / "runs" / f"{name}-seed0" / "train_event_ids.npy") for name in ("base", "less")]
    with np.load(tmp_path / "out" / "errors" / "events.npz") as events:
        assert events["event_id"].size == 60
        for ids in seen:
            assert not np.intersect1d(ids, events["event_id"]).size
    assert [ids.size for ids in seen] == [120, 60]


@pytest.mark.slow
def test_a_study_can_simulate_while_training(tmp_path):
    model = ModelConfig(slots=2, d_model=16, d_hidden=16, layers=1, heads=2, head_hidden=8)
    base = TrainConfig(model=model, tokens_per_batch=6000)
    wide = TrainConfig(model=replace(model, d_hidden=32), tokens_per_batch=6000)
    of = Study("choices", {"base": Variant(base), "wide": Variant(wide)}, (Contrast("wide", "base", "wider"),))
    budget = Budget(events=100, held_out=50, epochs=1.0, seeds=(0,), store=str(tmp_path / "store"), stream=True)
    result = ablate(of, budget, tmp_path / "out")
    assert result["budget"]["stream"]
    assert [row["seed_means"][0] > 0 for row in result["rows"]] == [True, True]
    assert not (tmp_path / "store").exists()
