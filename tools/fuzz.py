"""`make fuzz`: damaged, forged and nonsensical files for every reader. Allowed: a named error, or the right answer.

Nine in ten cases are valid files with bytes changed, the others are put together by hypothesis. Not allowed: any other
exception, a crash, more than 20 s, a value that is not what the file says, running code from a file, or opening a file
elsewhere. Each reader runs in a process of its own with limited memory. A case is found again by its number:
`python tools/fuzz.py --only NAME --case NUMBER`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from lab_shared.command import positive_int
from lab_shared.errors import UserError
from readers import ABORTING, READERS
from readers.base import Files, Reader, write
from record_file import put

RECORD = Path(__file__).resolve().parent / "results" / "fuzz.json"
SECONDS_A_CASE = 20.0
MEMORY = 24 << 30
"""Bytes of address space; torch alone maps several."""
_RUNS_CODE = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_CODE = (".py", ".pyc", ".so")
_WORDS = [b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"99999999999999999999", b"null", b"true", b"[]", b"{}",
          b'"', b"../../x", b"/etc/passwd", b"\x00", b"\xff\xfe", b"_", b"\xd9\xa1", b"[" * 3000]  # fmt: skip


class Misread(Exception):
    """A case that a reader got wrong; the message has the case's number and what happened."""


def mutate(files: Files, rng: random.Random) -> dict[str, bytes]:
    """The files with one to six changes in one of them; often near its ends, where headers are."""
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    if rng.random() < 0.01 and len(files) > 1:
        return {other: content for other, content in files.items() if other != name}
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        size = len(data)
        at = min(rng.choice((rng.randrange(size + 1), rng.randrange(200), max(0, size - rng.randrange(200)))), size)
        end = min(size, at + rng.choice((1, 1, 2, 4, 8, 64)))
        kind = rng.randrange(8)
        if kind == 0 and size:
            data[at % size] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:end] = bytes(rng.choice((0, 1, 127, 128, 255)) for _ in range(end - at))
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = data[at:end]
        elif kind == 6:
            data[at : rng.choice((at, end))] = rng.choice(_WORDS)
        else:
            data += bytes(data[:at]) if rng.random() < 0.5 else rng.randbytes(8)
    return {**files, name: bytes(data)}


