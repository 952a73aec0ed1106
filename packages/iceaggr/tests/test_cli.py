"""The commands as a user types them, on a small simulated folder, with the fixed exit codes and --json."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from iceaggr.cli import main

TINY = [
    "quick", "--epochs", "1", "--model.d-model", "16", "--model.d-hidden", "32", "--model.layers", "1",
    "--model.heads", "2", "--model.head-hidden", "16", "--data.val-events", "100", "--tokens-per-batch", "2048",
    "--checkpoint-every", "4", "--eval-every", "4", "--log-every", "2", "--wandb", "disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A training folder, another with other events, and a finished tiny run."""
    root = tmp_path_factory.mktemp("cli")
    for name, events, seed in (("train", 500, 1), ("other", 120, 2)):
        assert main(["simulate", "--out", str(root / name), "--events", str(events), "--seed", str(seed)]) == 0
    store = ["--data.store", str(root / "store")]
    assert main(["train", *TINY, *store, "--data", str(root / "train"), "--out", str(root / "run")]) == 0
    return root


def test_simulate_writes_a_kaggle_folder(folders):
    names = {str(p.relative_to(folders / "train")) for p in (folders / "train").rglob("*") if p.is_file()}
    assert {"train/batch_1.parquet", "train_meta.parquet", "sensor_geometry.csv", "truth.parquet"} <= names


