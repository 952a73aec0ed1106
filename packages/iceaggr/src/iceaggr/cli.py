"""The `iceaggr` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch, polars and tyro cost seconds and are loaded by the command that needs
them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lab_shared.command import (
    Program,
    device_flag,
    dry_run_flag,
    engine_flags,
    engine_options,
    json_flag,
    positive_int,
    print_result,
    write_record,
)
from lab_shared.train_command import TrainWords, add_train, chosen_config, dry_run_text, recorded_time

from iceaggr import __version__
from iceaggr.cli_studies import add_studies, need_data_to_drop, whole_number
from iceaggr.config import PRESETS, TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error the user can mend (one line on stderr), 2 wrong usage."""
    return program().main(argv)


def train_main() -> int:
    """Entry point `iceaggr-train`: the same as `iceaggr train`."""
    return main(["train", *sys.argv[1:]])


def program() -> Program:
    """The command with all its subcommands."""
    tool = Program("iceaggr", "IceCube neutrino direction reconstruction over Kaggle-format pulses.", __version__)
    add = tool.add

    sub = add("simulate", _simulate, "Simulate events into a Kaggle-format folder with a truth table beside it.")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--events", type=positive_int, required=True, metavar="N", help="accepted (triggered) events")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    device_flag(sub)
    sub.add_argument("--geometry", type=Path, metavar="CSV", help="sensor_geometry.csv; default: the 86-string array")
    sub.add_argument("--events-per-file", type=positive_int, default=200_000, metavar="N")
    sub.add_argument("--shards", type=positive_int, metavar="N", help="simulate in N jobs; the bytes are the same")
    engine_flags(sub)
    dry_run_flag(sub)

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

    add_train(
        tool,
        _train,
        "Train a model; without --data it simulates the events it trains on.",
        PRESETS,
        about="Train, evaluate on held-out events beside the baselines, write the report, print one table.\n"
        "Without --data it simulates its events (or reuses those it simulated before). Without PRESET: quick on a\n"
        "CPU, small on a GPU.",
        example="small --data DIR --optim.lr 1e-3 --epochs 20",
        data="DIR Kaggle-format folder (short for --data.data)",
        out="runs/iceaggr/PRESET-seedS-TIME",
    )

    sub = add("evaluate", _evaluate, "Score a run on labelled events it was not trained on, beside the baselines.")
    _run_and_data(sub, "labelled folder; default: the run's own held-out events, and the scores are kept in RUN")
    sub.add_argument("--drop-seen", action="store_true", help="skip events the run was trained on instead of refusing")
    sub.add_argument(
        "--oracle", type=whole_number, default=0, metavar="N", help="fit the simulator's likelihood to N of them"
    )
    json_flag(sub)

    sub = add(
        "predict",
        _predict,
        "Write a Kaggle submission (event_id, azimuth, zenith) plus the confidence kappa.",
    )
    _run_and_data(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    sub.add_argument("--strict", action="store_true", help="only the three columns the competition scores")
    sub.add_argument("--split", choices=("auto", "train", "test"), default="auto", help="auto: test where there is one")

    sub = add("report", _report, "Rebuild a run's HTML report from its saved arrays.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")

    sub = add("display", _display, "Draw one event: a self-contained 3D page that plays in event time, or a still.")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--event", type=int, required=True, metavar="ID")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.html|png")
    sub.add_argument("--model", type=Path, metavar="RUN", help="also draw this run's prediction")
    device_flag(sub)

    sub = add("bench", _bench, "Measure every stage: simulate, cache, group, train, predict.")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--only", nargs="*", metavar="STAGE", help="simulate cache group train infer hierarchical")
    sub.add_argument("--quick", action="store_true", help="seconds instead of minutes; figures are rough")
    device_flag(sub)
    json_flag(sub)

    add_studies(add)
    return tool


def _run_and_data(sub: argparse.ArgumentParser, without: str | None = None) -> None:
    """without: what happens without --data; None where it is needed."""
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--data", type=Path, required=without is None, metavar="DIR", help=without or "Kaggle folder")
    sub.add_argument("--events", type=positive_int, metavar="N", help="only the first N events")
    device_flag(sub)


def _simulate(args: argparse.Namespace) -> None:
    names = ("seed", "device", "geometry", "events_per_file")
    options, engine = {name: getattr(args, name) for name in names}, engine_options(args)
    if args.dry_run:
        time = recorded_time(_record(), args.events, "events_per_s", "simulate")
        files = -(-args.events // args.events_per_file)
        print(f"would simulate {args.events:,} events in {files:,} files under {args.out}, {time}")
        return
    if args.shards is None:
        from iceaggr.data.prepare import simulate

        simulate(args.out, args.events, **options)
    else:
        from iceaggr.sim.shards import simulate_sharded

        simulate_sharded(args.out, args.events, shards=args.shards, **options, **engine)
    print(args.out)


def _inspect(args: argparse.Namespace) -> None:
    from iceaggr.inspection import inspect_folder

    result = inspect_folder(args.folder, max_events=args.events, plot=args.plot)
    print_result(result, args.json)


def _cache(args: argparse.Namespace) -> None:
    from iceaggr.data.prepare import cache_folder

    summary = cache_folder(args.folder, args.out, verify=args.verify)
    print_result(summary | {"text": "\n".join(f"{key:>16}  {value}" for key, value in summary.items())}, args.json)


def _train(parser: argparse.ArgumentParser, words: TrainWords) -> None:
    args = words.args
    preset = words.name or _default_preset()
    config = chosen_config(PRESETS, preset, words.fields, parser.prog, data__data=args.data)
    if args.dry_run:
        print(_plan_of(preset, config))
        return
    from iceaggr.train import resume, train

    table = resume(args.resume) if args.resume is not None else train(config, args.out, name=preset)
    if table is not None:  # rank 0
        print(table)


def _plan_of(preset: str, config: TrainConfig) -> str:
    events = config.data.train_events
    facts = {
        "data": config.data.data or f"simulated events under {config.data.store}",
        "work": f"{config.epochs:g} epochs of {f'{events:,}' if events else 'all'} training events",
    }
    if events:
        facts["time"] = recorded_time(_record(), config.epochs * events, "events_per_s", f"train {preset}")
    return dry_run_text(f"{preset}, seed {config.seed}", config, facts)


def _default_preset() -> str:
    import torch

    return "small" if torch.cuda.is_available() else "quick"


def _record() -> Path:
    """The bench record of such a machine as this."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Path(__file__).parents[2] / "results" / "bench" / f"iceaggr-{device}.json"


def _evaluate(args: argparse.Namespace) -> None:
    need_data_to_drop(args)
    shared = {"max_events": args.events, "device": args.device, "oracle": args.oracle}
    if args.data is None:
        from iceaggr.own_events import evaluate_own

        result = evaluate_own(args.run_dir, **shared)
    else:
        from iceaggr.evaluate import evaluate_folder

        result = evaluate_folder(args.run_dir, args.data, drop_seen=args.drop_seen, **shared)
    print_result(result, args.json)


def _predict(args: argparse.Namespace) -> None:
    from iceaggr.predict import predict_folder

    n = predict_folder(
        args.run_dir,
        args.data,
        args.out,
        max_events=args.events,
        device=args.device,
        strict=args.strict,
        split=args.split,
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
    write_record(args.out, {name: value for name, value in result.items() if name != "text"})
    print_result(result, args.json)


if __name__ == "__main__":
    raise SystemExit(main())
