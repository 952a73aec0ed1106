"""One job of `make reproduce`: the commands behind one record, run one after another; also where a record stands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence.record import ROOT, commits
from lab_shared.errors import UserError
from lab_shared.files import make_folder
from reproduction import ENTRIES

UNTIL = "REPRODUCE_UNTIL"
"""Environment: the time (seconds since 1970) by which every job must be done."""
UNMEASURED = 600.0
"""Seconds a job is taken to need when nobody has measured it."""
PROGRAMS = {name.replace("_", "-"): name for name in ("iceaggr", "rh_memory", "attn_clustering", "gauge_attn")}


def perform(out: Path, steps: Sequence[str], record: str, keep: Sequence[str]) -> dict[str, Any]:
    """Run `steps` for the job in DIR/jobs/NAME; its record is then DIR/records/RECORD. A training goes on where it was.

    Returns where the record is and the seconds of each step. Raises UserError when too little time is left to begin,
    and for a command that fails.
    """
    needed = next((run.seconds for entry in ENTRIES for run in entry.runs() if run.record == record), None)
    left = float(os.environ.get(UNTIL, "inf")) - time.time()
    if left < (needed or UNMEASURED):
        raise UserError(f"not begun: it takes {needed or UNMEASURED:.0f} s, {max(left, 0):.0f} s are left")
    target = out.parent.parent / "records" / record
    make_folder(target.parent)
    make_folder(out / target.name if keep else out)
    places = {"out": out, "leaf": target.name, "record": target, "parent": target.parent}
    seconds = []
    for step in steps:
        started = time.monotonic()
        words = [word.format(**places) for word in shlex.split(step)]
        words, printed = (words[:-2], Path(words[-1])) if ">" in words else (words, None)
        done = subprocess.run(argv(words), cwd=ROOT, check=False, stdout=None if printed is None else subprocess.PIPE)
        if done.returncode:
            raise UserError(f"`{shlex.join(words)}` ended with exit code {done.returncode}")
        if printed is not None:
            printed.write_bytes(done.stdout)
        seconds.append(round(time.monotonic() - started, 1))
    for name in keep:
        make_folder(target)
        source = out / target.name / name
        if source.is_dir():
            shutil.copytree(source, target / name, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target / name)
    return {"record": str(target), "seconds": seconds}


def argv(words: Sequence[str]) -> list[str]:
    """What is executed for a command: with this Python, and going on with a training that was begun."""
    program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", PROGRAMS[words[0]]]
    if words[1] == "train":
        folder = words[words.index("--out") + 1]
        if (Path(folder) / "config.json").is_file():
            return [*program, "train", "--resume", folder]
    return [*program, *words[1:]]


def made_by(record: str) -> tuple[str, str] | None:
    """(commit, device) of a record that is there, as far as it says; None when it is missing."""
    path = ROOT / record
    if not path.exists():
        return None
    said = [file for file in (path, path / "manifest.json", path / "environment.json") if file.is_file()]
    shas = {sha[:7] + sha[40:] for file in said for sha in commits([str(file.relative_to(ROOT))])}
    devices = {name for file in said for name in _devices(json.loads(file.read_text()))}
    return ", ".join(sorted(shas)) or "unknown", ", ".join(sorted(devices)) or "unknown"


def _devices(value: Any) -> set[str]:
    """Every "device" in a tree of JSON."""
    if isinstance(value, dict):
        own = {value["device"]} if isinstance(value.get("device"), str) else set()
        return own.union(*map(_devices, value.values()))
    return set().union(*map(_devices, value)) if isinstance(value, list) else set()
