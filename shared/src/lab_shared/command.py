"""What the lab's commands have in common: flags, and how they end. Imports no torch, so that --help answers at once."""

from __future__ import annotations

import argparse
import io
import math
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lab_shared.allocator import keep_freed_memory
from lab_shared.completion import SHELLS, completion
from lab_shared.errors import UserError, needs
from lab_shared.files import atomic_write, json_text, make_folder
from lab_shared.progress import say
from lab_shared.threads import sleep_soon

_GPUS_PER_JOB = 1.0


class Program:
    """A command made of subcommands: `add` them, then `main` reads the words, runs one and returns the exit code.

    Exit codes: 0 done, 1 an error the user can mend (one line on stderr), 2 wrong usage, 128 + the signal that stopped
    it. Every program answers --version and --print-completion SHELL.
    """

    def __init__(self, name: str, description: str, version: str, *, epilog: str | None = None) -> None:
        self.name = name
        self.parser = argparse.ArgumentParser(
            prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.parser.add_argument("--version", action="version", version=f"{name} {version}")
        self.parser.add_argument("--print-completion", choices=SHELLS, help="a script for your shell to source")
        self._commands = self.parser.add_subparsers(dest="command", metavar="COMMAND")
        self._free: dict[str, Callable[[list[str]], None]] = {}
        self._more_words: dict[str, list[str]] = {}

    def add(self, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        """A subcommand, to be given its flags; `run` gets what they were set to."""
        sub: argparse.ArgumentParser = self._commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def add_free(
        self,
        name: str,
        run: Callable[[argparse.ArgumentParser, list[str]], None],
        text: str,
        *,
        more_words: Iterable[str] = (),
        **options: Any,
    ) -> argparse.ArgumentParser:
        """A subcommand that reads its own words: `run` gets its parser and them, flags the parser lacks included.

        more_words: such flags, for shell completion. options: of the parser, beside no abbreviations and no --help.
        """
        sub: argparse.ArgumentParser = self._commands.add_parser(
            name,
            help=text,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self._free[name] = lambda words: run(sub, words)
        self._more_words[name] = list(more_words)
        return sub

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Do what the words (by default the command line's) say; the exit code. Wrong usage raises SystemExit(2)."""
        _mend_streams()
        words = list(sys.argv[1:] if argv is None else argv)
        if words and words[0] in self._free:
            return run_command(self.name, self._free[words[0]], words[1:])
        args = self.parser.parse_args(words)
        if args.print_completion:
            print(completion(self.parser, args.print_completion, self._more_words))
            return 0
        if args.command is None:
            self.parser.print_help()
            return 2
        return run_command(self.name, args.run, args)


def run_command(program: str, command: Callable[[Any], None], args: Any) -> int:
    """Run `command(args)` and return the exit code: 0 done (or its reader gone), 1 an error the user can mend.

    UserError, OSError, Ctrl-C (130, as shells have it) and a package that is not installed become one line on stderr
    that starts with the program's name.
    """
    keep_freed_memory()
    sleep_soon()
    try:
        with needs("this command"):
            command(args)
        sys.stdout.flush()
    except (UserError, OSError) as error:
        if _stdout_is_lost() and isinstance(error, BrokenPipeError):
            return 0
        say(f"{program}: error: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"\n{program}: stopped")
        return 128 + signal.SIGINT
    return 0


def _mend_streams() -> None:
    """Streams that were closed go nowhere (or the next file opened would take their place), and a character that stdout
    has not is written as its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _stdout_is_lost() -> bool:
    """Whether what reads stdout is gone, or it cannot be written; it then goes nowhere, or flushing at exit would fail.

    Not every broken pipe is that of stdout.
    """
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            return False
    except io.UnsupportedOperation:  # no stream of the system
        return False
    except OSError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def positive_int(text: str) -> int:
    """The number, for argparse's `type`; its error names what was given."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def positive_float(text: str) -> float:
    """The finite number above zero, for argparse's `type`; its error names what was given."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def json_flag(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def engine_flags(parser: argparse.ArgumentParser) -> None:
    """--engine, --address, --workers and --gpus-per-job: where the jobs of lab_shared.sweep run."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where the jobs run; default: here")
    parser.add_argument("--address", metavar="HOST:PORT", help="ray: a running cluster; default: a new one here")
    parser.add_argument(
        "--workers", type=positive_int, metavar="N", help="local: jobs at a time; default: as GPUs hold"
    )
    parser.add_argument(
        "--gpus-per-job", type=positive_float, default=_GPUS_PER_JOB, metavar="X", help="0.5 puts two jobs on a GPU"
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `engine_flags` read, as the keywords of `run_jobs`.

    Raises UserError where the command makes jobs only with --shards, and an engine or what it needs is named without,
    and for the address of a cluster without --engine ray.
    """
    if args.address is not None and args.engine != "ray":
        raise UserError(f"--address {args.address} is that of a Ray cluster: add --engine ray, or leave it out")
    if getattr(args, "shards", 1) is None and args.engine != "local":
        raise UserError(f"--engine {args.engine} runs jobs: say how many with --shards N")
    if getattr(args, "shards", 1) is None and (args.workers is not None or args.gpus_per_job != _GPUS_PER_JOB):
        raise UserError("--workers and --gpus-per-job are about jobs: say how many with --shards N")
    return {name: getattr(args, name) for name in ("engine", "address", "workers", "gpus_per_job")}


def device_flag(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda when there is one")


def dry_run_flag(parser: argparse.ArgumentParser, *names: str) -> None:
    """--dry-run, and what else it is called."""
    parser.add_argument("--dry-run", *names, action="store_true", help="say what would be done, and do nothing")


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Print what a command found: result["text"], or all the rest as one JSON object."""
    found = {name: value for name, value in result.items() if name != "text"}
    print(json_text(found) if as_json else result["text"])


def write_record(path: Path | None, record: Any) -> None:
    """Write what a command measured as JSON, where --out says so. Raises StorageError."""
    if path is not None:
        make_folder(path.parent)
        atomic_write(path, json_text(record, indent=1) + "\n")


def job_list(names: Sequence[str], folder: Path) -> str:
    """The jobs that a sweep in `folder` would run, for --dry-run: those without a result, and how many have one."""
    waiting = [name for name in names if not (folder / name / "result.json").exists()]
    return "\n".join([*waiting, f"{len(waiting)} to run, {len(names) - len(waiting)} done, in {folder}"])
