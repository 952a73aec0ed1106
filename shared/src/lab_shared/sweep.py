"""Many runs as one list: executed here or on Ray, skipping what is done, surviving workers that die.

    run_jobs([Job("mha-s0", train_condition, {"attention": "mha", "seed": 0}), ...], Path("runs/matrix"))

A job is a call of a module-level function: call(out=FOLDER/NAME, **kwargs) -> summary. Called again on a folder where
it was stopped, it must go on from there. FOLDER/NAME/result.json holds the call, its arguments and its summary; it
is written last and at once, so every result stands exactly once, however often workers died on the way. It also says
how often the job was started, and FOLDER/NAME/attempts.txt when and where.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.progress import say

Engine = Literal["local", "ray"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_ABSENT: Any = object()


@dataclass(frozen=True)
class Job:
    """One call with a name; see the module.

    name: the folder it gets, unique in its list. kwargs: JSON-able. needs: names of jobs that must be done before.
    """

    name: str
    call: Callable[..., Mapping[str, Any]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """`module:function`, by which another process finds the call. Raises UserError if it cannot."""
        call = self.call
        if call.__module__ == "__main__" or "." in call.__qualname__:
            raise UserError(f"job {self.name}: {call.__qualname__} is no top-level function of an importable module")
        return f"{call.__module__}:{call.__qualname__}"


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    gpus_per_job: float = 1.0,
    retries: int = 1,
) -> dict[str, dict[str, Any]]:
    """Run every job that is not done yet, each as soon as those it needs are; return name -> summary.

    engine "local": workers=1 (the default without a GPU) calls them one after another in this process, which shares
    compiled code; more workers are processes of their own, each with its share of the GPUs or cores. workers defaults
    to GPUs / gpus_per_job; gpus_per_job=0 is for jobs that need none. engine "ray" (extra `ray`): tasks on the cluster
    at `address` (None: a new one on this machine), `folder` being on a file system that all nodes see.
    retries: how often a job whose process died (killed, node lost) starts again. An exception is not retried.

    Raises UserError for a bad list, for a folder that holds the results of other arguments, and, once all else has
    run, for jobs that failed: each is named with its log.
    """
    by_name = _checked(jobs)
    folder = folder.resolve()
    make_folder(folder)
    results: dict[str, dict[str, Any]] = {}
    for job in jobs:
        summary = _summary_if_done(folder / job.name, job.target, job.kwargs)
        if summary is not None:
            results[job.name] = summary
    if results:
        say(f"{len(results)} of {len(jobs)} jobs are done already")
    waiting = [job.name for job in jobs if job.name not in results]
    if not waiting:
        return results
    failed: dict[str, str] = {}
    running: dict[Future[dict[str, Any]], tuple[str, float]] = {}
    from lab_shared import sweep_engines

    opened = sweep_engines.open_engine(engine, folder, address, workers, gpus_per_job, retries, len(waiting))
    with opened as (submit, capacity):
        while waiting or running:
            for name in list(waiting):
                lost = [n for n in by_name[name].needs if n in failed]
                if lost:
                    failed[name] = f"not run, since {lost[0]} failed"
                    waiting.remove(name)
                elif len(running) < capacity and all(n in results for n in by_name[name].needs):
                    waiting.remove(name)
                    _write_request(folder / name, by_name[name])
                    running[submit(name)] = (name, time.monotonic())
                    if capacity == 1:
                        break  # in this process a submitted job is a finished one: report it before the next
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, started = running.pop(future)
                seconds = time.monotonic() - started
                error = future.exception()
                if error is None:
                    results[name] = future.result()
                    again = f", attempt {n}" if (n := attempts(folder / name)) > 1 else ""
                    say(f"[{len(results) + len(failed)}/{len(jobs)}] {name}: done in {seconds:.0f} s{again}")
                elif isinstance(error, Exception):
                    failed[name] = f"{error} (log: {folder / name / 'log.txt'})"
                    say(f"[{len(results) + len(failed)}/{len(jobs)}] {name}: FAILED after {seconds:.0f} s: {error}")
                else:
                    raise error
    if failed:
        lines = "\n".join(f"  {name}: {why}" for name, why in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed (run the same command again to go on):\n{lines}")
    return {job.name: results[job.name] for job in jobs}


def execute(folder: Path) -> dict[str, Any]:
    """Carry out the job that FOLDER/job.json asks for, unless it is done; what every engine runs. Returns the summary.

    Any exception is also written, with its traceback, to FOLDER/log.txt.
    """
    request = json.loads((folder / "job.json").read_text())
    with _only_one(folder) as log:
        summary = _summary_if_done(folder, request["call"], request["kwargs"])
        if summary is None:
            module, name = request["call"].split(":")
            started = time.monotonic()
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()} {os.getpid()}\n")
            log.flush()
            try:
                call = getattr(importlib.import_module(module), name)
                summary = dict(call(out=folder, **request["kwargs"]))
            except Exception:
                with open(folder / "log.txt", "a") as trace:
                    trace.write(traceback.format_exc())
                raise
            done = {**request, "summary": summary, "seconds": time.monotonic() - started, "attempts": attempts(folder)}
            atomic_write(folder / "result.json", json.dumps(done, indent=1) + "\n")
    return summary


def attempts(folder: Path) -> int:
    """How often the job in this folder was started, here or elsewhere."""
    file = folder / "attempts.txt"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _checked(jobs: Sequence[Job]) -> dict[str, Job]:
    by_name: dict[str, Job] = {}
    for job in jobs:
        if not _NAME.fullmatch(job.name):
            raise UserError(f"job name {job.name!r} would be no safe folder name: use letters, digits and ._=+-")
        if job.name in by_name:
            raise UserError(f"two jobs are named {job.name!r}: names are folders, so make them differ")
        unknown = [n for n in job.needs if n not in by_name]
        if unknown:
            raise UserError(f"job {job.name!r} needs {unknown[0]!r}, which does not come before it in the list")
        by_name[job.name] = job
    return by_name


def _write_request(folder: Path, job: Job) -> None:
    make_folder(folder)
    request = {"call": job.target, "kwargs": dict(job.kwargs)}
    atomic_write(folder / "job.json", json.dumps(request, indent=1) + "\n")


def _summary_if_done(folder: Path, target: str, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    file = folder / "result.json"
    if not file.exists():
        return None
    try:
        done = json.loads(file.read_text(encoding="utf-8"))
        call, found, summary = done["call"], done["kwargs"], done["summary"]
        if not isinstance(found, dict) or not isinstance(summary, dict):
            raise TypeError("no objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is no result of a job: delete {folder} to run it again") from error
    asked = json.loads(json.dumps(dict(kwargs)))
    if (call, found) != (target, asked):
        other = _differences(found, asked) if call == target else [f"it is of {call}, not {target}"]
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        raise UserError(
            f"{folder} holds the result of other arguments ({shown}): choose another folder, or delete that one"
        )
    return summary


def _differences(found: Any, asked: Any, path: str = "") -> list[str]:
    """What differs between two values of JSON: "config.steps is 2 there, not 3"."""
    if not (isinstance(found, dict) and isinstance(asked, dict)):
        there, here = ("nothing" if x is _ABSENT else json.dumps(x) for x in (found, asked))
        return [] if found == asked else [f"{path} is {there:.60} there, not {here:.60}"]
    keys = [*asked, *(key for key in found if key not in asked)]
    pairs = ((f"{path}.{key}".lstrip("."), found.get(key, _ABSENT), asked.get(key, _ABSENT)) for key in keys)
    return [line for name, old, new in pairs for line in _differences(old, new, name)]


@contextmanager
def _only_one(folder: Path) -> Iterator[TextIO]:
    """Wait for the lock of a job's folder, so that a task retried while its first process lives does no work twice.

    Yields the locked file, open for appending: the list of the job's attempts.
    """
    with open(folder / "attempts.txt", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        yield log


if __name__ == "__main__":
    try:
        execute(Path(sys.argv[1]))
    except UserError as mistake:
        sys.exit(str(mistake))
