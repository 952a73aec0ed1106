"""How the lab's commands end: one line for what the user can mend, a traceback for a bug. Imports no torch."""

from __future__ import annotations

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
