"""Training speed of 1 process against several of this machine, each with a GPU (or on the CPU, to try it out).

python tools/bench_scaling.py --processes 1 2 --out scaling.json

Weak scaling: every process has the batch that one has alone. What runs are the packages' own train commands under
torchrun; the figures are the speeds they log, data and optimiser included, the first half of each run left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.bench import environment
from lab_shared.command import positive_int, write_record
from lab_shared.dist import torchrun
from lab_shared.run import read_metrics

ROOT = Path(__file__).resolve().parent.parent
NEVER = "1000000"
REQUIRED = 1.8
"""Speed of 2 GPUs over that of 1."""


Command = Callable[[int, int, Path], list[str]]
"""(processes, log lines, folder for data) -> a program and its arguments."""


class Case(NamedTuple):
    """A training, and what its log counts."""

    unit: str
    command: Command
    required: float | None


def iceaggr(preset: str, events: int, per_line: int) -> Command:
    """The preset on simulated events; per_line: how many a process sees between two log lines."""

    def command(processes: int, lines: int, folder: Path) -> list[str]:
        sizes = {"data.train-events": events, "data.val-events": 500, "epochs": lines * per_line * processes / events}
        quiet = {"eval-every": NEVER, "checkpoint-every": NEVER, "wandb": "disabled", "log-every": 10, "oracle": 0}
        return ["-m", "iceaggr", "train", preset, *_flags({**sizes, **quiet, "data.store": folder / "store"})]

    return command


def language_model(experiment: str, batch: int, step_graph: str = "auto") -> Command:
    """The experiment's first condition; batch: sequences of a process per step. step_graph: of the package's config."""

    def command(processes: int, lines: int, folder: Path) -> list[str]:
        sizes = {"batch": batch * processes, "eval-sequences": batch * processes, "steps": 10 * lines}
        quiet = {"eval-every": NEVER, "checkpoint-every": NEVER, "log-every": 10}
        options = {**sizes, **quiet, "step-graph": step_graph}
        flags = _flags({f"optim.{name}": value for name, value in options.items()})
        return ["-m", "attn_clustering", "train", "mha-shuffled", "--experiment", experiment, *flags]

    return command


CASES = {
    "cuda": {
        "iceaggr 5M": Case("events", iceaggr("5M", 400_000, 45_000), REQUIRED),
        "iceaggr small": Case("events", iceaggr("small", 400_000, 45_000), None),
        "27M language model": Case("tokens", language_model("faithful-v1", 64), REQUIRED),
        "27M, one graph a step": Case("tokens", language_model("faithful-v1", 64, "on"), REQUIRED),
    },
    "cpu": {
        "iceaggr quick": Case("events", iceaggr("quick", 2_000, 700), None),
        "smoke language model": Case("tokens", language_model("smoke", 8), None),
    },
}


def _flags(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def speeds(case: Case, processes: int, lines: int, folder: Path, device: str) -> list[float]:
    """Train once; the speeds of all processes together, in units per second, of the log lines of the second half."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    command = [*case.command(processes, lines, folder), "--out", str(out)]
    program = torchrun(processes, *command) if processes > 1 else [sys.executable, *command]
    variables = dict(os.environ)
    if device == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(program, cwd=ROOT, env=variables, check=True, stdout=sys.stderr)
    logged = [record[f"{case.unit}_per_s"] for record in read_metrics(out, "train")]
    return logged[len(logged) // 2 :]


def measure(name: str, case: Case, counts: list[int], repeats: int, lines: int, device: str) -> list[dict[str, Any]]:
    """A row for each number of processes: the median speed, its quartiles, and how many times that of the first."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in counts:
            found = [v for _ in range(repeats) for v in speeds(case, processes, lines, Path(folder), device)]
            low, median, high = np.percentile(found, [25, 50, 75]).tolist()
            speedup = median / (rows[0][f"{case.unit}_per_s"] if rows else median)
            required = case.required if (counts[0], processes) == (1, 2) else None
            rows.append(
                {
                    "name": f"{name} x {processes}",
                    "processes": processes,
                    f"{case.unit}_per_s": median,
                    "quartiles": [low, high],
                    "intervals": len(found),
                    "speedup": speedup,
                    "required": required,
                    "met": None if required is None else speedup >= required,
                }
            )
            print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    rate = next(value for key, value in row.items() if key.endswith("_per_s"))
    low, high = row["quartiles"]
    required = "" if row["required"] is None else f"  required {row['required']:.1f}x"
    return f"{row['name']:26} {rate:14,.0f}/s  [{low:,.0f}, {high:,.0f}]  {row['speedup']:5.2f}x{required}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=positive_int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--device", choices=list(CASES), default="cuda" if torch.cuda.is_available() else "cpu")
    names = "; ".join(f"{device}: {', '.join(cases)}" for device, cases in CASES.items())
    parser.add_argument("--only", nargs="+", metavar="CASE", help=names)
    parser.add_argument(
        "--repeats", type=positive_int, default=1, metavar="N", help="trainings of each kind; default 1"
    )
    parser.add_argument(
        "--lines", type=positive_int, metavar="N", help="log lines of ten steps each; default 16, on a CPU 4"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    args = parser.parse_args()
    cases = CASES[args.device]
    if unknown := set(args.only or []) - cases.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: on {args.device} there are {', '.join(cases)}")
    lines = args.lines or (16 if args.device == "cuda" else 4)
    try:
        rows = [
            row
            for name in args.only or cases
            for row in measure(name, cases[name], args.processes, args.repeats, lines, args.device)
        ]
    except subprocess.CalledProcessError as error:
        print(f"a training ended with exit code {error.returncode}: its own message is above", file=sys.stderr)
        return 1
    record = {
        "command": " ".join(["python", "tools/bench_scaling.py", *sys.argv[1:]]),
        "environment": environment(args.device, ROOT),
        "label": "simulated events and a generated language; every process with the batch of one",
        "rows": rows,
    }
    print("\n".join(line(row) for row in rows))
    write_record(args.out, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
