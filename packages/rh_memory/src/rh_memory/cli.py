"""Command line of rh-memory. It states what is not there yet; a command appears here when it works."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rh_memory import __version__

MISSING = "the zero generator, the E0 to E5 models, the baselines and the memory diagnostics"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 for help and version, 2 for a command that does not exist."""
    parser = argparse.ArgumentParser(
        prog="rh-memory",
        description="Mixture-density transformers with memory slots over the spacings of Riemann zeta zeros.",
        epilog=f"Not there yet: {MISSING}. The README describes the plan.",
    )
    parser.add_argument("--version", action="version", version=f"rh-memory {__version__}")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="none so far")
    asked = parser.parse_known_args(argv)[0].command
    if asked:
        parser.error(f"there is no command {asked[0]!r} yet (not there yet: {MISSING})")
    parser.print_help()
    return 0
