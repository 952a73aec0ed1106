"""Command line of gauge-attn. It states what is not there yet; a command appears here when it works."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gauge_attn import __version__

MISSING = "the irreps and KL-attention mathematics, the models, the diagnostics and the experiments"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 for help and version, 2 for a command that does not exist."""
    parser = argparse.ArgumentParser(
        prog="gauge-attn",
        description="Attention as softmax(-KL/kappa) between Gaussian beliefs transported by SO(3) frames.",
        epilog=f"Not there yet: {MISSING}. The README describes the plan.",
    )
    parser.add_argument("--version", action="version", version=f"gauge-attn {__version__}")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="none so far")
    asked = parser.parse_known_args(argv)[0].command
    if asked:
        parser.error(f"there is no command {asked[0]!r} yet (not there yet: {MISSING})")
    parser.print_help()
    return 0
