"""Every command of the READMEs is one that exists, with flags that exist; and the walk can tell when it is not."""

import shlex

import pytest
import walk


def test_every_command_of_the_documents_holds():
    found = list(walk.commands())
    wrong = {shlex.join(c.words): said for c in found if (said := walk.check(c)) is not None}
    assert not wrong
    assert {c.program for c in found} >= set(walk.PROGRAMS)
    lines = {shlex.join(c.words) for c in found} | {f"make train-{name}" for name in walk.PROGRAMS}
    assert set(walk.SHORT) <= lines


@pytest.mark.parametrize(
    "line",
    [
        "make nothing-of-this-name",
        "uv run iceaggr evaluate RUN --dataa DIR",
        "uv run rh-memory train e9",
        "uv run rh-memory train e4 --optim.lrr 1",
        "uv run gauge-attn grind h1",
        "uv run attn-clustering matrix nonsense",
    ],
)
def test_what_does_not_hold_is_said(line):
    assert walk.check(walk.Command("X.md", shlex.split(line)))


def test_placeholders_and_short_commands():
    short = {
        "uv run gauge-attn theory": True,
        "uv run rh-memory evaluate RUN": True,
        "uv run rh-memory train e4 --out RUN": False,
        "uv run iceaggr evaluate RUN --data DIR": False,
        "uv run iceaggr ablate choices --dry-run": True,
        "uv run iceaggr bench": False,
    }
    for line, expected in short.items():
        assert walk.Command("X.md", line.split()).short is expected, line
    assert walk.Command("X.md", ["uv", "run", "iceaggr", "display", "DIR", "--event", "ID"]).arguments[-1] == "1"
