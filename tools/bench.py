"""`make bench`: the whole speed suite on this machine, measured beside required and beside the last record.

Each suite writes its own JSON; the records kept in the repository lie in results/bench/ of the part they measure, one
file per device. A new record replaces the old one only with --record.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.speeds import Speed, limit, plain, speeds
from lab_shared.command import write_record
from lab_shared.files import make_folder

ROOT = Path(__file__).resolve().parent.parent
SUITES = {
    "attention": ([sys.executable, "tools/bench_attention.py"], "shared/results/bench/attention"),
    "optim": ([sys.executable, "tools/bench_optim.py"], "shared/results/bench/optim"),
    "iceaggr": ([sys.executable, "-m", "iceaggr", "bench"], "packages/iceaggr/results/bench/iceaggr"),
    "rh-memory": ([sys.executable, "-m", "rh_memory", "bench"], "packages/rh_memory/results/bench/rh-memory"),
    "attn-clustering": (
        [sys.executable, "-m", "attn_clustering", "bench"],
        "packages/attn_clustering/results/bench/attn-clustering",
    ),
    "gauge-attn": ([sys.executable, "-m", "gauge_attn", "bench"], "packages/gauge_attn/results/bench/gauge-attn"),
}
SLOWER_BELOW = 0.8
"""A speed below this share of the last record's is flagged. Timings of shared machines vary by 30% and more."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu or cuda; default: cuda when there is one")
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--record", action="store_true", help="replace the records in the repository")
    parser.add_argument("--out", type=Path, help="write what was measured, required and recorded into this JSON file")
    args = parser.parse_args()
    device = args.device
    if args.out is not None:
        make_folder(args.out.parent)  # what is wrong with the path is better known before the hour than after it
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    failed, found = [], {}
    for name in args.only:
        command, kept = SUITES[name]
        print(f"== {name} on {device}", flush=True)
        record = run(command, device)
        if record is None:
            failed.append(name)
            continue
        path = ROOT / f"{kept}-{device}.json"
        found[name] = compare(record, json.loads(path.read_text()) if path.is_file() else [])
        print(text(found[name]), flush=True)
        if args.record:
            write_record(path, record)
    write_record(args.out, {"device": device, "suites": found})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(command: Sequence[str], device: str) -> Any | None:
    """The record that a suite writes; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        ended = subprocess.run([*command, "--device", device, "--out", str(out)], cwd=ROOT, check=False)
        return None if ended.returncode else json.loads(out.read_text())


def compare(now: Any, before: Any) -> list[dict[str, Any]]:
    """A row per speed: what was measured, what is required, and how many times as fast as in the last record."""
    last = speeds(before)
    rows = [_row(speed, last.get(name)) for name, speed in speeds(now).items()]
    judged = now.get("requirements", []) if isinstance(now, Mapping) else []
    words = {True: "met", False: "NOT met"}
    return rows + [
        {"name": r["what"], "value": r["measured"], "unit": "", "required": r["required"], "met": words[r["met"]]}
        for r in judged
    ]


def _row(speed: Speed, last: Speed | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": speed.name, "value": speed.value, "unit": speed.unit, "met": speed.met}
    if speed.required is not None:
        row["required"] = f"{'<=' if speed.at_most else '>='} {limit(speed.required)}"
    if last is not None and last.unit == speed.unit:
        row |= {"ratio": speed.over(last), "slower": speed.over(last) < SLOWER_BELOW}
    return row


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned lines."""
    lines = [f"  {'':46}{'measured':>14} {'':10}{'required':>14} {'':8} of the last record"]
    for row in rows:
        ratio = f"x{row['ratio']:.2f}{'  SLOWER' if row['slower'] else ''}" if "ratio" in row else ""
        measured = f"{plain(row['value']):>14} {row['unit']:10}"
        lines.append(f"  {row['name']:46}{measured}{row.get('required', ''):>14} {row['met']:8} {ratio}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
