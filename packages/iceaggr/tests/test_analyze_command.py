"""`iceaggr analyze` and `compare` on small runs."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from iceaggr import figures as report
from iceaggr.analysis import figures, output
from iceaggr.analysis.analyze import INSIDE
from iceaggr.analysis.sample import held_out_events
from iceaggr.cli import main
from iceaggr.config import DataConfig, ModelConfig, TrainConfig
from iceaggr.data.features import Tables
from iceaggr.data.kaggle import write_batch, write_meta
from iceaggr.data.prepare import folder_geometry, prepare, split
from iceaggr.data.schema import Events
from iceaggr.evaluate import remember_training_events, write_evaluation
from lab_shared.checkpoint import save_weights
from lab_shared.config import from_json, to_json
from lab_shared.page import Page
from lab_shared.plotting import to_png

UNPROJECTED = ModelConfig(slots=3, d_model=32, d_hidden=48, layers=3, heads=2, head_hidden=16, input="none")
SUMMARIES = replace(UNPROJECTED, arch="v1", input=ModelConfig.input, layers=2, features="summary")
T1T2 = ModelConfig(arch="hierarchical", d_model=32, d_hidden=48, layers=1, heads=2, head_hidden=16)


def write_folder(folder, pulses):
    ends = pulses.offsets_E1.numpy()
    write_batch(folder / "train" / "batch_1.parquet", pulses)
    meta = Events(pulses.event_id_E.numpy(), ends[:-1], ends[1:] - 1, pulses.azimuth_E.numpy(), pulses.zenith_E.numpy())
    write_meta(folder / "train_meta.parquet", {1: meta})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, make_pulses, awake):
    """A labelled folder, runs on it (v1 on summaries, v2 without projection, T1/T2), and a folder of other events."""
    root = tmp_path_factory.mktemp("analysis")
    counts = np.random.default_rng(8).integers(20, 80, 140)
    pulses = make_pulses(counts, seed=9, sensors=300)
    for name in ("data", "other"):
        (root / name / "train").mkdir(parents=True)
    write_folder(root / "data", pulses)
    write_folder(root / "other", replace(pulses, event_id_E=pulses.event_id_E + 1_000_000))
    data = DataConfig(data=str(root / "data"), store=str(root / "store"), val_events=60)
    for name, model_config in (("a", SUMMARIES), ("b", UNPROJECTED), ("c", T1T2)):
        config, run = TrainConfig(model=model_config, data=data), root / name
        run.mkdir()
        (run / "config.json").write_text(to_json(config))
        prepared = prepare(data, seed=0, device="cpu")
        model = awake(model_config, seed=1)
        save_weights(run / "weights.safetensors", model)
        train, held_out = split(prepared.cache, data)
        remember_training_events(run, prepared.cache.event_id[train])
        tables = Tables.of(folder_geometry(root / "data"), "cpu")
        write_evaluation(run, model, prepared.cache, held_out, config, tables, label=prepared.label)
    return root


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the drawing out, which takes longer than all the rest."""
    for module, names in (
        (figures, ("bars", "cumulatives", "heatmaps", "lines", "spectra")),
        (report, ("cumulative",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *args, **options: None)
    monkeypatch.setattr(output, "to_png", lambda figure: b"png")
    monkeypatch.setattr(Page, "figure", lambda *args, **options: None)


def run_json(argv, capsys):
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_analyze_draws(workshop, capsys):
    out = run_json(["analyze", str(workshop / "b"), "--device", "cpu"], capsys)
    for study in out["scalars"]:
        assert (workshop / "b" / "analysis" / f"{study}.png").read_bytes().startswith(b"\x89PNG"), study
    assert (workshop / "b" / "analysis.html").read_text().count("<svg") == len(out["scalars"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: figures.bars(["a", "b", "c"], x, "x", low=x - 0.1, high=x + 0.1),
        lambda x: figures.cumulatives(np.arange(3), {"one": x, "two": x / 2}),
        lambda x: figures.heatmaps({"t1": np.outer(x, x), "z": np.full((3, 3), np.nan)}, "rho", signed=True),
        lambda x: figures.lines(["input", "block 0", "end"], {"long": x, "short": x[:2]}, "y", reference=1),
        lambda x: figures.lines(list("abc"), {"y": x}, "y", errors={"y": x / 9}, log=True),
        lambda x: figures.spectra({"fc1": x[::-1]}, "s"),
    ],
    ids=["bars", "cumulatives", "heatmaps", "lines", "log lines", "spectra"],
)
def test_figures_can_be_drawn(draw):
    assert to_png(draw(np.array([0.2, 0.5, 1.0])), dpi=20).startswith(b"\x89PNG")


def test_curves_are_told_apart_without_their_colours():
    many = figures.lines(list("ab"), {name: np.ones(2) for name in "abcd"}, "y").axes[0]
    groups = np.repeat(["all", "cascade", "track"], 2)
    table = {"group": groups, **dict.fromkeys(("x", "median", "median_low", "median_high"), np.ones(6))}
    few = report.resolution_by_group(table, "x").axes[0]
    for ax, n in ((many, 4), (few, 3)):
        assert len({container[0].get_marker() for container in ax.containers}) == n


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("a", {"residual_scales", "padded_dimensions"}),
        ("b", {"feature_norms"}),
        ("c", {names[0] for names in INSIDE}),
    ],
)
def test_analyze_writes_arrays_tables_figures_and_a_page(workshop, name, absent, capsys):
    run = workshop / name
    out = run_json(["analyze", str(run), "--device", "cpu"], capsys)
    assert (out["n_events"], set(out["absent"])) == (60, absent)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert out["scalars"]["errors"]["mean (°)"] == pytest.approx(evaluation["predictors"]["model"]["mean_deg"]["value"])
    for study in out["scalars"]:
        for suffix in ("npz", "csv", "png"):
            assert (run / "analysis" / f"{study}.{suffix}").stat().st_size > 0, (study, suffix)
    page = (run / "analysis.html").read_text()
    assert page.count("Does not apply") == len(absent)
    assert "data of data" in page
    assert 'src="http' not in page
    if "head_specialisation" in absent:
        assert "HierarchicalTransformer" in out["absent"]["head_specialisation"]
        assert out["scalars"]["direction_head"]["effective rank of fc1"] > 1
        return
    with np.load(run / "analysis" / "head_specialisation.npz") as arrays:
        rho = arrays["rho_LHV"]
    rows = list(csv.DictReader((run / "analysis" / "head_specialisation.csv").read_text().splitlines()))
    np.testing.assert_allclose([float(row["z rho"]) for row in rows], rho[..., 1].ravel())
    kept = json.loads((run / "analysis.json").read_text())["tables"]["head_specialisation"]["by layer and head"]
    np.testing.assert_allclose(kept["z rho"], rho[..., 1].ravel(), rtol=1e-5)
    with np.load(run / "analysis" / "feature_permutation.npz") as arrays:
        increase = (arrays["permuted_error_deg"] - arrays["error_deg"]).mean(1)
    table = list(csv.DictReader((run / "analysis" / "feature_permutation.csv").read_text().splitlines()))
    np.testing.assert_allclose([float(row["increase"]) for row in table], increase)
    assert all(float(row["low"]) <= float(row["increase"]) <= float(row["high"]) for row in table)


