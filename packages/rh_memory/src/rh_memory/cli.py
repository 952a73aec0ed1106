"""The `rh-memory` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch and tyro cost seconds and are loaded by the command that needs them, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab_shared.command import device_flag, json_flag, positive_int, run_command

from rh_memory import __version__
from rh_memory.config import PRESETS, ZEROS, TrainConfig

DEFAULT_PRESET = "explicit-small"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return run_command("rh-memory", _train, argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return run_command("rh-memory", args.run, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rh-memory",
        description="Mixture-density transformers with memory slots over the spacings of Riemann zeta zeros.",
    )
    parser.add_argument("--version", action="version", version=f"rh-memory {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = add("zeros", _zeros, "Compute the first N zeros and verify that none is missing.")
    sub.add_argument("--count", type=positive_int, default=ZEROS, metavar="N", help=f"default: {ZEROS:,}")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="float64 (2, N): centre and offset")
    device_flag(sub)

    sub = add("import", _import, "Check a table of zeros (Odlyzko text, Platt .dat) and write it as FILE.npy.")
    sub.add_argument("table", type=Path, metavar="TABLE")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.npy")

    commands.add_parser("train", help="Train a model, score it beside the baselines, write its report.")

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
    sub.add_argument("--legacy", action="store_true", help="with the seed's formulas, vacuous ones marked")
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
    sub.add_argument("--out", type=Path, default=Path("runs/rh-memory/sweep"), metavar="DIR")
    sub.add_argument("--diagnose", action="store_true", help="follow each run by its diagnostics")
    sub.add_argument("--collect", type=Path, metavar="DIR", help="copy the runs' small files here, for keeping")
    sub.add_argument("--engine", choices=("local", "ray"), default="local")
    sub.add_argument("--address", help="Ray cluster; default: a new one on this machine")
    sub.add_argument("--workers", type=positive_int, metavar="N", help="runs at a time; default: GPUs / gpus-per-job")
    sub.add_argument("--gpus-per-job", type=float, default=1.0, metavar="F", help="a fraction shares one GPU")

    sub = add("collect", _collect, "Copy the small files of runs, all that verdicts need, into one folder.")
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = add("verdicts", _verdicts, "Judge the claims about memory by runs over seeds; tables of all scores.")
    sub.add_argument("runs", nargs="+", metavar="DIR|GLOB", help="folders of runs, and files of `diagnose --json`")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here as well")
    json_flag(sub)

    sub = add("bench", _bench, "Measure training: windows and targets per second of every preset.")
    sub.add_argument("presets", nargs="*", metavar="PRESET", help="default: those that suit the device")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    device_flag(sub)
    json_flag(sub)
    return parser


def _data_flag(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", type=Path, metavar="FILE.npy", help="zeros; default: the first two million, computed")


def _zeros(args: argparse.Namespace) -> None:
    from rh_memory.evaluate import pick_device
    from rh_memory.zeros.generate import main as generate

    generate(args.count, args.out, pick_device(args.device).type)
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
    from rh_memory.sweep import sweep

    where = {name: getattr(args, name) for name in ("engine", "address", "workers", "gpus_per_job")}
    follow = {"diagnose": args.diagnose, "collect_in": args.collect}
    print(sweep(args.presets, args.seeds, args.out, source=args.source, steps=args.steps, **follow, **where))


def _collect(args: argparse.Namespace) -> None:
    from rh_memory.records import collect

    for folder in collect(args.runs, args.out):
        print(folder)


def _verdicts(args: argparse.Namespace) -> None:
    from rh_memory.verdicts import main as verdicts

    verdicts(args.runs, json=args.json, markdown_file=args.markdown)


def _bench(args: argparse.Namespace) -> None:
    from rh_memory.bench import bench, table

    rows = bench(args.device, args.presets)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows) if args.json else table(rows))


def _train(argv: list[str]) -> None:
    args, preset, overrides = _train_arguments(argv)
    if args.resume is not None:
        from rh_memory.train import resume

        text = resume(args.resume)
    else:
        config = _train_config(preset or DEFAULT_PRESET, overrides)
        from rh_memory.train import train

        text = train(config, args.out, name=preset or DEFAULT_PRESET)
    if text is not None:  # rank 0
        print(text)


def _train_arguments(argv: list[str]) -> tuple[argparse.Namespace, str | None, list[str]]:
    """Split `rh-memory train` arguments into ours, the preset's name, and overrides of configuration fields."""
    presets = "\n".join(f"  {name:<19} {text}" for name, (text, _) in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="rh-memory train",
        usage="rh-memory train [PRESET] [--out RUN] [--seed S] [--FIELD VALUE ...]\n"
        "       rh-memory train --resume RUN",
        description="Train, score on held-out zeros beside the baselines, write the report, print one table. The zeros "
        "are computed (or read, if they\nwere computed before).\n\npresets:\n" + presets,
        epilog="Every field of the configuration can be set: `rh-memory train PRESET --help` lists them, for example\n"
        "  rh-memory train e4 --model.slot-id-mode off --optim.lr 5e-4 --steps 20000\n"
        f"Without PRESET: {DEFAULT_PRESET}. Under torchrun the same command uses every process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where a stopped run left off")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder; default: runs/rh-memory/PRESET-seedS-TIME")
    parser.add_argument("-h", "--help", action="store_true")
    preset = argv[0] if argv and not argv[0].startswith("-") else None
    args, overrides = parser.parse_known_args(argv[1:] if preset else argv)
    if preset is not None and preset not in PRESETS:
        parser.error(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if args.help:
        if preset is None:
            parser.print_help()
            raise SystemExit(0)
        overrides.append("--help")
    if args.resume is not None and (preset or overrides or args.out):
        parser.error("--resume takes no other option: the run folder holds its configuration")
    return args, preset, overrides


def _train_config(preset: str, overrides: list[str]) -> TrainConfig:
    """tyro is needed for overrides only: training a preset as it is works without it."""
    if not overrides:
        return PRESETS[preset][1]
    from lab_shared.config import preset_cli

    return preset_cli(PRESETS, [preset, *overrides], prog="rh-memory train")


if __name__ == "__main__":
    raise SystemExit(main())
