"""Every command of the READMEs is one that exists, with flags that exist; and the walk can tell when it is not."""

import re
import shlex
import time

import pytest
import walk


def test_every_command_of_the_documents_holds():
    found = {c.line: c for c in walk.commands()}
    wrong = {line: said for line, c in found.items() if (said := walk.check(c)) is not None}
    assert not wrong
    assert {c.program for c in found.values()} >= {*walk.PROGRAMS, "make", "tools/costs.py"}
    assert {c.document for c in found.values()} >= {"COSTS.md", "packages/iceaggr/FULL_DATASET.md", "tools/README.md"}
    lines = found.keys() | {f"make train-{name.replace('_', '-')}" for name in walk.EXPERIMENTS}
    assert set(walk.SHORT) <= lines


def test_every_line_of_a_block_is_a_command_or_uvs_own():
    """Nothing that a reader would copy passes unseen."""
    lines = {c.line for c in walk.commands()}
    for document in ("README.md", *(f"packages/{name}/README.md" for name in walk.EXPERIMENTS)):
        for block in re.findall(r"^```bash\n(.*?)^```$", (walk.ROOT / document).read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                assert not words or words[0] == "uv" or walk.Command(document, words).line in lines, line
                assert words[:1] != ["uv"] or words[1] in ("run", "venv", "export", "pip"), line
                assert words[:2] != ["uv", "run"] or walk.Command(document, words).line in lines, line


@pytest.mark.parametrize(
    "line",
    [
        "make nothing-of-this-name",
        "uv run iceaggr evaluate RUN --dataa DIR",
        "uv run rh-memory train e9",
        "uv run rh-memory train e4 --optim.lrr 1",
        "uv run gauge-attn grind h1",
        "uv run attn-clustering matrix nonsense",
        "uv run torchrun --nproc-per-node=2 -m iceaggr train 5M --epoochs 4",
        "PYTHONPATH=examples/mirror/src uv run python -m mirror train smal",
        "python tools/costs.py --wriite",
        "python tools/nothing.py",
        ".venv/bin/iceaggr trane",
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
        "uv run torchrun --nproc-per-node=2 -m iceaggr train --resume RUN": False,
    }
    for line, expected in short.items():
        assert walk.Command("X.md", line.split()).short is expected, line
    assert walk.Command("X.md", ["uv", "run", "iceaggr", "display", "DIR", "--event", "ID"]).arguments[-1] == "1"


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path):
    done = tmp_path / "done"
    assert walk.run(walk.Command("X.md", ["true"]), 60) is None
    assert "No such file or directory" in str(walk.run(walk.Command("X.md", ["ls", str(done)]), 60))
    script = tmp_path / "script"
    script.write_text(f"(sleep 2; touch {done}) & wait")
    assert walk.run(walk.Command("X.md", ["bash", str(script)]), 0.5) == "not done after 0 s"
    time.sleep(2)
    assert not done.exists()
