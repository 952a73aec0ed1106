"""Command line of attn-clustering. It states what is not there yet; a command appears here when it works."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from attn_clustering import __version__

MISSING = "the Mini-Qwen3 model, the micro-language generators, the 2x2x2 matrix and its analyses"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 for help and version, 2 for a command that does not exist."""
    parser = argparse.ArgumentParser(
        prog="attn-clustering",
        description="Does the order of training data leave durable structure in attention heads?",
        epilog=f"Not there yet: {MISSING}. The README describes the plan.",
    )
    parser.add_argument("--version", action="version", version=f"attn-clustering {__version__}")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="none so far")
    asked = parser.parse_known_args(argv)[0].command
    if asked:
        parser.error(f"there is no command {asked[0]!r} yet (not there yet: {MISSING})")
    parser.print_help()
    return 0
