"""iceaggr.report and the columns behind its figures."""

import csv
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from iceaggr import summaries
from iceaggr.report import write_report
from lab_shared.errors import UserError

N = 3000


def directions(rng, n):
    vectors = rng.normal(size=(n, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def angle(a, b):
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(axis=1)))


@pytest.fixture
def predictions():
    """N events of a predictor that is better where kappa is large, and of a worse one beside it."""
    rng = np.random.default_rng(0)
    true, kappa = directions(rng, N), np.exp(rng.normal(0.5, 1.0, N))
    predicted = true * kappa[:, None] + rng.normal(size=(N, 3))
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    line_fit = directions(rng, N)
    return {
        "event_id": np.arange(N),
        "azimuth": np.arctan2(true[:, 1], true[:, 0]) % (2 * np.pi),
        "zenith": np.arccos(true[:, 2]),
        "pred_azimuth": np.arctan2(predicted[:, 1], predicted[:, 0]) % (2 * np.pi),
        "pred_zenith": np.arccos(predicted[:, 2]),
        "kappa": kappa,
        "n_pulses": rng.integers(20, 400, N),
        "error_deg": angle(true, predicted),
        "linefit_error_deg": angle(true, line_fit),
        "type": rng.integers(0, 2, N),
        "energy": 10 ** rng.uniform(2, 6, N),
    }


@pytest.fixture
def run(tmp_path, predictions):
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
        "n_events": N,
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
        true=directions(rng, 2),
        predicted=directions(rng, 2),
        kappa=[1.0, 2.0],
    )
    return folder


@pytest.mark.slow
def test_whole_report(run):
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    assert "Not shown" not in text
    row = next(line for line in text.split("<tr") if "<td>model</td>" in line)
    assert "51.9° [51.0, 52.8]" in row
    assert "simulated data" in row, "the label stands in the row of the number"
    assert 'class="mark"' in row
    assert "uv run iceaggr train quick --out &#x27;a run&#x27;" in text
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
            {"error_deg": np.full(N, np.nan)},
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


errors = arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 180))


@given(errors)
@settings(max_examples=50)
def test_error_distribution_is_a_distribution(error):
    columns = summaries.error_distribution({"model": error})
    width = columns["high_deg"] - columns["low_deg"]
    assert np.isclose((columns["model density"] * width).sum(), 1)
    assert np.isclose((columns["random density"] * width).sum(), 1)
    naive = [(error < high).mean() if high < 180 else 1.0 for high in columns["high_deg"]]
    np.testing.assert_allclose(columns["model cumulative"], naive, atol=1e-12)


def test_random_law_matches_random_directions():
    rng = np.random.default_rng(2)
    columns = summaries.error_distribution({"model": angle(directions(rng, 50_000), directions(rng, 50_000))})
    np.testing.assert_allclose(columns["model cumulative"], columns["random cumulative"], atol=0.01)


@given(arrays(np.int64, st.integers(1, 200), elements=st.integers(5, 40)))
@settings(max_examples=50)
def test_quantile_edges_hold_every_value(x):
    edges = summaries.quantile_edges(x, (0, 0.25, 0.5, 0.9, 1))
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= x.min()
    assert x.max() <= edges[-1]


def test_resolution_matches_a_loop():
    rng = np.random.default_rng(3)
    x, error = rng.integers(0, 51, 500), rng.uniform(0, 180, 500)
    edges = np.array([0.0, 10, 11, 30, 50])
    columns = summaries.resolution(x, {"model": error}, edges)
    row = 0
    for low, high in itertools.pairwise(edges):
        members = [e for v, e in zip(x, error, strict=True) if low <= v < high or v == high == 50]
        if len(members) < summaries.MIN_EVENTS:
            continue
        assert (columns["low"][row], columns["high"][row], columns["events"][row]) == (
            low,
            high,
            len(members),
        )
        assert columns["model median"][row] == np.median(members)
        assert columns["model p16"][row] == np.quantile(members, 0.16)
        row += 1
    assert row == len(columns["x"]) == 3, "the narrow bin has too few events"


def test_sharpness_matches_a_loop(predictions):
    error, kappa = predictions["error_deg"], predictions["kappa"]
    columns = summaries.sharpness(kappa, {"model": error, "line fit": predictions["linefit_error_deg"]}, steps=7)
    ranked = sorted(range(N), key=lambda i: -kappa[i])
    for i, fraction in enumerate(columns["fraction"]):
        kept = ranked[: round(fraction * N)]
        assert np.isclose(columns["model"][i], np.mean(error[kept]))
        assert np.isclose(columns["line fit"][i], np.mean(predictions["linefit_error_deg"][kept]))
        assert columns["kappa"][i] == kappa[kept].min()
    assert (columns["ideal"] <= columns["model"] + 1e-9).all()
    assert np.isclose(columns["ideal"][-1], columns["model"][-1])


def test_sky_matches_a_loop(predictions):
    p = predictions
    columns = summaries.sky(p["azimuth"], p["zenith"], p["error_deg"], p["pred_zenith"])
    assert columns["events"].sum() == N
    azimuth, cos_zenith = np.degrees(p["azimuth"]), np.cos(p["zenith"])
    for i in range(0, len(columns["events"]), 7):
        inside = (azimuth >= columns["azimuth_low_deg"][i]) & (azimuth < columns["azimuth_high_deg"][i])
        inside &= (cos_zenith >= columns["cos_zenith_low"][i]) & (cos_zenith < columns["cos_zenith_high"][i])
        assert columns["events"][i] == inside.sum()
        if inside.sum() >= summaries.MIN_EVENTS:
            assert np.isclose(columns["mean error"][i], p["error_deg"][inside].mean())
            bias = np.degrees((p["pred_zenith"] - p["zenith"])[inside].mean())
            assert np.isclose(columns["zenith bias"][i], bias)
        else:
            assert np.isnan(columns["mean error"][i])


def test_sky_takes_the_poles_and_the_seam():
    azimuth = np.array([0.0, 2 * np.pi, -1e-18, np.pi])
    columns = summaries.sky(azimuth, np.array([0.0, np.pi, np.pi / 2, 0.0]), np.ones(4), np.ones(4))
    assert columns["events"].sum() == 4


def test_zenith_response_of_a_blind_and_of_a_perfect_predictor():
    rng = np.random.default_rng(4)
    zenith, blind = np.arccos(rng.uniform(-1, 1, (2, 60_000)))
    density = summaries.zenith_response(zenith, blind, bins=10)["density"]
    np.testing.assert_allclose(density, 0.5, atol=0.06)
    columns = summaries.zenith_response(zenith, zenith, bins=10)
    np.testing.assert_allclose(columns["density"].reshape(10, 10), 5 * np.eye(10))
    assert np.abs(summaries.zenith_bias(zenith, zenith)["model bias"]).max() == 0


def test_zenith_bias_sign_and_error():
    zenith = np.full(100, 2.0)
    up = np.arccos(np.cos(2.0) + np.tile([0.1, 0.3], 50))
    columns = summaries.zenith_bias(zenith, up)
    np.testing.assert_allclose(columns["model bias"], [0.2])
    np.testing.assert_allclose(columns["model standard error"], [0.1 * np.sqrt(100 / 99) / 10])


@given(arrays(np.float64, st.integers(1, 150), elements=st.floats(-1e3, 1e3)))
@settings(max_examples=50)
def test_smooth_matches_a_loop(values):
    reach = max(1, len(values) // 50)
    naive = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(summaries.smooth(values), naive, atol=1e-7)