def test_inspect_json_is_one_object_on_stdout(folders, capsys):
    capsys.readouterr()
    assert main(["inspect", str(folders / "train"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_events"] == 500


def test_cache_reports_bytes_per_pulse(folders, tmp_path, capsys):
    capsys.readouterr()
    assert main(["cache", str(folders / "train"), "--out", str(tmp_path / "c"), "--verify", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["events"] == 500
    assert out["bytes_per_pulse"] <= 8


def test_the_run_folder_tells_the_whole_story(folders):
    run = folders / "run"
    for name in ("config.json", "manifest.json", "metrics.jsonl", "weights.safetensors", "evaluation.json",
                 "predictions.npz", "display.npz", "report.html", "DONE.json", "train_event_ids.npy"):  # fmt: skip
        assert (run / name).exists(), name
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["label"] == "simulated data"
    assert set(evaluation["predictors"]) == {"random", "linefit", "linefit_hlc", "linefit_all", "model"}
    assert evaluation["predictors"]["random"]["mean_deg"]["value"] == pytest.approx(90, abs=15)


def test_held_out_events_were_not_trained_on(folders):
    trained = np.load(folders / "run" / "train_event_ids.npy")
    with np.load(folders / "run" / "predictions.npz") as held_out:
        assert not np.intersect1d(trained, held_out["event_id"]).size
        assert held_out["event_id"].size == 100
    assert trained.size == 400


def test_evaluate_on_other_events(folders, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(folders / "run"), "--data", str(folders / "other"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["n_events"] == 120
    assert out["label"] == "simulated data"


def test_evaluate_refuses_events_it_was_trained_on(folders, capsys):
    assert main(["evaluate", str(folders / "run"), "--data", str(folders / "train")]) == 1
    assert "were trained on" in capsys.readouterr().err
    assert main(["evaluate", str(folders / "run"), "--data", str(folders / "train"), "--drop-seen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_events"] == 100


@pytest.mark.parametrize("strict", [False, True])
def test_predict_writes_a_submission(folders, tmp_path, strict):
    out = tmp_path / "submission.csv"
    flags = ["--strict"] if strict else []
    assert main(["predict", str(folders / "run"), "--data", str(folders / "other"), "--out", str(out), *flags]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["event_id", "azimuth", "zenith"] + ([] if strict else ["kappa"])
    assert len({row["event_id"] for row in rows}) == 120
    assert all(0 <= float(r["azimuth"]) < 2 * np.pi and 0 <= float(r["zenith"]) <= np.pi for r in rows)


@pytest.mark.slow
def test_report_and_display_are_self_contained_pages(folders, tmp_path):
    assert main(["report", str(folders / "run")]) == 0
    with np.load(folders / "run" / "predictions.npz") as arrays:
        event = str(arrays["event_id"][0])
    out = tmp_path / "event.html"
    assert (
        main(
            [
                "display",
                str(folders / "train"),
                "--event",
                event,
                "--out",
                str(out),
                "--model",
                str(folders / "run"),
            ]
        )
        == 0
    )
    for page in (folders / "run" / "report.html", out):
        text = page.read_text()
        assert 'src="http' not in text
        assert "simulated" in text or page == out


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["train", "nonsense"], 2, "no preset 'nonsense'"),
        (
            ["train", "quick", "--seed", "3000000000", "--dry-run"],
            1,
            "seed: expected a whole number from 0 to 2147483647",
        ),
        (["train", "quick", "--optim.lrr", "1"], 2, "lrr"),
        (["train", "--resume", "X", "--seed", "1"], 2, "--resume takes no other option"),
        (["simulate", "--out", "X", "--events", "-3"], 2, "not a positive whole number"),
        (["inspect", "/nonexistent"], 1, "/nonexistent"),
        (["evaluate", "/nonexistent", "--data", "/nonexistent"], 1, "no finished run"),
        (["train", "--resume", "/nonexistent"], 1, "/nonexistent"),
        (["train", "quick", "--data", "/nonexistent", "--out", "{tmp}/r"], 1, "/nonexistent"),
    ],
)
def test_mistakes_exit_with_their_code_and_name_the_value(argv, code, says, capfd, tmp_path):
    argv = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    try:
        got = main(argv)
    except SystemExit as stop:
        got = stop.code
    assert got == code
    assert says in capfd.readouterr().err


def test_help_answers_at_once():
    argv = [sys.executable, "-m", "iceaggr", "--help"]
    subprocess.run(argv, check=True, capture_output=True)
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run(argv, check=True, capture_output=True)
        after = os.times()  # processor time: the wall's depends on what else runs
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(folders, tmp_path):
    def argv(out):
        flags = ["--epochs", "3", "--checkpoint-every", "3", "--data.store", str(folders / "store")]
        paths = ["--data", str(folders / "train"), "--out", str(out)]
        return [sys.executable, "-m", "iceaggr", "train", *TINY, *flags, *paths]

    whole = subprocess.run(argv(tmp_path / "whole"), capture_output=True, text=True, timeout=300, check=False)
    assert whole.returncode == 0, whole.stderr
    checkpoints = tmp_path / "part" / "checkpoints"
    deadline = time.monotonic() + 120
    with subprocess.Popen(argv(tmp_path / "part"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as part:
        while not list(checkpoints.glob("step_*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.005)
        part.kill()
    assert not (tmp_path / "part" / "DONE.json").exists()
    assert main(["train", "--resume", str(tmp_path / "part")]) == 0
    for name in ("weights.safetensors", "evaluation.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_train_under_torchrun(folders, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "iceaggr",
            "train", *TINY, "--data.store", str(folders / "store"), "--data", str(folders / "train"),
            "--out", str(tmp_path / "run")]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out events (simulated data)") == 1
    assert (tmp_path / "run" / "DONE.json").exists()


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["simulate", "--out", "{tmp}/s", "--events", "3", "--device", "tpu"], 1, "--device tpu"),
        (["simulate", "--out", "{tmp}/s", "--events", "3", "--device", "tpu", "--shards", "1"], 1, "--device tpu"),
        (["oracle", "--device", "tpu"], 1, "--device tpu"),
        (["oracle", "--seed", "-1"], 1, "seed -1"),
        (["oracle", "--scan", "-3"], 2, "-3 is not"),
        (["evaluate", "{run}", "--oracle", "-1"], 2, "-1 is not"),
        (["evaluate", "{run}", "--drop-seen"], 1, "--data DIR"),
        (["analyze", "{run}", "--drop-seen"], 1, "--data DIR"),
        (["analyze", "{run}", "--events", "1"], 1, "at least two events"),
        (["analyze", "{run}", "--permuted", "1"], 1, "at least two events"),
        (["compare", "{run}", "{run}", "--out", "{tmp}/x.json"], 1, "is written as .html"),
        (["predict", "{run}", "--data", "{other}", "--out", "{tmp}"], 1, "is a folder"),
        (["inspect", "{other}", "--plot", "{tmp}/x.xyz"], 1, "drawn as .png"),
        (["cache", "{other}", "--out", "{run}"], 1, "is not an event store"),
        (["cache", "{other}", "--out", "{other}"], 1, "is not an event store"),
        (["plan", "--epochs", "inf"], 2, "inf is not"),
        (["ablate", "choices", "--dry-run", "--seeds", "-1"], 1, "none is below 0"),
        (["ablate", "choices", "--dry-run", "--seeds", "0", "0"], 1, "each may stand there once"),
        (["train", "quick", "--out", "{tmp}/r", "--model.heads", "7"], 1, "model.heads = 7"),
        (["train", "quick", "--out", "{tmp}/r", "--optim.vmf-weight", "0", "--optim.angle-weight", "0"], 1, "both 0"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(argv, code, says, folders, tmp_path, capfd):
    known = {"{tmp}": tmp_path, "{run}": folders / "run", "{other}": folders / "other"}
    for name, path in known.items():
        argv = [word.replace(name, str(path)) for word in argv]
    try:
        got = main(argv)
    except SystemExit as stop:
        got = stop.code
    assert got == code
    assert says in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_simulate_leaves_other_peoples_folders_alone(folders, tmp_path, capsys):
    (tmp_path / "sensor_geometry.csv").write_text("mine")
    assert main(["simulate", "--out", str(tmp_path), "--events", "3"]) == 1
    assert "already holds sensor_geometry.csv" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sensor_geometry.csv"]


@pytest.mark.parametrize(
    ("file", "content", "command", "says"),
    [
        ("analysis.json", "{", "compare", "not valid JSON"),
        ("analysis.json", "{}", "compare", "lacks absent"),
        ("manifest.json", "{}", "evaluate", "lacks cuda"),
        ("manifest.json", None, "evaluate", "no manifest.json"),
        ("evaluation.json", '{"label": "x", "n_events": 3, "predictors": [1]}', "report", "is no evaluation"),
    ],
)
def test_damaged_files_of_a_run_are_named(file, content, command, says, folders, tmp_path, capsys):
    run = shutil.copytree(folders / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["data"] = None  # as of a run that simulated its events
    (run / "config.json").write_text(json.dumps(config))
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_text(content)
    assert main([command, str(run), *([str(folders / "run")] if command == "compare" else [])]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert file in error


def test_data_that_are_not_there_leave_no_run_folder(tmp_path, capsys):
    assert main(["train", "quick", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]) == 1
    assert "no folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
