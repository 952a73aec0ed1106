"""Analysis of a run from its folder, and the report of a matrix, on models that were never trained."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from attn_clustering import analyze, collect, report, report_data
from attn_clustering.cli import main
from attn_clustering.config import DataConfig, ModelConfig, OptimConfig, Recalibration
from attn_clustering.data.levels import FLOORS
from attn_clustering.data.settings import SMOKE
from attn_clustering.experiments import Experiment, phase2_config, run_config
from attn_clustering.head_picker import HeadMaps, picker
from attn_clustering.model import build_model
from attn_clustering.report_data import csv_text
from attn_clustering.runs import read_summary
from lab_shared.checkpoint import save_weights
from lab_shared.config import to_json
from lab_shared.errors import UserError

EXPERIMENT = Experiment(
    "tiny",
    ModelConfig(vocab=128, d_model=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp=48),
    DataConfig(replace(SMOKE, val_sequences=96)),
    OptimConfig(steps=10, batch=8),
    seeds=2,
    recals=(Recalibration(fraction=0.1),),
)

LEVELS = {"ln_vocab": 4.85, "bayes_floor": 2.0, "unigram_filter": 4.8}


def untrained(folder, config):
    """The files training would leave, with the weights of the start."""
    run = folder / config.name
    run.mkdir(parents=True)
    (run / "config.json").write_text(to_json(config))
    summary = {"name": config.name, "phase": config.phase, "val_loss": 4.9, "steps": config.optim.steps}
    if config.recal is not None:
        summary |= {"val_loss_at_start": 5.0, "val_loss_above_parent": 0.1, "recovered": False}
    (run / "DONE.json").write_text(json.dumps({"summary": summary}))
    lines = [{"step": step, "split": "val", "loss": 5.0 - 0.01 * step} for step in (0, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_weights(run / "weights.safetensors", build_model(config.model, config.seed))
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An analysed RoPE run and its DroPE run."""
    folder = tmp_path_factory.mktemp("pair")
    trained = run_config(EXPERIMENT, "gqa", "shuffled", 0)
    runs = [untrained(folder, config) for config in (trained, phase2_config(trained, EXPERIMENT.recals[0]))]
    return runs, [analyze.main(run, device="cpu") for run in runs]


