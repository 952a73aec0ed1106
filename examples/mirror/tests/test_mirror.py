"""The worked example does what CONTRIBUTING.md says: it is short, it learns, it resumes, its control fails."""

import json
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"


@pytest.fixture
def mirror(monkeypatch):
    """The command's main; the example is no member of the workspace, so it is found by its path."""
    monkeypatch.syspath_prepend(str(SOURCES))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    from mirror.cli import main

    yield main
    for name in [name for name in sys.modules if name.partition(".")[0] == "mirror"]:
        del sys.modules[name]


def test_it_is_under_a_hundred_lines():
    lines = [line for file in (SOURCES / "mirror").glob("*.py") for line in file.read_text().splitlines()]
    assert sum(bool(line.strip()) for line in lines) < 100


def test_one_head_reads_backwards_and_a_blind_one_does_not(mirror, tmp_path):
    accuracy = {}
    for preset in ("small", "blind"):
        assert mirror(["train", preset, "--out", str(tmp_path / preset)]) == 0
        accuracy[preset] = json.loads((tmp_path / preset / "DONE.json").read_text())["summary"]["accuracy"]
    assert accuracy["small"] > 0.99
    assert accuracy["blind"] < 0.4


def test_a_stopped_run_goes_on_to_the_same_bits(mirror, tmp_path, monkeypatch, capsys):
    import lab_shared.loop

    assert mirror(["train", "--steps", "60", "--out", str(tmp_path / "whole")]) == 0

    def stopping(*args, **kwargs):
        for tick in lab_shared.loop.ticks(*args, **kwargs):
            if tick.step == 57:  # behind the checkpoint at 50
                raise KeyboardInterrupt
            yield tick

    with monkeypatch.context() as patch:
        patch.setattr("mirror.train.ticks", stopping)
        assert mirror(["train", "--steps", "60", "--out", str(tmp_path / "part")]) == 130
    capsys.readouterr()
    assert mirror(["train", "--resume", str(tmp_path / "part")]) == 0
    said = capsys.readouterr().out
    for name in ("whole", "part"):
        assert json.loads((tmp_path / name / "DONE.json").read_text())["summary"]["label"] == "generated lines"
    assert (tmp_path / "part/weights.safetensors").read_bytes() == (tmp_path / "whole/weights.safetensors").read_bytes()
    assert mirror(["train", "--resume", str(tmp_path / "part")]) == 0
    assert capsys.readouterr().out == said  # a finished run says the same again


def test_a_dry_run_writes_nothing(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert mirror(["train", "--dry-run"]) == 0
    assert "120 steps of 64 lines" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
