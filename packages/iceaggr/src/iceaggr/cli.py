"""The `iceaggr` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch, polars and tyro cost seconds and are loaded by the command that needs
them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab_shared.command import device_flag, json_flag, positive_int, run_command

from iceaggr import __version__
from iceaggr.config import PRESETS, TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return run_command("iceaggr", _train, argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return run_command("iceaggr", args.run, args)


def train_main() -> int:
    """Entry point `iceaggr-train`: the same as `iceaggr train`."""
    return main(["train", *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iceaggr", description="IceCube neutrino direction reconstruction over Kaggle-format pulses."
    )
    parser.add_argument("--version", action="version", version=f"iceaggr {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = add("simulate", _simulate, "Simulate events into a Kaggle-format folder with a truth table beside it.")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--events", type=positive_int, required=True, metavar="N", help="accepted (triggered) events")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    sub.add_argument("--device", default=None, help="cpu or cuda; default: cuda when there is one")
    sub.add_argument("--geometry", type=Path, metavar="CSV", help="sensor_geometry.csv; default: the 86-string array")
    sub.add_argument("--events-per-file", type=positive_int, default=200_000, metavar="N")

    sub = add("inspect", _inspect, "Figures of any Kaggle-format folder beside the published ones of the real data.")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--events", type=positive_int, default=200_000, metavar="N", help="look at the first N events")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="also draw Q-Q plots against the published quantiles")
    json_flag(sub)

    sub = add("cache", _cache, "Convert a Kaggle-format folder into the binary event store training reads.")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--out", type=Path, required=True, metavar="CACHE")
    sub.add_argument("--verify", action="store_true", help="re-read every byte and compare checksums")
    json_flag(sub)

    commands.add_parser("train", help="Train a model; without --data it simulates the events it trains on.")

    sub = add("evaluate", _evaluate, "Score a run on labelled events it was not trained on, beside the baselines.")
    _run_and_data(sub)
    sub.add_argument("--drop-seen", action="store_true", help="skip events the run was trained on instead of refusing")
    json_flag(sub)

    sub = add(
        "predict",
        _predict,
        "Write a Kaggle submission (event_id, azimuth, zenith) plus the confidence kappa.",
    )
    _run_and_data(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    sub.add_argument("--strict", action="store_true", help="only the three columns the competition scores")

    sub = add("report", _report, "Rebuild a run's HTML report from its saved arrays.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")

    sub = add("display", _display, "Draw one event in 3D as a self-contained HTML page.")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--event", type=int, required=True, metavar="ID")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.html")
    sub.add_argument("--model", type=Path, metavar="RUN", help="also draw this run's prediction")
    device_flag(sub)

    sub = add("bench", _bench, "Measure every stage: simulate, cache, group, train, predict.")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--only", nargs="*", metavar="STAGE", help="simulate cache group train infer")
    sub.add_argument("--quick", action="store_true", help="seconds instead of minutes; figures are rough")
    device_flag(sub)
    json_flag(sub)
    return parser


def _run_and_data(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="Kaggle-format folder")
    sub.add_argument("--events", type=positive_int, metavar="N", help="only the first N events")
    device_flag(sub)


def _print(text: str, value: Any, as_json: bool) -> None:
    print(json.dumps(value) if as_json else text)


def _simulate(args: argparse.Namespace) -> None:
    from iceaggr.data.prepare import simulate

    simulate(
        args.out,
        args.events,
        seed=args.seed,
        device=args.device,
        geometry=args.geometry,
        events_per_file=args.events_per_file,
    )
    print(args.out)


def _inspect(args: argparse.Namespace) -> None:
    from iceaggr.inspection import inspect_folder

    result = inspect_folder(args.folder, max_events=args.events, plot=args.plot)
    _print(result.pop("text"), result, args.json)


def _cache(args: argparse.Namespace) -> None:
    from iceaggr.data.prepare import cache_folder

    summary = cache_folder(args.folder, args.out, verify=args.verify)
    _print("\n".join(f"{key:>16}  {value}" for key, value in summary.items()), summary, args.json)


def _train(argv: list[str]) -> None:
    args, preset, overrides = _train_arguments(argv)
    from iceaggr.train import resume, train

    if args.resume is not None:
        table = resume(args.resume)
    else:
        preset = preset or _default_preset()
        table = train(_train_config(args, preset, overrides), args.out, name=preset)
    if table is not None:  # rank 0
        print(table)


def _train_arguments(argv: list[str]) -> tuple[argparse.Namespace, str | None, list[str]]:
    """Split `iceaggr train` arguments into ours, the preset's name, and overrides of configuration fields."""
    presets = "\n".join(f"  {name:<10} {text}" for name, (text, _) in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="iceaggr train",
        usage="iceaggr train [PRESET] [--data DIR] [--out RUN] [--seed S] [--FIELD VALUE ...]\n"
        "       iceaggr train --resume RUN",
        description="Train, evaluate on held-out events beside the baselines, write the report, print one table.\n"
        "Without --data it simulates its events (or reuses those it simulated before).\n\npresets:\n" + presets,
        epilog="Every field of the configuration can be set: `iceaggr train PRESET --help` lists them, for example\n"
        "  iceaggr train small --data DIR --optim.lr 1e-3 --epochs 20\n"
        "Without PRESET: quick on a CPU, small on a GPU. Under torchrun the same command uses every process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where a stopped run left off")
    parser.add_argument("--data", metavar="DIR", help="Kaggle-format folder (short for --data.data)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder; default: runs/iceaggr/PRESET-seedS-TIME")
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
    if args.resume is not None and (preset or overrides or args.out or args.data):
        parser.error("--resume takes no other option: the run folder holds its configuration")
    return args, preset, overrides


def _default_preset() -> str:
    import torch

    return "small" if torch.cuda.is_available() else "quick"


def _train_config(args: argparse.Namespace, preset: str, overrides: list[str]) -> TrainConfig:
    from dataclasses import replace

    from lab_shared.config import preset_cli

    config = preset_cli(PRESETS, [preset, *overrides], prog="iceaggr train")
    return config if args.data is None else replace(config, data=replace(config.data, data=args.data))


def _evaluate(args: argparse.Namespace) -> None:
    from iceaggr.evaluate import evaluate_folder

    result = evaluate_folder(
        args.run_dir, args.data, max_events=args.events, device=args.device, drop_seen=args.drop_seen
    )
    _print(result.pop("text"), result, args.json)


def _predict(args: argparse.Namespace) -> None:
    from iceaggr.predict import predict_folder

    n = predict_folder(
        args.run_dir, args.data, args.out, max_events=args.events, device=args.device, strict=args.strict
    )
    print(f"{n:,} events -> {args.out}", file=sys.stderr)


def _report(args: argparse.Namespace) -> None:
    from iceaggr.report import write_report

    print(write_report(args.run_dir))


def _display(args: argparse.Namespace) -> None:
    from iceaggr.predict import display_event

    display_event(args.folder, args.event, args.out, run_dir=args.model, device=args.device)
    print(args.out)


def _bench(args: argparse.Namespace) -> None:
    from iceaggr.bench import bench

    result = bench(device=args.device, only=args.only, quick=args.quick)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({k: v for k, v in result.items() if k != "text"}, indent=1) + "\n")
    _print(result.pop("text"), result, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
