"""What comes out for real files: submissions of folders without angles, sky maps, displays, plans."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from iceaggr.calibrate import CALIBRATION
from iceaggr.cli import main
from iceaggr.config import ModelConfig, TrainConfig
from iceaggr.data.kaggle import KaggleFolder, write_batch, write_meta
from iceaggr.data.schema import Events
from iceaggr.geometry import icecube86, write_geometry_csv
from iceaggr.models.build import build_model
from iceaggr.plan import host_bytes_per_event, plan
from iceaggr.predict import display_event
from iceaggr.submission import SubmissionError, angle_text, check_sample, check_submission
from lab_shared.checkpoint import save_weights
from lab_shared.config import to_json
from lab_shared.errors import UserError

TINY = ModelConfig(features="summary", d_model=16, d_hidden=16, layers=1, heads=2, head_hidden=8)


def write_split(folder, split, batches):
    """Batch files and meta table of {batch: Pulses}, labelled if the pulses are."""
    events = {}
    for batch, pulses in batches.items():
        write_batch(folder / split / f"batch_{batch}.parquet", pulses)
        angles = (None if x is None else x.numpy() for x in (pulses.azimuth_E, pulses.zenith_E))
        ends = pulses.offsets_E1.numpy()
        events[batch] = Events(pulses.event_id_E.numpy(), ends[:-1], ends[1:] - 1, *angles)
    write_meta(folder / f"{split}_meta.parquet", events)


@pytest.fixture
def folder(tmp_path, make_pulses):
    """Two unlabelled test batches with a sample submission, and a labelled training batch of other events."""
    batches = {661: make_pulses([30, 8, 200], labelled=False), 662: make_pulses([40, 25], seed=1, labelled=False)}
    batches[662] = replace(batches[662], event_id_E=torch.tensor([5_000, 5_001]))
    write_split(tmp_path / "kaggle", "test", batches)
    write_split(tmp_path / "kaggle", "train", {1: make_pulses([50, 60], seed=2)})
    ids = torch.cat([p.event_id_E for p in batches.values()]).numpy()
    sample = pl.DataFrame({"event_id": ids, "azimuth": np.ones(5), "zenith": np.ones(5)})
    sample.write_parquet(tmp_path / "kaggle" / "sample_submission.parquet")
    return tmp_path / "kaggle"


@pytest.fixture(params=[1, 2], ids=["single", "mixture"])
def run(tmp_path, request):
    """An untrained run, of one and of two components."""
    config = TrainConfig(model=replace(TINY, head_mixture=request.param))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    torch.manual_seed(0)
    save_weights(tmp_path / "run" / "weights.safetensors", build_model(config.model))
    return tmp_path / "run"


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_predict_takes_the_test_split_and_passes_the_check(run, folder, tmp_path, capsys):
    out = tmp_path / "submission.csv"
    command = ["predict", str(run), "--data", str(folder), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--strict"]) == 0
    ids = [1000, 1007, 1014, 5000, 5001]
    assert check_submission(out, ids) == 5
    assert "no calibration.json" in capsys.readouterr().err
    assert main([*command, "--split", "train"]) == 0
    assert [row["event_id"] for row in rows(out)] == ["1000", "1007"]


@pytest.mark.slow
def test_predict_applies_the_temperature(run, folder, tmp_path, capsys):
    out = tmp_path / "submission.csv"
    command = ["predict", str(run), "--data", str(folder), "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    raw = rows(out)
    one = {"temperature": 4.0, "level_edges": [], "nominal_levels": [np.linspace(0, 1, 101).tolist()]}
    (run / CALIBRATION).write_text(json.dumps(one | {"mixture": one}))
    assert main(command) == 0
    assert "divided by the temperature 4.000" in capsys.readouterr().err
    for before, after in zip(raw, rows(out), strict=True):
        assert float(before["kappa"]) == pytest.approx(4 * float(after["kappa"]))
        assert before["azimuth"] == after["azimuth"]
    assert main(["skymap", str(run), "--data", str(folder), "--event", "1000", "--out", str(tmp_path / "s.png"),
                 "--json", "--device", "cpu"]) == 0  # fmt: skip
    sky = json.loads(capsys.readouterr().out)
    assert "temperature 4.000" in sky["calibration"]
    assert sky["event_id"] == 1000
    assert (tmp_path / "s.png").exists()


def test_a_prediction_that_fails_leaves_nothing(run, folder, tmp_path):
    batch = sorted((folder / "test").glob("batch_*.parquet"))[-1]
    batch.write_bytes(batch.read_bytes()[:-50])
    command = ["predict", str(run), "--data", str(folder), "--device", "cpu", "--out", str(tmp_path / "out" / "a.csv")]
    assert main(command) == 1
    assert not list((tmp_path / "out").iterdir())


def test_display_looks_at_the_array_the_run_was_given(run, folder, tmp_path, monkeypatch):
    lifted = replace(icecube86(), xyz=icecube86().xyz + (0, 0, 100))
    write_geometry_csv(tmp_path / "lifted.csv", lifted)
    config = json.loads((run / "config.json").read_text())
    config["data"]["geometry"] = str(tmp_path / "lifted.csv")
    (run / "config.json").write_text(json.dumps(config))
    seen = []
    monkeypatch.setattr("iceaggr.display.write_display", lambda path, event, xyz, label: seen.append((event, xyz)))
    display_event(folder, 1007, tmp_path / "event.png", run_dir=run, device="cpu")
    event, xyz = seen[0]
    assert np.array_equal(xyz, lifted.xyz)
    assert event.predicted is not None


def test_display_as_a_still(folder, tmp_path):
    command = ["display", str(folder), "--event", "1007", "--out"]
    assert main([*command, str(tmp_path / "event.png")]) == 0
    assert (tmp_path / "event.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, str(tmp_path / "event.gif")]) == 1


def test_a_sample_that_names_other_events(folder):
    source = KaggleFolder(folder, "test")
    check_sample(source, np.array([5001, 5000, 1000, 1007, 1014]))
    with pytest.raises(SubmissionError, match="batch files lack event 1014"):
        check_sample(source, np.array([5001, 5000, 1000, 1007]))
    check_sample(KaggleFolder(folder, "train"), np.array([1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event_id,zenith,azimuth\n7,1,1\n8,1,1\n", "columns event_id, zenith, azimuth"),
        ("event_id,azimuth,zenith,kappa\n7,1,1,2\n8,1,1,2\n", "kappa; need event_id"),
        ("", "columns none"),
        ("event_id,azimuth,zenith\n7,1,1\n", "row 2: missing; event 8"),
        ("event_id,azimuth,zenith\n8,1,1\n7,1,1\n", "row 1: event_id 8, where event 7"),
        ("event_id,azimuth,zenith\n7,1,1\n7,1,1\n", "row 2: event_id 7, where event 8"),
        ("event_id,azimuth,zenith\n7,1,1\n8,1,1\n9,1,1\n", "row 3: 9,1,1 is one row too many"),
        ("event_id,azimuth,zenith\n7,nan,1\n8,1,1\n", r"azimuth nan of event 7 is not in \[0, 2 pi\)"),
        ("event_id,azimuth,zenith\n7,6.2831854,1\n8,1,1\n", "azimuth 6.2831854"),
        ("event_id,azimuth,zenith\n7,1,3.1415927\n8,1,1\n", "zenith 3.1415927"),
        ("event_id,azimuth,zenith\n7,1\n8,1,1\n", "row 1: 7,1 is not an id"),
        ("event_id,azimuth,zenith\n7.5,1,1\n8,1,1\n", "is not an id and two numbers"),
    ],
)
def test_what_the_competition_would_refuse(tmp_path, text, message):
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(SubmissionError, match=message):
        check_submission(path, [7, 8])


def test_extra_columns_only_when_not_strict(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("event_id,azimuth,zenith,kappa\n7,1,1,2\n8,0,0,2\n")
    assert check_submission(path, [7, 8], strict=False) == 2


def test_angles_never_round_out_of_range():
    edge = np.array([np.nextafter(2 * np.pi, 0), np.pi, 0.0, 1e-300])
    numbers = [float(text) for text in angle_text(edge)]
    assert numbers[0] < 2 * math.pi
    assert numbers[1] <= math.pi
    np.testing.assert_allclose(numbers, edge, atol=1.1e-9)


@pytest.fixture
def record(tmp_path):
    rows = [
        {"stage": "train 5M", "events_per_s": 1000.0, "peak_memory_gb": 3.0},
        {"stage": "cache", "events_per_s": 1.0, "last": {"bytes_per_pulse": 6.0, "gather_packed_events_per_s": 800.0}},
        {"stage": "build store", "events_per_s": 50.0},
    ]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"environment": {"device": "a GPU"}, "rows": rows}))
    return path


def test_plan_is_arithmetic_on_the_record(record, capsys, monkeypatch):
    monkeypatch.setattr("iceaggr.plan.host_bytes_per_event", lambda: 100.0)
    result = plan(8000, epochs=3, record=record)
    assert result["time"] == {
        "build_store_s": 160.0,
        "epoch_s": 10.0,
        "training_s": 30.0,
        "reading_events_per_s": 800.0,
    }
    assert result["disk"]["store_bytes"] == pytest.approx(8000 * 164.4 * 6)
    assert result["memory"]["host_bytes_per_process"] == 800_000
    assert result["memory"]["gpu_peak_bytes"] == 3e9
    assert "limited by reading" in result["text"]
    assert "upper bound, not measured" in plan(8000, gpus=2, record=record)["text"]
    assert main(["plan", "--events", "1000", "--json"]) == 0, "the package's own record"
    assert json.loads(capsys.readouterr().out)["events"] == 1000
    for bad, message in (({"preset": "6M"}, "no preset"), ({"preset": "small"}, "no stage 'train small'"),
                         ({"record": record.parent / "none.json"}, "is no record")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            plan(1, **{"record": record, **bad})


def test_the_document_of_the_full_data_set_says_what_the_plan_does(monkeypatch):
    monkeypatch.setattr("iceaggr.plan.host_bytes_per_event", lambda: 100.0)
    document = (Path(__file__).parents[1] / "FULL_DATASET.md").read_text()
    blocks = re.findall(r"```text\n(.*?)```", document, re.DOTALL)
    for gpus, block in zip((1, 2), blocks, strict=True):
        assert set(block.splitlines()) <= set(plan(131_953_924, gpus=gpus)["text"].splitlines())


def test_plan_from_a_run_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("iceaggr.plan.host_bytes_per_event", lambda: 100.0)
    (tmp_path / "config.json").write_text(to_json(TrainConfig()))
    (tmp_path / "manifest.json").write_text('{"processes": 2}')
    lines = [{"step": i, "split": "train", "events_per_s": 10.0 if i < 2 else 500.0} for i in range(10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = plan(1000, gpus=2, record=tmp_path)
    assert result["speed"]["events_per_s"] == 500
    assert result["speed"]["scaling_measured"]
    assert result["preset"] == "small"
    assert plan(1000, record=tmp_path)["gpus"] == 2
    with pytest.raises(UserError, match="ran on 2 processes"):
        plan(1000, gpus=1, record=tmp_path)


@pytest.mark.slow
def test_memory_of_a_process_grows_by_some_tens_of_bytes_an_event():
    assert 10 < host_bytes_per_event() < 500
