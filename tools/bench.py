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
from pathlib import Path
from typing import Any

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda when there is one")
    parser.add_argument("--only", nargs="*", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--record", action="store_true", help="replace the records in the repository")
    args = parser.parse_args()
    device = args.device
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = []
    for name in args.only:
        command, record = SUITES[name]
        print(f"== {name} on {device}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            command = [*command, "--device", device, "--out", str(out)]
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                failed.append(name)
                continue
            kept = ROOT / f"{record}-{device}.json"
            if kept.exists():
                compare(json.loads(kept.read_text()), json.loads(out.read_text()))
            if args.record:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(out.read_text())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def compare(before: Any, now: Any) -> None:
    """Print every rate that both records hold, and their ratio."""
    old, new = rates(before), rates(now)
    for name in old.keys() & new.keys():
        print(f"  {name:40} {new[name]:14,.0f}   last record {old[name]:14,.0f}   x{new[name] / old[name]:.2f}")


def rates(record: Any) -> dict[str, float]:
    """Row -> its first rate, of a record that is a list of rows or holds one under "rows"."""
    rows = record if isinstance(record, list) else record.get("rows", [])
    found = {}
    for row in rows:
        rate = next((value for key, value in row.items() if key.endswith("_per_s") and value), None)
        if rate is not None:
            found[row.get("stage") or row["name"]] = rate
    return found


if __name__ == "__main__":
    raise SystemExit(main())
