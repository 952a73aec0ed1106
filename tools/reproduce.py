"""`make reproduce`: which command makes which record, which are missing, and those run.

    tools/reproduce.py                              a table: every record, there or missing, its command, its time
    tools/reproduce.py --out DIR --gpus 1 --minutes 20      makes what is missing and asks for GPUs, longest first
    tools/reproduce.py --out DIR --only rh-e0               these alone, by the names in the table (with -seedS or not)

Without --gpus those run that need no GPU. Records appear under DIR/records as they lie in the repository:
`cp -r DIR/records/. .` puts them in place. Run again with the same DIR, it goes on. The list is reproduction.py.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evidence.record import ROOT
from lab_shared.command import positive_float, positive_int
from lab_shared.errors import UserError
from lab_shared.sweep import Job, run_jobs
from reproduce_one import UNMEASURED, UNTIL, made_by, perform
from reproduction import ENTRIES, Entry


def table(entries: Sequence[Entry]) -> str:
    """A row for every entry: name, what is there, from which commit on what device, how long, and the commands."""
    lines = []
    for entry in entries:
        runs = list(entry.runs())
        made = [found for run in runs if (found := made_by(run.record)) is not None]
        there = "missing" if not made else "there" if len(made) == len(runs) else f"{len(made)} of {len(runs)}"
        origin = "; ".join(sorted({f"commit {commit}, device {device}" for commit, device in made}))
        where = f"{entry.gpus:g} GPU" if entry.gpus else "2 cores"
        needs = "not measured" if entry.seconds is None else f"{entry.seconds:.0f} s a run on {where} ({entry.source})"
        lines.append(f"{entry.name:32} {there:8} {entry.record}")
        lines.append(f"{'':32} feeds {entry.feeds}; {needs if entry.steps else entry.source}; {where}")
        lines += [f"{'':32} from {origin}"] if made else []
        lines += [f"{'':32} $ {step}" for step in entry.steps]
    return "\n".join(lines)


def wanted(only: Sequence[str], gpus: int, again: bool) -> list[Entry]:
    """The runs to make. Raises UserError for a name that is none."""
    _check_names(only)
    return [
        run
        for entry in ENTRIES
        for run in entry.runs()
        if (not only or entry.name in only or run.name in only)
        and run.steps
        and (0 < run.gpus <= gpus if gpus else run.gpus == 0)
        and (again or not (ROOT / run.record).exists())
    ]


def _check_names(only: Sequence[str]) -> None:
    known = {name for entry in ENTRIES for name in (entry.name, *(run.name for run in entry.runs()))}
    if unknown := [name for name in only if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{unknown[0]} is no entry{meant}: see the names in tools/reproduce.py --list")


def plan(runs: Sequence[Entry], gpus: int, minutes: float) -> list[tuple[float, Entry]]:
    """(second at which it begins, run), longest first and most GPUs first; without those that would end too late.

    What nobody has measured comes last and is taken to need UNMEASURED seconds.
    Runs that share a GPU follow each other as soon as one of its places is free; runs of different sizes do not mix.
    """
    begin, found = 0.0, []
    for size in sorted({run.gpus for run in runs}, reverse=True):
        free = [begin] * places(size, gpus)
        of_size = [run for run in runs if run.gpus == size]
        for run in sorted(of_size, key=lambda run: (run.seconds is None, -(run.seconds or 0))):
            free.sort()
            if free[0] + (run.seconds or UNMEASURED) <= 60 * minutes:
                found.append((free[0], run))
                free[0] += run.seconds or UNMEASURED
        begin = max(free)
    return found


def places(size: float, gpus: int) -> int:
    """How many runs of a size go at a time; those without a GPU one by one."""
    return int(gpus / size + 1e-9) if size else 1


def _whole(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def _minutes(text: str) -> float:
    return float(text) if text == "inf" else positive_float(text)


def main() -> int:
    """0 when all that was begun is done."""
    parser = argparse.ArgumentParser(prog="make reproduce", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="the table of records; also without --out")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these entries or runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="work here; records appear under DIR/records")
    parser.add_argument(
        "--gpus", type=_whole, default=0, metavar="N", help="make what needs GPUs, on N; default: the rest"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=float("inf"), metavar="M", help="begin nothing that ends later"
    )
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--dry-run", action="store_true", help="say what would begin when, and do nothing")
    args = parser.parse_args()
    try:
        if args.list or (args.out is None and not args.dry_run):
            _check_names(args.only)
            names = set(args.only)
            print(table([e for e in ENTRIES if not names or names & {e.name, *(run.name for run in e.runs())}]))
            return 0
        planned = plan(wanted(args.only, args.gpus, args.again), args.gpus, args.minutes)
        for begin, run in planned:
            print(f"{begin:7.0f} s  {run.gpus:4g} GPU  {run.name:44} {run.steps[0]}")
        print(f"{len(planned)} jobs")
        return 0 if args.dry_run else execute(planned, args.out, args.gpus, args.minutes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


def execute(planned: Sequence[tuple[float, Entry]], out: Path, gpus: int, minutes: float) -> int:
    """Run what is planned, sizes one after another; 1 when a job failed."""
    os.environ[UNTIL] = str(time.time() + 60 * minutes)
    # Jobs may be processes of their own, which must find `perform`.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    failed = 0
    for size in dict.fromkeys(run.gpus for _, run in planned):
        jobs = [
            Job(run.name, perform, {"steps": list(run.steps), "record": run.record, "keep": list(run.keep)})
            for _, run in planned
            if run.gpus == size
        ]
        try:
            run_jobs(jobs, out / "jobs", workers=min(places(size, gpus), len(jobs)), gpus_per_job=size)
        except UserError as error:
            print(error, file=sys.stderr)
            failed = 1
    print(f"records: {out / 'records'}; put them in place with: cp -r {out / 'records'}/. {ROOT}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
