"""The `rh-memory` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch and tyro cost seconds and are loaded by the command that needs them, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lab_shared.command import (
    Program,
    device_flag,
    dry_run_flag,
    engine_flags,
    engine_options,
    job_list,
    json_flag,
    positive_int,
    print_result,
    write_record,
)
from lab_shared.config import field_names
from lab_shared.train_command import TrainWords, add_train, chosen_config, dry_run_text, recorded_time

from rh_memory import __version__
from rh_memory.config import PRESETS, ZEROS

DEFAULT_PRESET = "explicit-small"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error the user can mend (one line on stderr), 2 wrong usage."""
    return program().main(argv)


def program() -> Program:
    """The command with all its subcommands."""
    tool = Program(
        "rh-memory",
        "Mixture-density transformers with memory slots over the spacings of Riemann zeta zeros.",
        __version__,
    )
    add = tool.add

    sub = add("zeros", _zeros, "Compute the first N zeros and verify that none is missing.")
    sub.add_argument("--count", type=positive_int, default=ZEROS, metavar="N", help=f"default: {ZEROS:,}")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="float64 (2, N): centre and offset")
    sub.add_argument("--shards", type=positive_int, metavar="N", help="compute in N jobs; the bytes are the same")
    engine_flags(sub)
    dry_run_flag(sub)
    device_flag(sub)

    sub = add("import", _import, "Check a table of zeros (Odlyzko text, Platt .dat) and write it as FILE.npy.")
    sub.add_argument("table", type=Path, metavar="TABLE")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.npy")

    add_train(
        tool,
        _train,
        "Train a model, score it beside the baselines, write its report.",
        PRESETS,
        about="Train, score on held-out zeros beside the baselines, write the report, print one table. The zeros are\n"
        f"computed (or read, if they were computed before). Without PRESET: {DEFAULT_PRESET}. A field may be named\n"
        "without its section: --slot-id-mode is --model.slot-id-mode.",
        example="e4 --model.slot-id-mode off --optim.lr 5e-4 --steps 20000",
        data="FILE.npy zeros (short for --data.file)",
        out="runs/rh_memory/PRESET-seedS-TIME",
    )

    sub = add("baselines", _baselines, "Score the predictors that need no training, from the marginal to prime phases.")
    _data_flag(sub)
    json_flag(sub)

    sub = add("evaluate", _evaluate, "Score a run beside the baselines, in nats per unfolded spacing.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    _data_flag(sub)
    device_flag(sub)
    json_flag(sub)

    sub = add("diagnose", _diagnose, "What a memory does: diagnostics A to K, of one run or of several seeds.")
    sub.add_argument("runs", metavar="RUN|GLOB", help="a run folder, or a quoted pattern such as 'runs/e4-seed*'")
    sub.add_argument("--legacy", action="store_true", help="by the seed's formulas instead, vacuous ones marked")
    sub.add_argument("--windows", type=positive_int, metavar="N", help="fixed windows to test on")
    _data_flag(sub)
    device_flag(sub)
    json_flag(sub)

    sub = add("physics", _physics, "Statistics of the zeros beside theory; with a run, which primes it has learned.")
    sub.add_argument("run_dir", type=Path, nargs="?", metavar="RUN")
    sub.add_argument("--zeros", type=positive_int, metavar="N", help="only the last N zeros")
    _data_flag(sub)
    device_flag(sub)
    json_flag(sub)

    sub = add("report", _report, "Rebuild a run's HTML report from its saved arrays.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")

    sub = add("sweep", _sweep, "Train presets over seeds, several at a time, skipping what is done.")
    sub.add_argument("presets", nargs="+", choices=PRESETS, metavar="PRESET")
    sub.add_argument("--seeds", nargs="+", type=int, default=[7, 42, 1337], metavar="S")
    sub.add_argument("--source", choices=["zeta", "shuffled", "gue"], default="zeta", help="other data are controls")
    sub.add_argument("--steps", type=positive_int, metavar="N", help="instead of the preset's")
    sub.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other fields, as data.mirror=true optim.ema=0.999"
    )
    sub.add_argument("--out", type=Path, default=Path("runs/rh_memory/sweep"), metavar="DIR")
    sub.add_argument("--diagnose", action="store_true", help="follow each run by its diagnostics")
    sub.add_argument("--collect", type=Path, metavar="DIR", help="copy the runs' small files here, for keeping")
    engine_flags(sub)
    dry_run_flag(sub)

    sub = add("collect", _collect, "Copy the small files of runs, all that verdicts need, into one folder.")
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = add("verdicts", _verdicts, "Judge the claims about memory by runs over seeds; tables of all scores.")
    sub.add_argument("runs", nargs="+", metavar="DIR|GLOB", help="folders of runs, and files of `diagnose --json`")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here as well")
    json_flag(sub)

    sub = add("bench", _bench, "Measure training: windows and targets per second of every preset; or computing zeros.")
    sub.add_argument("presets", nargs="*", metavar="PRESET", help="default: those that suit the device")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--zeros", type=positive_int, nargs="+", metavar="N", help="computing the first N zeros instead")
    sub.add_argument("--quick", action="store_true", help="fewer repeats; figures are rough")
    device_flag(sub)
    json_flag(sub)
    return tool


def _data_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", type=Path, metavar="FILE.npy", help="zeros; default: the first two million, computed")


