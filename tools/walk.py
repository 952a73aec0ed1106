"""A newcomer's walk: every command of the READMEs.

    tools/walk.py            each is checked: the command exists, its flags do, and a training's configuration holds
    tools/walk.py --run      the short ones are run as well, in the order in which they stand

A command is a line of a fenced block that begins with `make`, a name of PROGRAMS, or `uv run` and such a name. Words in
capitals (RUN, DIR, FILE.npy) stand for something of the reader's; RUN alone is taken to be the newest finished run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAMS = {name.replace("_", "-"): name for name in ("iceaggr", "attn_clustering", "gauge_attn", "rh_memory")}
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "packages/*/README.md", "shared/README.md")
NUMBERS = {"ID": "1", "N": "1", "S": "0"}
"""What stands for a number in a README -> one that a parser takes."""
SHORT = (
    *(f"make train-{name}" for name in PROGRAMS),
    "uv run attn-clustering levels faithful-v1",
    "uv run gauge-attn theory",
    "uv run rh-memory baselines",
)
"""What is run, beside dry runs and what asks for nothing but a RUN: minutes at most."""


class Command(NamedTuple):
    """A line of a document: its words, and where it stands."""

    document: str
    words: list[str]

    @property
    def program(self) -> str | None:
        """The experiment's command that it calls, if it calls one."""
        name = self.words[2] if self.words[:2] == ["uv", "run"] else self.words[0]
        return name if name in PROGRAMS else None

    @property
    def arguments(self) -> list[str]:
        """What stands behind the program, numbers in place of what stands for them."""
        return [NUMBERS.get(word, word) for word in self.words[3 if self.words[0] == "uv" else 1 :]]

    @property
    def short(self) -> bool:
        """Whether `--run` runs it."""
        placeholders = [word for word in self.words if re.fullmatch(r"[A-Z|]+(\.[a-z|]+)?", word)]
        on_a_run = placeholders == ["RUN"] and "--out" not in self.words and "--prompt" not in self.words
        return shlex.join(self.words) in SHORT or on_a_run or ("--dry-run" in self.words and not placeholders)


def commands() -> Iterator[Command]:
    """All commands of the documents, comments taken off."""
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            for block in re.findall(r"^```(?:bash)?\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
                for line in block.replace("\\\n", " ").splitlines():
                    words = [w for w in shlex.split(line, comments=True) if not re.match(r"[A-Z]+=", w)]
                    found = Command(str(path.relative_to(ROOT)), words)
                    if words and (words[0] == "make" or found.program):
                        yield found


def check(command: Command) -> str | None:
    """What is wrong with a command, or None. Nothing is run but a dry run of `train`, and `make -n`."""
    if command.program is None:
        done = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stderr.strip() or None if done.returncode else None
    program = importlib.import_module(f"{PROGRAMS[command.program]}.cli").program()
    words, said = command.arguments, io.StringIO()
    if words and words[0] in ("train", "prepare"):
        if "--resume" in words or words[0] == "prepare" or "--help" in words:
            return None if words[0] in program.parser.format_help() else f"no {words[0]}"
        words = [*words, "--dry-run"]
    else:
        program.parser.set_defaults(run=lambda args: None)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if words[0] == "train":
                return f"exit code {code}" if (code := program.main(words)) else None
            program.parser.parse_args(words)
    except SystemExit as stop:
        return said.getvalue().strip().splitlines()[-1] if stop.code else None
    return None


def run(command: Command, seconds: float) -> str | None:
    """Run a command in the checkout; what went wrong, or None."""
    words = command.words
    if "RUN" in words:
        package = PROGRAMS[command.program or ""]
        finished = sorted((ROOT / "runs" / package).rglob("DONE.json"), key=lambda path: path.stat().st_mtime)
        if not finished:
            return f"no finished run under runs/{package}"
        words = [str(finished[-1].parent) if word == "RUN" else word for word in words]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def main() -> int:
    """Print a line for each command; 1 when one of them fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", action="store_true", help="run the short ones too: half an hour on two cores")
    parser.add_argument("--seconds", type=float, default=900, metavar="S", help="most for one command; default: 900")
    args = parser.parse_args()
    failed = 0
    for command in commands():
        started, wrong, how = time.monotonic(), check(command), "checked"
        line = shlex.join(command.words)
        if wrong is None and args.run and command.short:
            wrong, how = run(command, args.seconds), "ran"
        failed += wrong is not None
        said = f"{how} in {time.monotonic() - started:.0f} s" if wrong is None else f"FAILED: {wrong}"
        print(f"{command.document:36} {line:80} {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
