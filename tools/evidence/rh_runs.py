"""The kept runs about zeta zeros, read and judged once for all tables and claims."""

from __future__ import annotations

from functools import cache
from typing import Any

from evidence.record import ROOT, read

RESULTS = "packages/rh_memory/results"


@cache
def runs() -> Any:
    """Every run that is kept, as `rh-memory verdicts` reads it."""
    from rh_memory.records import read as read_runs

    return read_runs([ROOT / RESULTS / "runs"])


@cache
def judged() -> dict[str, Any]:
    """What `rh-memory verdicts` says about all runs that are kept."""
    from rh_memory.verdicts import verdicts

    return verdicts(runs())


def folders() -> dict[tuple[str, int], str]:
    """(experiment, seed) -> its folder, of finished runs."""
    return {(run.experiment, run.seed): f"{RESULTS}/runs/{run.name}" for run in runs() if run.evaluation is not None}


def validations(folder: str) -> dict[int, dict[str, float]]:
    """step -> scores on the validation windows."""
    return {row["step"]: row for row in read(f"{folder}/metrics.jsonl") if row["split"] == "val"}