def _zeros(args: argparse.Namespace) -> None:
    from lab_shared.runs import pick_device

    device, engine = pick_device(args.device).type, engine_options(args)
    if args.dry_run:
        from rh_memory.zeros.generate import checked, chunk_borders

        checked(args.out, args.count)
        chunk_borders(args.count, device)
        time = recorded_time(_record("zeros"), args.count, "zeros_per_s")
        print(f"would compute {args.count:,} zeros into {args.out}, {args.count * 16:,} bytes, {time}")
        return
    if args.shards is None:
        from rh_memory.zeros.generate import main as generate

        generate(args.count, args.out, device)
    else:
        from rh_memory.zeros.shards import generate_sharded

        generate_sharded(args.count, args.out, device, shards=args.shards, **engine)
    print(args.out)


def _import(args: argparse.Namespace) -> None:
    from rh_memory.zeros.tables import import_table

    import_table(args.table, args.out)
    print(args.out)


def _baselines(args: argparse.Namespace) -> None:
    from rh_memory.baselines import main as baselines

    baselines(json=args.json, data=args.data)


def _evaluate(args: argparse.Namespace) -> None:
    from rh_memory.evaluate import main as evaluate

    evaluate(args.run_dir, json=args.json, data=args.data, device=args.device)


def _diagnose(args: argparse.Namespace) -> None:
    from rh_memory.diagnostics import main as diagnose

    diagnose(args.runs, args.legacy, args.json, data=args.data, device=args.device, windows=args.windows)


def _physics(args: argparse.Namespace) -> None:
    from rh_memory.physics import main as physics

    physics(args.run_dir, data=args.data, json=args.json, device=args.device, zeros=args.zeros)


def _report(args: argparse.Namespace) -> None:
    from rh_memory.report import write

    print(write(args.run_dir))


def _sweep(args: argparse.Namespace) -> None:
    from rh_memory.sweep import sweep, sweep_jobs

    what = {"source": args.source, "steps": args.steps, "fields": args.set, "diagnose": args.diagnose}
    if args.dry_run:
        jobs = sweep_jobs(args.presets, args.seeds, **what)
        print(job_list([job.name for job in jobs], args.out))
        return
    print(sweep(args.presets, args.seeds, args.out, **what, collect_in=args.collect, **engine_options(args)))


def _collect(args: argparse.Namespace) -> None:
    from rh_memory.records import collect

    for folder in collect(args.runs, args.out):
        print(folder)


def _verdicts(args: argparse.Namespace) -> None:
    from rh_memory.verdicts import main as verdicts

    verdicts(args.runs, json=args.json, markdown_file=args.markdown)


def _bench(args: argparse.Namespace) -> None:
    if args.zeros:
        from lab_shared.bench import environment
        from lab_shared.runs import pick_device

        from rh_memory.zeros.bench import bench_zeros

        device = pick_device(args.device)
        counted = bench_zeros(device, args.zeros, 1 if args.quick else 3)
        lines = [f"{r['count']:14,} zeros {r['seconds']:8.2f} s {r['zeros_per_s']:14,.0f}/s" for r in counted]
        found = {"environment": environment(device), "rows": counted}
        write_record(args.out, found)
        print_result(found | {"text": "\n".join(lines)}, args.json)
        return
    from rh_memory.bench import bench, table

    rows = bench(args.device, args.presets, repeats=3 if args.quick else None)
    write_record(args.out, rows)
    print(json.dumps(rows) if args.json else table(rows))


def _train(parser: argparse.ArgumentParser, words: TrainWords) -> None:
    args, preset = words.args, words.name or DEFAULT_PRESET
    config = chosen_config(PRESETS, preset, with_sections(words.fields), parser.prog, data__file=args.data)
    if args.dry_run:
        windows = config.steps * config.batch_size
        facts = {
            "data": config.data.file or f"{config.data.zeros:,} spacings ({config.data.source})",
            "work": f"{config.steps:,} steps of {config.batch_size} windows",
            "time": recorded_time(_record("rh-memory"), windows, "windows_per_s", f"train {preset}"),
        }
        print(dry_run_text(f"{preset}, seed {config.seed}", config, facts))
        return
    from rh_memory.train import resume, train

    text = resume(args.resume) if args.resume is not None else train(config, args.out, name=preset)
    if text is not None:  # rank 0
        print(text)


def with_sections(words: Sequence[str]) -> list[str]:
    """The words with the section put in front of fields named without it: --slot-id-mode is --model.slot-id-mode.

    The seed's flags had no sections, so each of them works under its name. Where two sections have a field of that
    name nothing is changed. --use-amp and --compile without a value mean True.
    """
    names = field_names(PRESETS[DEFAULT_PRESET][1])
    often = Counter(name.rpartition(".")[2] for name in names)
    section = {field: path for path, _, field in (name.rpartition(".") for name in names) if often[field] == 1 and path}
    found = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        field = word.removeprefix("--").partition("=")[0].replace("-", "_")
        path = section.get(field, section.get(field.removeprefix("no_")))
        found.append(f"--{path}.{word.removeprefix('--')}" if path and word.startswith("--") else word)
        if word in ("--use-amp", "--compile") and following.startswith("--"):
            found.append("True")
    return found


def _record(name: str) -> Path:
    """The bench record of such a machine as this."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Path(__file__).parents[2] / "results" / "bench" / f"{name}-{device}.json"


if __name__ == "__main__":
    raise SystemExit(main())
