"""How the threads of a CPU wait for each other."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the environment says otherwise.

    By default they spin for milliseconds. On cores that are shared, with other programs or with other virtual machines,
    a spinning thread keeps the one it waits for from running. Has to come before torch is imported, whose OpenMP reads
    the environment once.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
