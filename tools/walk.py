"""A newcomer's walk: every command of the documents.

    tools/walk.py            each is checked: the command exists, its flags do, and a training's configuration holds
    tools/walk.py --run      the short ones are run as well, trainings first
    tools/walk.py --run --only theory --record      those with this text in them; what came of it goes into the record

A command is a line of a fenced block, or a piece of `code` in a sentence, that calls `make`, a name of PROGRAMS or a
program of tools/, with `uv run`, `torchrun -m` or `python -m` in front or not. Words in capitals (RUN, DIR, FILE.npy)
stand for something of the reader's; RUN alone is taken to be the newest finished run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lab_shared.command import positive_float
from record_file import put

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tools/results/walk.json"
EXPERIMENTS = ("iceaggr", "attn_clustering", "gauge_attn", "rh_memory")
PROGRAMS = {name.replace("_", "-"): name for name in (*EXPERIMENTS, "mirror")}
DOCUMENTS = ("*.md", "packages/*/*.md", "shared/README.md", "tools/README.md", "examples/*/*.md")
STAND_FOR = {"ID": "1", "N": "1", "S": "0", "NAME": "sanity", "PRESET": "explicit", "VALUE": "1"}
"""What stands for a number or a choice in a document -> one that a parser takes."""
SHORT = (
    *(f"make train-{name.replace('_', '-')}" for name in EXPERIMENTS),
    "uv run attn-clustering levels faithful-v1",
    "uv run gauge-attn theory",
    "uv run rh-memory baselines",
    "uv run iceaggr plan",
    "uv run iceaggr plan --gpus 2",
    "PYTHONPATH=examples/mirror/src uv run python -m mirror train small",
    "PYTHONPATH=examples/mirror/src uv run python -m mirror train blind",
)
"""What is run, beside dry runs and what asks for nothing but a RUN: minutes at most."""


class Command(NamedTuple):
    """A command of a document: where it stands, its words, and whether in a sentence, where it may be only a verb."""

    document: str
    words: list[str]
    in_prose: bool = False

    @property
    def line(self) -> str:
        """As one would type it."""
        return " ".join(word if re.match("[A-Z]+=", word) else shlex.quote(word) for word in self.words)

    @property
    def _called(self) -> list[str]:
        """From the program on: settings of the environment, `uv run`, torchrun and `python -m` taken off."""
        words = [word for word in self.words if not re.match(r"[A-Z]+=", word)]
        words = words[2:] if words[:2] == ["uv", "run"] else words
        if words and words[0] in ("torchrun", "python") and "-m" in words:
            words = words[words.index("-m") + 1 :]
            words[:1] = [name for name, module in PROGRAMS.items() if module == words[0]]
        words = words[1:] if words[:1] == ["python"] else words
        return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []

    @property
    def program(self) -> str | None:
        """The experiment's command, `make`, or the file in tools/ that it calls; None for anything else."""
        name = self._called[0] if self._called else ""
        return name if name in PROGRAMS or name == "make" or re.fullmatch(r"tools/\w+\.py", name) else None

    @property
    def arguments(self) -> list[str]:
        """What stands behind the program, something in place of what stands for it."""
        words = [word for word in self._called[1:] if not word.startswith("[")]
        return [STAND_FOR.get(word, word) for word in words if not word.endswith("]")]

    @property
    def short(self) -> bool:
        """Whether `--run` runs it."""
        placeholders = [word for word in self.words if re.fullmatch(r"[A-Z|]+(\.[a-z|]+)?", word)]
        on_a_run = placeholders == ["RUN"] and "--out" not in self.words and "--prompt" not in self.words
        if self.line in SHORT or self.in_prose or "torchrun" in self.words:
            return self.line in SHORT
        return on_a_run or ("--dry-run" in self.words and not placeholders)


