"""The command as a user types it: help at once, fixed exit codes, presets and overrides that arrive."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from lab_shared.config import from_json
from rh_memory.cli import main, with_sections
from rh_memory.config import PRESETS, TrainConfig

COMMANDS = [
    "zeros", "import", "train", "baselines", "evaluate", "diagnose", "physics", "report", "sweep", "collect",
    "verdicts", "bench",
]  # fmt: skip


def config_of(capsys, *argv):
    """The configuration that a dry run prints."""
    assert main(["train", *argv, "--dry-run"]) == 0
    said = capsys.readouterr().out
    return from_json(TrainConfig, said[said.index("\n{") :])


def test_help_lists_every_command(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^    {name}\b", said, re.MULTILINE)
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0


def test_help_answers_at_once_and_imports_nothing_heavy():
    argv = [sys.executable, "-X", "importtime", "-m", "rh_memory", "--help"]
    times = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        after = os.times()  # processor time: the wall's depends on what else runs
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "rh_memory.cli" in imported
    assert not {"torch", "numpy", "tyro"} & imported


def test_presets_arrive_with_their_overrides(tmp_path, capsys):
    words = ["e4", "--seed", "7", "--out", str(tmp_path / "run"), "--model.slot-id-mode", "off", "--steps", "9"]
    config = config_of(capsys, *words, "--data", "zeros.npy")
    assert (config.seed, config.steps, config.model.slot_id_mode, config.data.file) == (7, 9, "off", "zeros.npy")
    assert config.model.use_aux_loss
    assert config_of(capsys) == PRESETS["explicit-small"][1]
    assert not any(tmp_path.iterdir())


def test_the_seed_s_flags_work_under_their_names(capsys, tmp_path):
    """Its training command, word for word but for the paths, and the flags that came later; each arrives."""
    words = "--seed 1337 --slot-id-mode permute_per_batch --use-aux-loss --early-stop --patience 800 --batch-size 512"
    data = ["--data", "zeros.npy", "--out", str(tmp_path / "run")]
    config = config_of(capsys, "e3-original", *words.split(), "--use-amp", *data)
    assert (config.model.slot_id_mode, config.model.use_aux_loss, config.use_amp) == ("permute_per_batch", True, True)
    assert (config.seed, config.early_stop, config.patience, config.batch_size) == (1337, True, 800, 512)
    words = "--content-mode=zeroed --eval-slot-id-mode fixed --eval-perm-average 4 --perm-warmup-steps 2000"
    config = config_of(capsys, "e4", *words.split(), "--no-use-aux-loss", "--compile", "--aux-mode", "diagonal")
    model = config.model
    assert (model.content_mode, model.eval_slot_id_mode, model.eval_perm_average) == ("zeroed", "fixed", 4)
    assert (config.perm_warmup_steps, model.use_aux_loss, config.compile) == (2000, False, True)
    assert config.loss.aux_mode == "diagonal"
    assert with_sections(["--seed", "3", "--model.heads", "2", "--nonsense"]) == [
        "--seed", "3", "--model.heads", "2", "--nonsense",
    ]  # fmt: skip


def test_presets_are_what_their_names_say():
    configs = {name: config for name, (_, config) in PRESETS.items()}
    for name in ("e0", "e1", "e2", "e3", "e4", "e5", "e3-original", "explicit", "explicit-small"):
        assert isinstance(configs[name], TrainConfig)
    assert {configs[f"explicit-{kind}"].model.frequencies for kind in ("shuffled", "random", "composite", "even")} == {
        "shuffled", "random", "composite", "even",
    }  # fmt: skip
    assert configs["explicit-frozen"].model.height == "frozen"
    assert [configs[f"e{i}"].model.memory for i in range(6)] == ["none"] + ["prefix"] * 2 + ["postfix"] * 3
    assert configs["e3-original"].model.readouts == 1
    assert configs["e5"].loss.aux_mode == "diagonal"
    assert configs["e4"].early_stop
    assert not configs["e3"].early_stop


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["train", "nonsense"], 2, "no preset 'nonsense'"),
        (["train", "e0", "--optim.lrr", "1"], 2, "lrr"),
        (["train", "--resume", "X", "--seed", "1"], 2, "--resume takes no other option"),
        (["zeros", "--count", "-3", "--out", "X.npy"], 2, "not a positive whole number"),
        (["zeros", "--count", "99999999999", "--out", "X.npy", "--dry-run"], 1, "phases are exact up to"),
        (["zeros", "--count", "9", "--out", "X.txt", "--dry-run"], 1, "must end in .npy"),
        (["sweep", "e9"], 2, "e9"),
        (["train", "--resume", "/nonexistent"], 1, "/nonexistent"),
        (["train", "e0", "--data.file", "/nonexistent.npy", "--out", "{tmp}/r"], 1, "/nonexistent.npy"),
        (["evaluate", "/nonexistent"], 1, "/nonexistent"),
        (["bench", "e9", "--device", "cpu"], 1, "no preset 'e9'"),
    ],
)
def test_mistakes_exit_with_their_code_and_name_the_value(argv, code, says, capfd, tmp_path):
    try:
        got = main([a.replace("{tmp}", str(tmp_path)) for a in argv])
    except SystemExit as stop:
        got = stop.code
    assert got == code
    assert says in capfd.readouterr().err


def test_zeros_writes_centre_and_offset(tmp_path):
    out = tmp_path / "zeros.npy"
    assert main(["zeros", "--count", "50", "--out", str(out), "--device", "cpu"]) == 0
    centre, offset = np.load(out)
    assert centre.shape == (50,)
    assert centre[0] + offset[0] == pytest.approx(14.134725141734693, abs=1e-11)
    assert json.loads((tmp_path / "zeros.json").read_text())["count"] == 50


TINY = [
    "--model.context", "256", "--model.d-model", "16", "--model.layers", "1", "--model.heads", "2", "--steps", "6",
    "--batch-size", "4", "--eval-every", "3", "--eval-windows", "8", "--checkpoint-every", "2", "--log-every", "2",
    "--wandb", "disabled",
]  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits_and_reports(zeros_file, data_folder, tmp_path, capsys, monkeypatch):
    """Everything at once: training on a file of zeros, kill -9 of the command, resume, evaluation, report."""

    def argv(out):
        data = ["--data.file", str(zeros_file), "--data.folder", str(data_folder)]
        return ["train", "explicit-small", *TINY, *data, "--out", str(out)]

    with monkeypatch.context() as patch:
        patch.setattr("rh_memory.report.write", lambda run: "none: one report is enough")
        assert main(argv(tmp_path / "whole")) == 0
    command = [sys.executable, "-m", "rh_memory", *argv(tmp_path / "part")]
    checkpoints = tmp_path / "part" / "checkpoints"
    deadline = time.monotonic() + 120
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as part:
        while not list(checkpoints.glob("step_*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.005)
        part.kill()
    assert not (tmp_path / "part" / "DONE.json").exists()
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "part")]) == 0
    assert "iid marginal" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "part" / "report.html").read_text()
    for name in ("weights.safetensors", "evaluation.json"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
