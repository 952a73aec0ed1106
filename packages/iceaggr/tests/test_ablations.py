"""Ablation studies: what they ask, and a whole tiny one on simulated data."""

import json
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from iceaggr.ablation_curves import by_variant, leaving_text, left_plateau, still_on_plateau
from iceaggr.ablation_report import collect, text
from iceaggr.ablation_runs import score_baselines, score_variant, train_variant
from iceaggr.ablation_stats import Contrast
from iceaggr.ablations import Budget, Study, Variant, ablate, job_name, jobs, only_variants, settled, study
from iceaggr.cli import main
from iceaggr.config import STUDIES, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_parts
from iceaggr.models.build import build_model
from iceaggr.oracle import run as oracle
from iceaggr.train import ORACLE_EVENTS
from lab_shared.config import from_json
from lab_shared.errors import UserError

BUDGET = Budget(events=1000, held_out=100, epochs=2.0, seeds=(0, 1))
DATA = DataConfig(data="somewhere")


# --- what the studies are ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_studies_ask_about_rows_they_have_with_equal_budgets(name):
    of = study(name)
    configs = {n: settled(v, BUDGET, 1, DATA) for n, v in of.variants.items()}
    for contrast in of.contrasts:
        assert {contrast.treated, contrast.control} <= of.variants.keys()
        same = configs[contrast.treated].data.train_events == configs[contrast.control].data.train_events
        assert same == ("times the events" not in contrast.question), "equal budgets, or it is the question"
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
        np.savez(folder / "errors.npz", event_id=ids, error_deg=rng.uniform(10, 120, n) + 0.1 * i)
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


def test_the_oracle_stands_beside_the_baselines(tmp_path, monkeypatch):
    """Of the first events only, as many as a training's own table has."""
    monkeypatch.setitem(ORACLE_EVENTS, "cpu", 3)
    asked = []
    monkeypatch.setattr(oracle, "held_out_errors", lambda _, pulses, __: asked.append(pulses) or np.array([1, 2, 60.0]))
    data = DataConfig(data="stream", store=str(tmp_path), train_events=10, val_events=5)
    score_baselines(tmp_path, json.loads(json.dumps(asdict(data))))
    with np.load(tmp_path / "errors.npz") as kept:
        shared = dict(kept)
    assert asked[0].event_id_E.tolist() == shared["event_id"][:3].tolist()
    np.testing.assert_array_equal(shared["oracle_error_deg"], [1, 2, 60, np.nan, np.nan])

    of = study("choices")
    summaries = written_runs(tmp_path / "study", of, BUDGET)
    file = tmp_path / "study" / "runs" / "baselines" / "errors.npz"
    with np.load(file) as kept:
        np.savez(file, **kept, oracle_error_deg=np.where(kept["event_id"] < 21, 9.0, np.nan))
    result = collect(of, BUDGET, tmp_path / "study", summaries)
    found = result["baselines"][-1]
    assert (found["name"], found["mean_deg"], found["median_deg"]) == ("oracle, 3 of the events", 9, 9)
    assert "oracle, 3 of the events  9.00" in result["text"]


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
    # a GPU's and a CPU's held-out events have the same ids
    shared = tmp_path / "runs" / "baselines" / "errors.npz"
    with np.load(shared) as kept:
        np.savez(shared, **kept, true=np.eye(3)[kept["event_id"] % 3])
        np.savez(odd, event_id=kept["event_id"], error_deg=np.ones(400), true=np.eye(3)[(kept["event_id"] + 1) % 3])
    with pytest.raises(UserError, match="another kind of device"):
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
