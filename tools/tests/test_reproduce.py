"""Every record has one entry that says how it is made, its commands parse, and the schedule keeps its promises."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import reproduce
import reproduce_one
import walk
from lab_shared.errors import UserError
from reproduction import ENTRIES, Entry

FOLDERS = ("bench", "bfloat16-cpu", "levels", "oracle", "runs")
"""Folders of records; anything else in a results folder is one record."""


def committed() -> set[str]:
    """Every record in the repository."""
    parts = ("packages/*", "shared", "tools")
    results = [folder for part in parts for folder in reproduce.ROOT.glob(f"{part}/results")]
    tops = [path for folder in results for path in folder.iterdir()]
    paths = [inner for path in tops for inner in (path.iterdir() if path.name in FOLDERS else [path])]
    return {str(path.relative_to(reproduce.ROOT)) for path in paths}


def test_every_record_has_one_entry():
    records = [run.record for entry in ENTRIES for run in entry.runs()]
    assert len(records) == len(set(records))
    assert not committed() - set(records)
    names = [run.name for entry in ENTRIES for run in entry.runs()]
    assert len(names) == len(set(names))
    assert all(entry.steps or made for entry in ENTRIES for made in [reproduce_one.made_by(entry.record)])


def test_every_command_parses():
    places = {"out": "X", "leaf": "leaf", "record": "X/leaf", "parent": "X", "seed": "7"}
    steps = {step for entry in ENTRIES for step in entry.steps}
    wrong = {}
    for step in steps:
        words = [word.format(**places) for word in shlex.split(re.sub(" > .*", "", step))]
        command = walk.Command("reproduction.py", words)
        assert command.program, step
        if said := walk.check(command):
            wrong[step] = said
    assert not wrong


def test_the_table_says_where_each_record_is_from():
    text = reproduce.table(ENTRIES)
    assert all(entry.record in text and entry.feeds in text for entry in ENTRIES)
    row = r"rh-explicit +there.*\n.*145 s.*1 GPU.*\n +from commit \w{7}.*, device NVIDIA H200\n +\$ rh-memory sweep"
    assert re.search(row, text)


def entry(name: str, seconds: float | None, gpus: float) -> Entry:
    return Entry(name, "", f"none/{name}.json", ("python x.py",), seconds, "", gpus)


def test_the_plan_is_longest_first_and_ends_in_time():
    runs = [entry("a", 100, 1), entry("b", 300, 1), entry("c", 200, 1), entry("d", 50, 0.5), entry("e", None, 0.5)]
    planned = reproduce.plan(runs, gpus=2, minutes=10)
    assert [(begin, run.name) for begin, run in planned] == [(0, "b"), (0, "c"), (200, "a"), (300, "d")]
    assert [run.name for _, run in reproduce.plan(runs, gpus=2, minutes=4)] == ["c", "a"]
    assert [run.name for _, run in reproduce.plan([entry("u", None, 1), entry("v", 9, 1)], 1, 20)] == ["v", "u"]
    assert reproduce.plan([entry("f", 10, 2)], gpus=2, minutes=1)[0][0] == 0
    cpu = reproduce.plan([entry("g", 10, 0), entry("h", 20, 0)], gpus=0, minutes=1)
    assert [(begin, run.name) for begin, run in cpu] == [(0, "h"), (20, "g")]


def test_what_is_wanted():
    missing = reproduce.wanted([], gpus=1, again=False)
    assert all(0 < run.gpus <= 1 and not (reproduce.ROOT / run.record).exists() for run in missing)
    assert "lab-scaling" not in [run.name for run in missing]
    assert [run.name for run in reproduce.wanted(["rh-explicit-seed7"], 1, True)] == ["rh-explicit-seed7"]
    assert len(reproduce.wanted(["rh-explicit"], 1, True)) == 3
    with pytest.raises(UserError, match="nothing is no entry"):
        reproduce.wanted(["nothing"], 1, False)


def test_jobs_make_records_once_and_say_what_failed(tmp_path, capfd):
    program = tmp_path / "program.py"
    program.write_text("import sys; print('{}'); sys.exit(len(sys.argv) > 1)")
    good = replace(entry("good", 1, 0), steps=(f"python {program} > {{record}}",))
    to_file = f"python {program} > {{out}}/{{leaf}}/a.json"
    inside = "python -c 'import pathlib; pathlib.Path(\"{out}/{leaf}/b\").mkdir()'"
    to_folder = f"python {program} > {{out}}/{{leaf}}/b/c.json"
    kept = replace(entry("kept", 1, 0), record="none/kept", steps=(to_file, inside, to_folder), keep=("a.json", "b"))
    bad = replace(entry("bad", 1, 0), steps=(f"python {program} fails",))
    planned = [(0.0, run) for run in (good, kept, bad)]
    assert reproduce.execute(planned, tmp_path / "out", gpus=0, minutes=60) == 1
    assert "ended with exit code 1" in capfd.readouterr().err
    for name in ("good.json", "kept/a.json", "kept/b/c.json"):
        assert json.loads((tmp_path / "out/records/none" / name).read_text()) == {}
    program.unlink()  # what is done is not done again
    assert reproduce.execute(planned[:2], tmp_path / "out", gpus=0, minutes=60) == 0


def test_nothing_begins_without_the_time_for_it(tmp_path, capfd):
    late = replace(entry("late", None, 0), steps=("python nothing.py",))
    assert reproduce.execute([(0.0, late)], tmp_path, gpus=0, minutes=5) == 1
    assert "not begun: it takes 600 s, 300 s are left" in capfd.readouterr().err


def test_a_training_that_was_begun_goes_on(tmp_path: Path):
    words = ["rh-memory", "train", "e0", "--out", str(tmp_path)]
    assert reproduce_one.argv(words)[3:] == words[1:]
    (tmp_path / "config.json").write_text("")
    assert reproduce_one.argv(words)[3:] == ["train", "--resume", str(tmp_path)]
