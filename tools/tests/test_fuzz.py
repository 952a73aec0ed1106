"""`make fuzz` in short: every reader on up to 100 files that are wrong."""

from __future__ import annotations

import json

import fuzz
import pytest
from lab_shared.errors import UserError
from readers import READERS
from readers.base import Reader

CASES = {"geometry-csv": 30, "kaggle-parquet": 60}
"""Those that take 10 ms and more a case."""


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_file_has_a_named_error_or_the_right_answer(name: str) -> None:
    found = fuzz.fuzz(name, CASES.get(name, 100), seed=1)
    assert found["accepted"], "not even the valid files were accepted"
    assert sum(found.values()) > found["accepted"]


def _reader(read: object) -> Reader:
    def check(folder: object, value: object) -> None:
        assert value == 3, "a wrong answer"

    return Reader([{"a.txt": b"3", "b.txt": b"4"}], read, check)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda folder: int((folder / "a.txt").read_text()), "ValueError"),
        (lambda folder: 3 / len((folder / "a.txt").read_bytes()) * len("3"), "a wrong answer|ZeroDivisionError"),
        (lambda folder: (folder / ".." / ".." / "elsewhere").write_text("") + 3, "opened .*elsewhere"),
        (lambda folder: __import__("os").system("true") + 3, "os.system"),
        (lambda folder: json.loads((folder / "a.txt").read_text()), "JSONDecodeError|a wrong answer"),
    ],
)
def test_it_would_notice(monkeypatch, tmp_path, read, message):
    """Other exceptions, wrong answers, files elsewhere and code that runs are faults, with the number of the case."""
    monkeypatch.setitem(READERS, "bad", lambda: _reader(read))
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(fuzz.Misread, match=rf"(?s)bad, case \d+.*({message})"):
        fuzz.fuzz("bad", 200, seed=0)


def test_a_named_error_is_allowed(monkeypatch):
    def read(folder: object) -> None:
        raise UserError("this file is wrong")

    monkeypatch.setitem(READERS, "strict", lambda: _reader(read))
    assert fuzz.fuzz("strict", 20, seed=0) == {"UserError": 21}