def test_analysis_is_causal_and_complete(pair):
    (run, _), (result, _) = pair
    assert result["attention"]["mass_above_diagonal"] == 0
    assert len(result["probe"]["accuracy"]) == 3
    low, accuracy, high = (np.array(result["probe"][key]) for key in ("low", "accuracy", "high"))
    assert ((low <= accuracy) & (accuracy <= high)).all()
    assert result["probe"]["bayes"] > 0.9 > result["probe"]["token"]
    assert abs(result["attention"]["excess_lag"]) < 0.01  # untrained heads do not cluster
    assert result["ablation"]["random"]
    with np.load(run / "analysis" / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["excess_lag"].shape == (2, 2)
        assert arrays["example_pattern"].shape == (2, 2, 64, 64)
        assert (np.triu(arrays["example_pattern"][0, 0], 1) == 0).all()
        assert arrays["qk_singular_values"].shape == (2, 2, 16)
    assert json.loads((run / "analysis" / "analysis.json").read_text())["run"]["name"] == run.name


def test_probes_are_tried_on_the_model_after_drope(pair):
    _, (trained, dropped) = pair
    assert "transfer" not in trained["probe"]
    assert dropped["probe"]["transfer"][0] == pytest.approx(trained["probe"]["accuracy"][0])  # embeddings are equal
    assert dropped["run"]["phase"] == "drope"


def test_analysis_is_skipped_until_something_changes(pair, capsys):
    (run, _), (first, _) = pair
    file = run / "analysis" / "analysis.json"
    before = file.stat().st_mtime_ns
    again = analyze.main(run, device="cpu")
    assert file.stat().st_mtime_ns == before
    assert again == first
    assert main(["analyze", str(run), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {k: v for k, v in first.items() if k != "text"}
    file.write_text("{")
    with pytest.raises(UserError, match="delete it"):
        analyze.main(run, device="cpu")
    file.write_text(json.dumps({k: v for k, v in first.items() if k != "text"}))


def test_analysis_is_the_same_twice(pair):
    (run, _), (first, _) = pair
    model, config = analyze.load_run(run)
    result, _, _ = analyze.analyse(model, config, read_summary(run), analyze.AnalysisConfig())
    for part in ("probe", "attention", "ablation"):
        assert result[part] == first[part]


def test_a_collected_record_draws_the_same(pair, tmp_path):
    runs, _ = pair
    folder = runs[0].parent
    (folder / "experiment.json").write_text(to_json(EXPERIMENT))
    levels = {name: {"value": x, "se": 0.0} for name, x in LEVELS.items()}
    (folder / "levels.json").write_text(json.dumps(levels | {FLOORS: {"0": LEVELS["bayes_floor"]}}))
    assert "2 runs" in collect.collect(folder, tmp_path / "record")
    ours, theirs = (report_data.read_matrix(path) for path in (tmp_path / "record", folder))
    draw = [report_data.loss_rows, report_data.probe_rows, report_data.boundary_rows, report_data.before_after_rows]
    draw += [report_data.floor_rows, lambda files: report_data.seed_rows(files, "probe")]
    draw += [
        partial(lambda rows, files: rows(files, files.first_seed()), rows)
        for rows in (report_data.head_rows, report_data.entropy_rows, report_data.spectrum_rows)
    ]
    for rows in draw:
        assert csv_text(rows(ours)) == csv_text(rows(theirs))
    assert not list((tmp_path / "record").rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in (tmp_path / "record").rglob("*")) < 200_000
    assert report_data.floor_rows(ours)[0]["closed"] == pytest.approx((4.8 - 4.9) / (4.8 - 2.0))
    with pytest.raises(UserError, match="not empty"):
        collect.collect(folder, tmp_path / "record")


def test_runs_without_arrays_are_left_out_of_the_figures_that_need_them(pair, tmp_path, monkeypatch):
    """Analyses of two seeds of which the first has lost one run's arrays, and then of none with arrays."""
    runs, _ = pair
    (tmp_path / "experiment.json").write_text(to_json(replace(EXPERIMENT, attentions=("gqa",))))
    levels = {name: {"value": x, "se": 0.0} for name, x in LEVELS.items()}
    (tmp_path / "levels.json").write_text(json.dumps(levels | {FLOORS: {"0": 2.0, "1": 2.0}}))
    for seed in (0, 1):
        for run in runs:
            target = tmp_path / run.name.replace("-s0", f"-s{seed}")
            shutil.copytree(run, target)
            result = json.loads((run / "analysis" / "analysis.json").read_text())
            result["run"] |= {"seed": seed, "name": target.name}
            (target / "analysis" / "analysis.json").write_text(json.dumps(result))
    (tmp_path / runs[1].name / "analysis" / "arrays.npz").unlink()
    files = report_data.read_matrix(tmp_path)
    assert [r["run"]["seed"] for r in files.first_seed()] == [1, 1]
    assert {row["run"] for row in report_data.head_rows(files, files.with_arrays)} == set(files.arrays)
    assert {(row["phase"], row["seed"]) for row in report_data.boundary_rows(files)} == {
        ("rope", 0), ("rope", 1), ("drope", 1)
    }  # fmt: skip
    assert len(report_data.probe_rows(files)) == 4 * 3
    for stored in tmp_path.glob("*/analysis/arrays.npz"):
        stored.unlink()
    monkeypatch.setattr(report, "to_png", lambda figure: b"")
    monkeypatch.setattr(report.Page, "figure", lambda self, figure, caption, **_: self.text(caption))
    page = report.write(tmp_path).read_text()
    assert "Arrays of 4 of 4 analysed runs are not in this folder" in page
    assert "Accuracy by place" in page
    assert "QK and OV circuits" not in page
    assert not (tmp_path / "figures" / "boundary.png").exists()
    assert "4 runs" in collect.collect(tmp_path, tmp_path / "record")
    assert not list((tmp_path / "record").rglob("arrays.npz"))


def test_a_training_log_keeps_its_ends_and_all_validation_losses(tmp_path):
    lines = [{"step": step, "split": "train", "loss": 1.0} for step in range(1000)]
    lines += [{"step": step, "split": "val", "loss": 1.0} for step in range(0, 1000, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = collect._thinned(tmp_path)
    train = [line["step"] for line in kept if line["split"] == "train"]
    assert (train[0], train[-1], len(train)) == (0, 999, collect.TRAIN_LINES)
    assert len(kept) - len(train) == 100


def test_an_unfinished_run_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        analyze.main(tmp_path)
    with pytest.raises(UserError, match="no matrix"):
        report.write(tmp_path)


def test_picker_holds_every_head_and_no_script():
    rng = np.random.default_rng(0)
    runs = [
        HeadMaps(
            f"run <{i}>", rng.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8), rng.normal(size=(2, 3)), np.arange(8) // 4
        )
        for i in range(2)
    ]
    page = picker(runs, "score")
    assert page.count('type="radio" name="head0"') == 6
    assert page.count("data:image/png;base64,") == 2
    assert "run &lt;1&gt;" in page
    assert "<script" not in page
    assert page.count(" checked>") == 3  # one run, and in each run its best head


def test_csv_has_every_key_once():
    assert csv_text([{"a": 1, "b": 0.123456789}, {"a": "x,y", "c": None}]) == 'a,b,c\n1,0.123457,\n"x,y",,\n'


@pytest.mark.slow
def test_report_of_a_matrix(tmp_path, monkeypatch):
    model = replace(EXPERIMENT.model, layers=4)
    experiment = replace(EXPERIMENT, name="faithful-v1", model=model, attentions=("mha",))
    (tmp_path / "experiment.json").write_text(to_json(experiment))
    for seed in (0, 1):
        for ordering in ("shuffled", "topic_ordered"):
            trained = run_config(experiment, "mha", ordering, seed)
            for config in (trained, phase2_config(trained, experiment.recals[0])):
                run = untrained(tmp_path, config)
                model = build_model(config.model, hash_of(config.name))
                save_weights(run / "weights.safetensors", model)
                analyze.main(run, device="cpu")
    # Figures are made but not drawn, which takes long; test_matrix.py draws them.
    monkeypatch.setattr(report, "to_png", lambda figure: b"")
    monkeypatch.setattr(report.Page, "figure", lambda self, figure, caption, **_: self.text(caption))
    page = report.write(tmp_path).read_text()
    assert "undecided" in page
    assert "Acceptance bands" in page
    assert "4 of 4 of these models did not recover" in page
    for name in ("seeds", "loss", "probes", "boundary", "excess", "entropy", "recurrence", "drope", "spectra"):
        assert (tmp_path / "figures" / f"{name}.png").exists()
        assert len((tmp_path / "figures" / f"{name}.csv").read_text().splitlines()) > 1
    assert "secondary" in (tmp_path / "figures" / "comparisons.csv").read_text()
    assert report.write(tmp_path).read_text() == page  # that a figure is the same twice is tested in lab_shared


def hash_of(name):
    """A seed for the weights of one run."""
    return int(torch.tensor([ord(c) for c in name]).cumsum(0).sum()) % 1000
