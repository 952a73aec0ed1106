"""Commands that study runs or make comparisons; `iceaggr.cli` lists them beside the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lab_shared.command import (
    device_flag,
    dry_run_flag,
    engine_flags,
    engine_options,
    json_flag,
    positive_float,
    positive_int,
    print_result,
    write_record,
)
from lab_shared.errors import UserError

from iceaggr.config import STUDIES

Add = Callable[..., argparse.ArgumentParser]


def whole_number(text: str) -> int:
    """0 or a positive number, for argparse's `type`; its error names what was given."""
    return 0 if text == "0" else positive_int(text)


def add_studies(add: Add) -> None:
    """Add the commands of this module to the parser: add(name, run, help) makes one."""
    sub = add("analyze", _analyze, "What a trained model uses, where it looks and how wrong it is, on held-out events.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--data", type=Path, metavar="DIR", help="labelled folder; default: the run's own held-out events")
    sub.add_argument("--events", type=positive_int, metavar="N", help="at most N events")
    sub.add_argument("--inside", type=positive_int, metavar="N", help="events to look inside the model with")
    sub.add_argument("--permuted", type=positive_int, metavar="N", help="events to permute the features of")
    sub.add_argument("--drop-seen", action="store_true", help="skip events the run was trained on instead of refusing")
    device_flag(sub)
    json_flag(sub)

    sub = add("compare", _compare, "Two or more runs side by side, and their errors on the events they share.")
    sub.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="default: compare.html in the first run")
    json_flag(sub)

    sub = add("oracle", _oracle, "The information limit on simulated events: directions from their own likelihood.")
    sub.add_argument("--data", type=Path, metavar="DIR", help="simulated folder; default: simulate with --seed")
    sub.add_argument("--events", type=positive_int, default=200, metavar="N")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    sub.add_argument("--scan", type=whole_number, metavar="N", help="directions of the coarse scan; 0: none")
    sub.add_argument("--steps", type=positive_int, metavar="N", help="most evaluations of one climb")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    device_flag(sub)
    json_flag(sub)

    sub = add("calibrate", _calibrate, "Calibrate kappa on half of a run's held-out events, judge it on the rest.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    json_flag(sub)

    sub = add("skymap", _skymap, "One event's 50 and 90 percent regions on the sky, with their areas.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="Kaggle-format folder")
    sub.add_argument("--event", type=int, required=True, metavar="ID")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.png|html|fits", help="fits needs healpy")
    device_flag(sub)
    json_flag(sub)

    sub = add("convert", _convert, "Turn Prometheus parquet files into a Kaggle-format folder with its geometry.")
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE.parquet")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument(
        "--direction",
        choices=("travel", "origin"),
        default="travel",
        help="what mc_truth's zenith and azimuth say: where the neutrino goes (Prometheus), or where it came from",
    )
    sub.add_argument("--merge", type=positive_int, default=8, metavar="NS", help="photons this close are one pulse")
    json_flag(sub)

    sub = add("plan", _plan, "Disk, memory and time of a training on N events, from measured speeds.")
    sub.add_argument("--events", type=positive_int, default=131_953_924, metavar="N", help="default: all of Kaggle's")
    sub.add_argument("--epochs", type=positive_float, default=4.0, metavar="E")
    sub.add_argument("--preset", default="5M", help="a preset the record has a training speed of")
    sub.add_argument("--gpus", type=positive_int, metavar="N", help="default: 1, or those of the run")
    sub.add_argument("--record", type=Path, metavar="PATH", help="what `iceaggr bench --out` wrote, or a run")
    json_flag(sub)

    sub = add("ablate", _ablate, "Train the variants of a study on one simulated store and compare them.")
    sub.add_argument("study", choices=STUDIES)
    sub.add_argument("--events", type=positive_int, default=1_000_000, metavar="N", help="training events in the store")
    sub.add_argument("--held-out", type=positive_int, metavar="N", help="default: 200,000 on a GPU, 20,000 without")
    sub.add_argument("--epochs", type=positive_float, default=10.0, metavar="E")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S")
    sub.add_argument("--only", nargs="+", metavar="VARIANT", help="only these, and the comparisons between them")
    sub.add_argument("--recipe", choices=("package", "seed"), default="package", help="seed: AdamW on the angle")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: runs/iceaggr/ablate-STUDY; done runs are kept")
    sub.add_argument("--store", metavar="DIR", help="where simulated events are kept, default data/iceaggr")
    sub.add_argument("--tokens-per-batch", type=positive_int, metavar="N", help="fewer: more, smaller steps")
    sub.add_argument("--stream", action="store_true", help="simulate while training, no event twice, none on disk")
    sub.add_argument("--so-far", action="store_true", help="train nothing; what the finished runs in --out say")
    engine_flags(sub)
    dry_run_flag(sub)
    json_flag(sub)


def need_data_to_drop(args: argparse.Namespace) -> None:
    """Raise UserError for --drop-seen without --data."""
    if args.drop_seen and args.data is None:
        raise UserError(
            "--drop-seen chooses among the events of --data DIR; a run's own held-out events are all unseen"
        )


def _ablate(args: argparse.Namespace) -> None:
    from iceaggr.ablations import Budget, ablate, only_variants, study

    asked = study(args.study) if args.only is None else only_variants(study(args.study), args.only)
    out = args.out or Path("runs/iceaggr") / f"ablate-{args.study}"
    if args.so_far:
        from iceaggr.ablation_so_far import so_far

        print_result(so_far(asked, out), args.json)
        return
    held_out = args.held_out
    if held_out is None:
        import torch

        held_out = 200_000 if torch.cuda.is_available() else 20_000
    budget = Budget(
        args.events,
        held_out,
        args.epochs,
        tuple(args.seeds),
        args.recipe,
        stream=args.stream,
        tokens_per_batch=args.tokens_per_batch,
    )
    result = ablate(
        asked,
        budget if args.store is None else replace(budget, store=args.store),
        out,
        **engine_options(args),
        dry_run=args.dry_run,
    )
    print_result(result, args.json)


def _analyze(args: argparse.Namespace) -> None:
    need_data_to_drop(args)
    from iceaggr.analysis.analyze import analyze_run

    result = analyze_run(
        args.run_dir,
        data=args.data,
        max_events=args.events,
        device=args.device,
        drop_seen=args.drop_seen,
        inside=args.inside,
        permuted=args.permuted,
    )
    print_result(result, args.json)


def _compare(args: argparse.Namespace) -> None:
    from iceaggr.analysis.compare import compare_runs

    result = compare_runs(args.run_dirs, args.out)
    print_result(result, args.json)


def _oracle(args: argparse.Namespace) -> None:
    from iceaggr.oracle.run import SCAN, STEPS, run_oracle

    scan = SCAN if args.scan is None else args.scan
    result = run_oracle(
        data=args.data,
        events=args.events,
        seed=args.seed,
        device=args.device,
        scan=scan,
        steps=args.steps or STEPS,
    )
    write_record(args.out, {name: value for name, value in result.items() if name != "text"})
    print_result(result, args.json)


def _calibrate(args: argparse.Namespace) -> None:
    from iceaggr.calibrate import calibrate_run

    result = calibrate_run(args.run_dir)
    print_result(result, args.json)


def _skymap(args: argparse.Namespace) -> None:
    from iceaggr.skymap import event_skymap, text
    from iceaggr.skymap_files import write_skymap

    sky = event_skymap(args.run_dir, args.data, args.event, device=args.device)
    write_skymap(args.out, sky)
    print_result(sky.summary() | {"text": text(sky)}, args.json)


def _convert(args: argparse.Namespace) -> None:
    from iceaggr.prometheus import convert

    result = convert(args.files, args.out, direction=args.direction, merge_ns=args.merge)
    print_result(result, args.json)


def _plan(args: argparse.Namespace) -> None:
    from iceaggr.plan import plan

    result = plan(args.events, epochs=args.epochs, preset=args.preset, gpus=args.gpus, record=args.record)
    print_result(result, args.json)
