import json
import subprocess
import sys

import pytest
from gauge_attn.cli import main
from gauge_attn.config import PRESETS, TrainConfig
from lab_shared.config import from_json, to_json


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("train", "evaluate", "diagnose", "theory", "grid", "bench", "report", "generate"):
        assert command in out


def test_help_imports_no_torch():
    code = "import sys, gauge_attn.cli as c\ntry: c.main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'tyro', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_train_help_lists_presets(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)


def test_wrong_usage_is_exit_2(capsys):
    for argv in (["train", "bananas"], ["nonsense"], ["train", "quick", "--resume", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert main([]) == 2


def test_user_errors_are_one_line_and_exit_1(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)]) == 1
    assert main(["report", str(tmp_path)]) == 1
    assert main(["grid", "h9"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("gauge-attn: error: ") for line in lines)


def test_theory_as_json(capsys):
    assert main(["theory", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["d"] for row in rows} == {1, 3, 5, 7, 9}


def test_grid_list(capsys, tmp_path):
    assert main(["grid", "h7", "--list", "--out", str(tmp_path)]) == 0
    *names, last = capsys.readouterr().out.splitlines()
    assert names == [f"{c}-seed={s}" for c in ("learned", "frozen") for s in range(3)]
    assert last == f"6 to run, 0 done, in {tmp_path / 'runs'}"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = PRESETS[name][1]
    assert from_json(TrainConfig, to_json(config)) == config


def test_overrides_reach_the_run(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("gauge_attn.train.write_report", lambda folder: folder / "report.html")
    argv = ["train", "faithful-free", "--data", "induction", "--out", str(tmp_path / "run"), "--seed", "3"]
    argv += ["--steps", "2", "--data.window", "8", "--data.val-windows", "4", "--model.kappa", "0.1"]
    assert main([*argv, "--wandb", "disabled"]) == 0
    config = from_json(TrainConfig, (tmp_path / "run/config.json").read_text())
    assert (config.seed, config.steps, config.model.kappa, config.data.window) == (3, 2, 0.1, 8)
    assert main(["diagnose", str(tmp_path / "run"), "--json", "--device", "cpu"]) == 0
