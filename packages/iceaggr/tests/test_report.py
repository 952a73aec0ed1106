"""`iceaggr report`: the page and its files."""

import csv
import json

import numpy as np
import pytest
from iceaggr.report import write_report
from iceaggr.report_text import predictor_means, predictor_table
from lab_shared.errors import UserError


@pytest.fixture
def run(tmp_path, predictions, isotropic):
    """A complete run folder."""
    folder = tmp_path / "quick-seed0"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": {"layers": 4, "dom_cap": None}, "seed": 0}))
    manifest = {"argv": ["iceaggr", "train", "quick", "--out", "a run"], "git_sha": "c0ffee", "processes": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    metrics = [
        {
            "step": s,
            "split": "train",
            "loss": 1 / s,
            "angle_deg": 90 - s,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "events_per_s": 9,
        }
        for s in range(1, 31)
    ]
    metrics.append({"step": 30, "split": "val", "angle_deg": 61.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    score = {
        "mean_deg": {"value": 51.94, "low": 51.04, "high": 52.84},
        "median_deg": 44.0,
        "p50": 44.0,
        "p90": 101.0,
    }
    evaluation = {
        "label": "simulated data",
        "n_events": 3000,
        "predictors": {"random": {"mean_deg": 90.0}, "line_fit": {"mean_deg": 64.4}, "model": score},
        "by": {
            "n_pulses": [
                {"bin": "< 48", "n": 1234, "mean_deg": 66.0},
                {"bin": "≥ 48", "n": 1766, "median_deg": 3.0},
            ]
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    np.savez(folder / "predictions.npz", **predictions)
    rng = np.random.default_rng(1)
    np.savez(
        folder / "display.npz",
        event_id=[24, 41],
        offsets=[0, 10, 15],
        x=rng.uniform(-500, 500, 15),
        y=rng.uniform(-500, 500, 15),
        z=rng.uniform(-500, 500, 15),
        time=rng.integers(9000, 12000, 15),
        charge=np.ones(15, dtype=np.float32),
        auxiliary=rng.random(15) < 0.5,
        true=isotropic(rng, 2),
        predicted=isotropic(rng, 2),
        kappa=[1.0, 2.0],
    )
    return folder


@pytest.mark.slow
def test_whole_report(run):
    (run / "analysis.html").write_text("made by `iceaggr analyze`")
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "Not shown" not in text
    row = next(line for line in text.split("<tr") if "<td>model</td>" in line)
    assert "51.9° [51.0, 52.8]" in row
    assert "simulated data" in row, "the label stands in the row of the number"
    assert 'class="mark"' in row
    assert "uv run iceaggr train quick --out &#x27;a run&#x27;" in text
    assert 'href="analysis.html"' in text
    assert "c0ffee" in text
    assert "model.dom_cap" in text
    assert text.count("Plotly.newPlot(") >= 2
    figures = {p.name for p in (run / "figures").iterdir()}
    names = {name.removesuffix(".csv") for name in figures if name.endswith(".csv")}
    assert {f"{name}.png" for name in names} | {"event_24.png", "event_41.png"} == {
        name for name in figures if name.endswith(".png")
    }
    for name in (
        "training_loss",
        "error_density",
        "resolution_energy",
        "sharpness",
        "sky_error",
        "zenith_response",
    ):
        assert name in names
    with open(run / "figures" / "training_angle_deg.csv") as f:
        rows = list(csv.DictReader(f))
    assert rows[-1] == {"step": "30", "split": "val", "angle_deg": "61.5"}
    assert len(rows) == 31


def test_table_of_predictors_has_names_and_no_level_in_degrees():
    """The summary of `iceaggr.metrics`, as evaluation.json has it."""
    figure = {"value": 60.0, "low": 50.0, "high": 70.0}
    scores = {name: {"n": 9, "level": 0.95, "mean_deg": figure, "p90": figure}
              for name in ("random", "linefit", "linefit_hlc", "linefit_all", "model")}  # fmt: skip
    heads, rows = predictor_table(scores, "simulated data")
    assert heads == ["predictor", "n", "mean", "p90", "on"]
    assert [row[0] for row in rows] == [
        "random direction", "line fit, all pulses", "line fit, HLC", "line fit, HLC within 1.5 us", "model"
    ]  # fmt: skip
    assert rows[-1][1:] == ["9", "60.0° [50.0, 70.0]", "60.0°", "simulated data"]
    assert predictor_means(scores)[-1] == "model 60.0°"


def test_events_are_pictures_where_plotly_is_missing(run, monkeypatch):
    monkeypatch.setattr("iceaggr.report.find_spec", lambda name: None)
    page = write_report(run).read_text()
    assert 'class="picture"' in page
    assert "Plotly" not in page
    assert "Drag to turn" not in page


def test_bare_run_says_what_is_missing(run):
    for name in ("manifest.json", "metrics.jsonl", "evaluation.json", "predictions.npz", "display.npz"):
        (run / name).unlink()
    text = write_report(run).read_text(encoding="utf-8")
    for name in ("manifest.json", "metrics.jsonl", "evaluation.json", "predictions.npz", "display.npz"):
        assert f"the run has no <code>{name}</code>" in text
    assert "simulated" not in text, "nothing says that it is"
    assert "the run has no <code>analysis.html</code> (run <code>iceaggr analyze</code>" in text
    assert list((run / "figures").iterdir()) == []


def test_optional_columns_drop_their_figures_only(run, predictions):
    kept = {k: v for k, v in predictions.items() if k not in ("kappa", "type", "energy", "linefit_error_deg")}
    np.savez(run / "predictions.npz", **kept)
    (run / "display.npz").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.5}\n{"step": 2, "sp')
    text = write_report(run).read_text(encoding="utf-8")
    assert "has no <code>kappa</code>" in text
    assert "by energy and by type" in text
    assert "no <code>linefit_error_deg</code>" in text
    assert "1 unreadable line(s)" in text
    assert "no line of <code>metrics.jsonl</code> has <code>lr</code>" in text
    names = {p.name for p in (run / "figures").iterdir()}
    assert {"training_loss.png", "error_density.csv", "resolution_n_pulses.csv"} <= names
    assert not names & {"sharpness.csv", "resolution_energy.csv", "error_by_type.csv", "training_lr.csv"}


def test_command_of_a_run_on_several_processes(run):
    for name in ("predictions.npz", "display.npz", "metrics.jsonl"):
        (run / name).unlink()
    manifest = {"argv": ["python", "-m", "iceaggr", "train", "small"], "processes": 4}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "uv run torchrun --nproc-per-node=4 -m iceaggr train small<" in write_report(run).read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", b"{", "evaluation.json is not valid JSON"),
        ("manifest.json", b"[]", "no JSON object"),
        ("evaluation.json", b'{"n_events": 1}', "lacks label, predictors"),
        ("predictions.npz", b"no zip", "predictions.npz is not a readable numpy"),
        ("predictions.npz", {"event_id": [1]}, "lacks azimuth"),
        (
            "predictions.npz",
            {"error_deg": np.full(3000, np.nan)},
            "error_deg is not a finite number for 3000 of 3000",
        ),
        ("predictions.npz", {"kappa": np.ones(5)}, r"kappa has shape \(5,\)"),
        ("display.npz", {"event_id": [1]}, "lacks offsets"),
    ],
)
def test_bad_files_are_named(run, predictions, name, content, message):
    if isinstance(content, bytes):
        (run / name).write_bytes(content)
    else:
        whole = {} if "event_id" in content else predictions
        np.savez(run / name, **(whole | content))
    with pytest.raises(UserError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        write_report(tmp_path)
