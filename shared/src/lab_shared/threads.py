"""How the threads of a CPU wait for each other."""

from __future__ import annotations

import os


def sleep_soon() -> None:
    """Let OpenMP's threads sleep soon where they wait for each other, unless the environment says otherwise.

    By default they spin for milliseconds. On cores that are shared, with other programs or with other virtual machines,
    a spinning thread keeps the one it waits for from running. Has to come before torch is imported, whose OpenMP reads
    the environment once.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # rather than 300,000; to sleep at once costs on quiet cores
