"""What the lab's commands have in common: flags, and how they end. Imports no torch, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from lab_shared.allocator import keep_freed_memory
from lab_shared.errors import UserError


def run_command(program: str, command: Callable[[Any], None], args: Any) -> int:
    """Run `command(args)` and return the exit code: 0 done (or its reader gone), 1 an error the user can mend.

    UserError and OSError become one line on stderr that starts with the program's name.
    """
    keep_freed_memory()
    try:
        command(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit would fail again
        return 0
    except (UserError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    return 0


def positive_int(text: str) -> int:
    """The number, for argparse's `type`; its error names what was given."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def json_flag(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def device_flag(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda when there is one")
