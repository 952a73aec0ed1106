"""The commands as a user types them: help at once, fixed exit codes, one line for a mistake."""

import json
import os
import subprocess
import sys

import pytest
from attn_clustering.cli import main
from attn_clustering.experiments import EXPERIMENTS

SHORT = [
    "--optim.steps", "3", "--optim.warmup", "1", "--optim.eval-sequences", "16", "--data.language.train-sequences", "40"
]  # fmt: skip
COMMANDS = [
    "matrix",
    "train",
    "drope",
    "levels",
    "analyze",
    "report",
    "collect",
    "export-hf",
    "import-hf",
    "prepare",
    "bench",
]


def test_help_answers_at_once_and_without_torch():
    argv = [sys.executable, "-X", "importtime", "-m", "attn_clustering", "--help"]
    times = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        after = os.times()  # processor time: the wall's depends on what else runs
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "attn_clustering.cli" in imported
    assert "torch" not in imported
    assert all(f"\n    {command}" in done.stdout for command in COMMANDS)
    assert all(name in done.stdout for name in EXPERIMENTS)


def test_no_command_prints_help(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_usage_errors_are_2():
    for argv in (
        ["nonsense"],
        ["matrix", "nonsense"],
        ["train", "mha-sorted"],
        ["train", "--seed", "1"],
        ["prepare"],
        ["prepare", "a.jsonl"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["analyze", "nowhere"], "no finished run"),
        (["drope", "nowhere"], "holds no run"),
        (["train", "--resume", "nowhere"], "holds no run"),
        (["export-hf", "nowhere", "--out", "x"], "no finished run"),
        (["matrix", "smoke", "--corpus", "x"], "micro-language"),
    ],
)
def test_mistakes_are_one_line_and_1(argv, message, capsys):
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_matrix_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["matrix", "smoke"]) == 1
    assert "without torchrun" in capsys.readouterr().err


def test_train_and_recalibrate_a_condition(tmp_path, capsys):
    run = tmp_path / "trained"
    assert main(["train", "gqa-topic_ordered", "--out", str(run), "--device", "cpu", *SHORT]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["attention"], config["ordering"], config["optim"]["steps"]) == ("gqa", "topic_ordered", 3)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    loss = next(words for words in printed if words[0] == "val_loss")
    assert float(loss[1]) == pytest.approx(json.loads((run / "DONE.json").read_text())["summary"]["val_loss"], rel=1e-5)
    assert loss[2] == "nats"
    assert main(["train", "--resume", str(run)]) == 0  # finished: its summary again
    assert main(["drope", str(run), "--fraction", "0.34", "--lr-factor", "0.5"]) == 0
    assert "recovered" in capsys.readouterr().out
    assert (tmp_path / "gqa-topic_ordered-s0-drope-34pct-x0.5" / "DONE.json").exists()
    assert main(["export-hf", str(run), "--out", str(tmp_path / "hf")]) == 0
    assert main(["import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "weights.safetensors").exists()


def test_a_misspelt_field_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "mha-shuffled", "--out", str(tmp_path / "r"), "--optim.stepz", "3"])
    assert stop.value.code == 2
    assert "stepz" in capsys.readouterr().err


def test_levels_as_json(capsys):
    assert main(["levels", "smoke", "--json"]) == 0
    assert "bayes_floor" in json.loads(capsys.readouterr().out)