def commands() -> Iterator[Command]:
    """All commands of the documents, comments taken off."""
    for path in sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)}):
        document, text = str(path.relative_to(ROOT)), path.read_text()
        blocks = r"^```(\w*)\n(.*?)^```$"
        for language, block in re.findall(blocks, text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
                for part in re.split(r"\s&&\s", line):
                    if (found := Command(document, shlex.split(part, comments=True))).program:
                        yield found
        for code in re.findall(r"`([^`]+)`", re.sub(blocks, "", text, flags=re.DOTALL | re.MULTILINE)):
            if re.match(r"[A-Za-z.]", code) and code.count("'") % 2 == code.count('"') % 2 == 0:
                found = Command(document, shlex.split(code), in_prose=True)
                if found.program and len(found.words) > 1:
                    yield found


def check(command: Command) -> str | None:
    """What is wrong with a command, or None. Nothing is run but a dry run of `train`, and `make -n`."""
    words, name = command.arguments, command.program or ""
    if name == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stderr.strip() or None if done.returncode else None
    if name not in PROGRAMS:
        if not (ROOT / name).is_file():
            return f"no {name}"
        text = (ROOT / name).read_text()  # rather than --help, for which most of them would load torch
        missing = [word for word in words if word.startswith("-") and f'"{word}"' not in text]
        return f"{name} has no {missing[0]}" if missing else None
    if not words:
        return None  # a program by itself
    if name == "mirror":
        sys.path.append(str(ROOT / "examples/mirror/src"))
    cli, said = importlib.import_module(f"{PROGRAMS[name]}.cli"), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if words[:1] == ["train"] and not {"--help", "--resume"} & set(words):
                code = cli.main([*words, "--dry-run"])
                return f"exit code {code}: {said.getvalue().strip()[-300:]}" if code else None
            parser = cli.program().parser
            if {"--help", "--resume"} & set(words) or words[0] == "prepare" or (command.in_prose and len(words) == 1):
                found = words[0].startswith("--") or re.search(rf"\b{words[0]}\b", parser.format_help())
                return None if found else f"no {words[0]}"
            parser.set_defaults(run=lambda args: None)
            parser.parse_args(words)
    except SystemExit as stop:
        wrong = said.getvalue().strip().splitlines()[-1] if stop.code else None
        return None if wrong and command.in_prose and "are required" in wrong else wrong
    return None


def run(command: Command, seconds: float) -> str | None:
    """Run a command in the checkout; what went wrong, or None."""
    line = command.line
    if "RUN" in command.words:
        package = PROGRAMS[command.program or ""]
        found = [path for path in (ROOT / "runs" / package).rglob("DONE.json") if "-drope" not in path.parent.name]
        finished = sorted(found, key=lambda path: path.stat().st_mtime)  # a recalibrated run is no start for another
        if not finished:
            return f"no finished run under runs/{package}"
        line = re.sub(r"\bRUN\b", shlex.quote(str(finished[-1].parent)), line)
    # A session of its own, so that a command that takes too long can be ended with all that it has started.
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(["bash", "-c", line], cwd=ROOT, **streams) as process:  # type: ignore[call-overload]
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"not done after {seconds:.0f} s"
    return None if process.returncode == 0 else (said.strip().splitlines() or ["no message"])[-1]


def _turn(command: Command) -> tuple[bool, bool]:
    """Trainings come first, as the commands on a RUN need one; what also stands in a block counts as that."""
    return not command.line.startswith("make train-"), command.in_prose


def main() -> int:
    """Print a line for each command; 1 when one of them fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", action="store_true", help="run the short ones too: half an hour on two cores")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only commands with one of these texts in them")
    parser.add_argument(
        "--seconds", type=positive_float, default=900, metavar="S", help="most for one command; default: 900"
    )
    parser.add_argument("--record", action="store_true", help="put what was run into the record in the repository")
    args = parser.parse_args()
    if args.record and not args.run:
        parser.error("--record keeps what was run: add --run")
    failed, seen = 0, set()
    for command in sorted(commands(), key=_turn):
        if command.line in seen or not any(text in command.line for text in args.only or [""]):
            continue
        seen.add(command.line)
        started, wrong, how = time.monotonic(), check(command), "checked"
        if wrong is None and args.run and command.short:
            wrong, how = run(command, args.seconds), "ran"
        took = round(time.monotonic() - started)
        failed += wrong is not None
        said = f"{how} in {took} s" if wrong is None else f"FAILED: {wrong}"
        print(f"{command.document:36} {command.line:80} {said}", flush=True)
        if args.record and how == "ran":
            put(RECORD, command.line, {"document": command.document, "seconds": took, "wrong": wrong})
    if not seen:
        parser.error(f"--only {' '.join(args.only)}: no command of the documents has that in it")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
