"""`make faults`: kill -9 at random moments of everything that trains, saves, caches, downloads or generates.

After each kill the same work is started again, until it ends. It passes when what comes out equals an uninterrupted
run bit for bit, no file under its final name was ever cut short, nothing that was done is done again, and no leftovers
stay. Half of the kills come after a random time, half in front of a random file operation (opening, renaming,
deleting, truncating, making folders). Some runs meet a full disk first (a limit on the size of files): the work must
end with an error that a command shows as one line, and go on once the limit is gone. Every process is forked from one
that has imported what the work needs and has no other thread.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lab_shared.errors import UserError
from record_file import put
from scenarios import SCENARIOS
from scenarios.base import Scenario
from whole_files import half_written, leftovers

RECORD = Path(__file__).resolve().parent / "results" / "faults.json"
MOST_KILLS_A_RUN = 5
_REFUSED = 3
"""Exit code of work that met a full disk and said so."""
_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Ended(NamedTuple):
    """How a forked process ended. units: what it did, in order; operations: on files of its folder, if it finished."""

    killed: bool
    refused: bool
    units: list[str]
    operations: int
    seconds: float


@dataclass
class Tally:
    """What happened to one scenario."""

    kills: int = 0
    full_disks: int = 0
    finished_runs: int = 0
    faults: list[str] = field(default_factory=list)


def attack(name: str, kills: int, seed: int, root: Path, *, full_disks: int = 6) -> Tally:
    """Kill a scenario `kills` times, over as many runs as that takes, and compare every run that ended.

    full_disks: how many runs begin with a limit on the size of files.
    """
    scenario, rng, tally = SCENARIOS[name](), random.Random(f"{seed}-{name}"), Tally()
    inputs, whole = root / "inputs", root / "whole"
    inputs.mkdir()
    whole.mkdir()
    _fork(scenario, scenario.prepare, inputs, log=root / "prepare.log")
    first = _fork(scenario, lambda folder: scenario.work(inputs, folder), whole, log=root / "whole.log")
    expected = scenario.outcome(whole)
    if not expected or not first.units:
        raise RuntimeError(f"{name}: the uninterrupted run left nothing to compare")
    sizes = [file.stat().st_size for file in whole.rglob("*") if file.is_file()]
    limits = [rng.randrange(rng.choice(sizes) + 1) for _ in range(full_disks)]
    while tally.kills < kills or limits:
        folder, log = root / f"run{tally.finished_runs}", root / f"run{tally.finished_runs}.log"
        folder.mkdir()
        for attempt in range(MOST_KILLS_A_RUN + 1):
            before = scenario.done(folder)
            when: dict[str, Any] = {}
            if limits and attempt == 0:
                when = {"file_limit": limits.pop()}
            elif attempt < MOST_KILLS_A_RUN and tally.kills < kills:
                if rng.random() < 0.5:
                    when = {"after_seconds": rng.uniform(0, first.seconds)}
                else:
                    when = {"at_operation": rng.randint(1, first.operations)}
            end = _fork(scenario, lambda folder: scenario.work(inputs, folder), folder, log=log, **when)
            tally.kills += end.killed
            tally.full_disks += end.refused
            moment = f"{name}, kill {tally.kills} ({when})"
            if again := sorted(before & set(end.units)):
                tally.faults.append(f"{moment}: did again {', '.join(again)}")
            tally.faults += [f"{moment}: {problem}" for problem in half_written(folder)]
            if not end.killed and not end.refused:
                break
        tally.finished_runs += 1
        found = scenario.outcome(folder)
        tally.faults += [
            f"{name}, run {tally.finished_runs}: {file} differs from the uninterrupted run"
            for file in sorted(expected.keys() | found.keys())
            if expected.get(file) != found.get(file)
        ]
        tally.faults += [f"{name}, run {tally.finished_runs}: left {file} behind" for file in leftovers(folder)]
        if tally.faults:
            break
        shutil.rmtree(folder)
    return tally


def _fork(
    scenario: Scenario,
    work: Callable[[Path], None],
    folder: Path,
    *,
    log: Path,
    after_seconds: float | None = None,
    at_operation: int | None = None,
    file_limit: int | None = None,
) -> Ended:
    """Run `work(folder)` in a forked process, killed as asked, or with no file above file_limit bytes.

    Raises RuntimeError, with its output, when it fails otherwise.
    """
    units = log.with_suffix(".units")
    units.unlink(missing_ok=True)
    operations = log.with_suffix(".operations")
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(scenario, work, folder, log, units, operations, at_operation, file_limit)
    if after_seconds is not None:
        time.sleep(after_seconds)
        os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL) and (file_limit is None or status != _REFUSED):
        raise RuntimeError(f"{folder.name} ended with {status}:\n{log.read_text()[-4000:]}")
    done = units.read_text().split() if units.exists() else []
    count = int(operations.read_text()) if status == 0 else 0
    return Ended(status == -signal.SIGKILL, status == _REFUSED, done, count, time.monotonic() - started)


def _child(
    scenario: Scenario,
    work: Callable[[Path], None],
    folder: Path,
    log: Path,
    units: Path,
    operations: Path,
    at_operation: int | None,
    file_limit: int | None,
) -> None:
    """Never returns."""
    status = 1
    try:
        import torch

        torch.set_num_threads(1)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _note_units(scenario, os.open(units, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        count = _count_operations(folder, at_operation)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        work(folder)
        operations.write_text(str(count[0]))
        status = 0
    except BaseException as error:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            if isinstance(error, (UserError, OSError)):  # what a command shows as one line
                status = _REFUSED
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def _note_units(scenario: Scenario, file: int) -> None:
    """Let every unit of work write its name into `file` before it is done."""
    owner, name, unit = scenario.unit
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        os.write(file, f"{unit(*args, **kwargs)}\n".encode())
        return original(*args, **kwargs)

    setattr(owner, name, noted)


def _count_operations(folder: Path, kill_at: int | None) -> list[int]:
    """Count operations on files below `folder` from now on, and die in front of number `kill_at`."""
    count, below = [0], str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS or not str(arguments[0]).startswith(below):
            return
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


@contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="of each scenario; default 50")
    parser.add_argument("--disks", type=int, default=6, metavar="N", help="full ones for each scenario; default 6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="update the record in the repository")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here and leave everything, to look at it")
    args = parser.parse_args()
    taken = [args.keep / name for name in args.only if args.keep is not None and (args.keep / name).exists()]
    if taken:
        parser.error(f"--keep: there is a {taken[0]} already; name another folder")
    failed = 0
    for name in args.only:
        started = time.monotonic()
        with _scratch(args.keep and args.keep.resolve() / name) as root:
            tally = attack(name, args.kills, args.seed, root, full_disks=args.disks)
        seconds = time.monotonic() - started
        counts = f"{tally.kills} kills, {tally.full_disks} full disks, {tally.finished_runs} runs to the end"
        print(f"{name}: {counts}, {len(tally.faults)} faults, {seconds:.0f} s", flush=True)
        for fault in tally.faults:
            print(f"  {fault}")
        failed += bool(tally.faults)
        if args.record:
            put(RECORD, name, {**vars(tally), "seed": args.seed})
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