class Watch:
    """Sees what a reader does beside reading: running code, connecting, opening files elsewhere."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _RUNS_CODE:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith((self.folder, "/proc/", "/sys/", "/dev/")) and not path.endswith(_CODE):
                self.seen.append(f"opened {path}")


@cache
def _watch() -> Watch:
    """One for the process: an audit hook cannot be taken out again."""
    return Watch()


def judge(reader: Reader, files: Files, scratch: Path, watch: Watch) -> str:
    """The name of the error, or "accepted". Raises Misread, AssertionError or whatever the reader raises."""
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write(folder, files)
    watch.seen.clear()
    watch.folder = str(folder)
    try:
        value = reader.read(folder)
    except UserError as error:
        if not str(error).strip() or len(str(error)) > 3000:
            raise Misread(f"an error of {len(str(error))} characters") from error
        return type(error).__name__
    except FileNotFoundError as error:
        if not files.keys() < max(reader.seeds, key=len).keys():
            raise
        return type(error).__name__
    finally:
        watch.folder = None
        if watch.seen:
            raise Misread(f"did more than read: {'; '.join(watch.seen[:3])}")
    reader.check(folder, value)
    return "accepted"


def fuzz(
    name: str,
    cases: int,
    seed: int,
    *,
    only: int | None = None,
    skipped: Collection[int] = (),
    started: Callable[[int], object] | None = None,
) -> dict[str, int]:
    """Outcomes and how often. Raises Misread at the first case that goes wrong.

    only: the number of the one case to judge; skipped: those not to. started: told the number of every case before it
    is judged.
    """
    warnings.simplefilter("ignore")  # a warning about a strange file is no fault
    reader, found, watch = READERS[name](), Counter[str](), _watch()
    number = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:

        def case(files: Files) -> None:
            nonlocal number
            number += 1
            if only not in (None, number) or number in skipped:
                return
            if started is not None:
                started(number)
            try:
                with _time_limit():
                    found[judge(reader, files, Path(root), watch)] += 1
            except Exception as error:
                where = "".join(traceback.format_exception(error)[-6:])
                raise Misread(f"{name}, case {number}: {type(error).__name__}: {str(error)[:300]}\n{where}") from None

        for files in reader.seeds:
            case(files)  # also loads what is imported late, before files are watched
        rng = random.Random(f"{seed}-{name}")
        drawn = cases // 10 if reader.made else 0
        for _ in range(cases - drawn):
            case(mutate(rng.choice(reader.seeds), rng))
        if drawn:
            _with_hypothesis(st.one_of(reader.made), drawn, seed, case)
    return dict(found.most_common())


def _with_hypothesis(strategy: st.SearchStrategy[Files], cases: int, seed: int, case: Any) -> None:
    @hypothesis_seed(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failure is shown as it came: its number finds it again
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(files: Files) -> None:
        case(files)

    run()


@contextmanager
def _time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Misread(f"more than {SECONDS_A_CASE:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(READERS), default=list(READERS), metavar="READER")
    parser.add_argument(
        "--cases", type=positive_int, default=10_000, metavar="N", help="of each reader; default 10,000"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=positive_int, metavar="NUMBER", help="only this one, in this process")
    parser.add_argument("--record", action="store_true", help="update the record in the repository")
    args = parser.parse_args()
    if args.case:
        if len(args.only) != 1:
            parser.error(f"--case {args.case} is of one reader: name it with --only")
        found_there = fuzz(args.only[0], args.cases, args.seed, only=args.case)
        if not found_there:
            parser.error(f"--case {args.case}: --cases {args.cases} have no such number")
        print(found_there)
        return 0
    failed = 0
    for name in args.only:
        started = time.monotonic()
        aborts: list[int] = []
        outcomes, fault, died_at = _in_a_process(name, args.cases, args.seed, aborts)
        while died_at and READERS[name] in ABORTING and len(aborts) < 20:
            aborts.append(died_at)
            outcomes, fault, died_at = _in_a_process(name, args.cases, args.seed, aborts)
        if aborts and not fault:
            outcomes["the process aborted"] = len(aborts)
        total = sum(outcomes.values())
        print(f"{name}: {total:,} cases, {time.monotonic() - started:.0f} s, {outcomes}", flush=True)
        if fault:
            print(f"  {fault}")
        failed += bool(fault)
        if args.record:
            found = {"cases": total, "outcomes": outcomes, "fault": fault, "aborts": aborts, "seed": args.seed}
            put(RECORD, name, found)
    return 1 if failed else 0


def _in_a_process(
    name: str, cases: int, seed: int, skipped: Collection[int]
) -> tuple[dict[str, int], str | None, int | None]:
    """Outcomes, what went wrong, and at which case the process died, if it did: a crash costs this process nothing."""
    read_end, write_end = os.pipe()
    latest = mmap.mmap(-1, 8)  # shared with the child: the number of its case
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries talk about what they are about to raise

        def started(number: int) -> None:
            latest[:] = number.to_bytes(8, "little")
            # A signal does not interrupt compiled code: this ends the process.
            faulthandler.dump_traceback_later(3 * SECONDS_A_CASE, exit=True)

        answer: tuple[dict[str, int], str | None]
        try:
            answer = fuzz(name, cases, seed, skipped=skipped, started=started), None
        except Misread as error:
            answer = {}, str(error)
        except BaseException:
            answer = {}, traceback.format_exc()
        with os.fdopen(write_end, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        number = int.from_bytes(latest[:], "little")
        return {}, f"{name}, case {number}: the process died or hung (status {status})", number
    outcomes, fault = json.loads(text)
    return outcomes, fault, None


if __name__ == "__main__":
    raise SystemExit(main())