@pytest.mark.usefixtures("undrawn")
def test_analyze_looks_at_unseen_events_only(workshop, capsys):
    run = str(workshop / "b")
    assert main(["analyze", run, "--data", str(workshop / "data")]) == 1
    assert "were trained on" in capsys.readouterr().err
    out = run_json(["analyze", run, "--data", str(workshop / "data"), "--drop-seen", "--events", "50"], capsys)
    assert out["n_events"] == 50
    config = from_json(TrainConfig, (workshop / "b" / "config.json").read_text())
    others = held_out_events(workshop / "b", config, torch.device("cpu"), data=workshop / "other", max_events=30)
    assert (others.index_N.size, others.label) == (30, "data of other")
    assert others.spread(7).tolist() == [0, 4, 8, 12, 17, 21, 25]
    out = run_json(["analyze", run, "--inside", "10", "--permuted", "5", "--device", "cpu"], capsys)
    assert (out["n_events"], out["sizes"]["inside"], out["sizes"]["permuted"]) == (60, 10, 5)
    assert main(["analyze", run, "--events", "40"]) == 0
    text = capsys.readouterr().out
    assert "40 held-out events" in text
    assert "Feature importance: column norms: does not apply, input = none" in text


@pytest.mark.usefixtures("undrawn")
def test_analyze_says_when_its_events_are_gone(workshop, tmp_path, capsys):
    config = json.loads((workshop / "b" / "config.json").read_text())
    for name in ("weights.safetensors", "train_event_ids.npy", "predictions.npz"):
        (tmp_path / name).write_bytes((workshop / "b" / name).read_bytes())
    config["data"]["data"] = str(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["analyze", str(tmp_path)]) == 1
    assert "give --data" in capsys.readouterr().err
    config["data"]["data"] = str(workshop / "data")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with np.load(tmp_path / "predictions.npz") as saved:
        moved = dict(saved)
    moved["zenith"] = moved["zenith"][::-1]
    np.savez(tmp_path / "predictions.npz", **moved)
    assert main(["analyze", str(tmp_path)]) == 1
    assert "not those of its predictions.npz" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_compare_puts_runs_side_by_side(workshop, tmp_path, capsys):
    a, b = workshop / "a", workshop / "b"
    for run in (a, b):
        run_json(["analyze", str(run), "--events", "30"], capsys)
    out = run_json(["compare", str(a), str(b), "--out", str(tmp_path / "c.html")], capsys)
    assert out == json.loads((tmp_path / "c.json").read_text()) | {"page": str(tmp_path / "c.html")}
    assert out["facts"]["arch"] == {"a": "v1", "b": "v2"}
    with np.load(a / "predictions.npz") as x, np.load(b / "predictions.npz") as y:
        difference = (y["error_deg"] - x["error_deg"]).mean()
    (paired,) = out["paired"]
    assert (paired["run"], paired["against"], paired["n"]) == ("b", "a", 60)
    assert paired["difference_deg"] == pytest.approx(difference)
    assert paired["low"] < paired["difference_deg"] < paired["high"]
    assert 0 < paired["p"] <= 1
    assert out["analysis"]["residual_scales"]["layer 0, scale_x"] == {"a": None, "b": 1.0}
    assert "v1" in out["analysis"]["residual_scales"]["does not apply"]["a"]
    page = (tmp_path / "c.html").read_text()
    assert "Paired difference" in page
    assert ">CLS self-attention</h2>" in page, "studies have their titles"
    assert "±: standard error over events." in page


@pytest.mark.usefixtures("undrawn")
def test_compare_pairs_only_the_same_events(workshop, tmp_path, capsys):
    other = tmp_path / "moved"
    other.mkdir()
    for name in ("config.json", "weights.safetensors", "evaluation.json"):
        (other / name).write_bytes((workshop / "a" / name).read_bytes())
    with np.load(workshop / "a" / "predictions.npz") as saved:
        moved = dict(saved)
    np.savez(other / "predictions.npz", **(moved | {"zenith": np.pi - moved["zenith"]}))
    out = run_json(["compare", str(workshop / "a"), str(other)], capsys)
    assert "two true directions" in out["paired"][0]["why_not"]
    assert out["not_analysed"] == ["moved"]
    np.savez(other / "predictions.npz", **(moved | {"event_id": moved["event_id"] + 10**6}))
    out = run_json(["compare", str(workshop / "a"), str(other)], capsys)
    assert out["paired"][0]["why_not"] == "too few events in common"
    assert main(["compare", str(workshop / "a")]) == 1
    assert "at least two" in capsys.readouterr().err
