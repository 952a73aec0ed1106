"""The `gauge-attn` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch and tyro cost seconds and are loaded by the command that needs them, so
that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab_shared.command import device_flag, json_flag, positive_int, run_command

from gauge_attn import __version__
from gauge_attn.config import PRESETS, TrainConfig

DEFAULT_PRESET = "quick"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return run_command("gauge-attn", _train, argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return run_command("gauge-attn", args.run, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gauge-attn",
        description="Attention as softmax(-KL/kappa) between Gaussian beliefs transported by SO(3) frames.",
    )
    parser.add_argument("--version", action="version", version=f"gauge-attn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    commands.add_parser("train", help="Train a language model; without --data it generates its own language.")

    sub = add("evaluate", _evaluate, "Loss of a run on a whole split, beside unigram and bigram, and what heads do.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--split", choices=("valid", "test"), default="valid")
    sub.add_argument("--no-ablation", action="store_true", help="skip the cost of each head, one evaluation each")
    device_flag(sub)
    json_flag(sub)

    sub = add("diagnose", _diagnose, "Sharpness and diversity of a run's heads, without forming an attention matrix.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    device_flag(sub)
    json_flag(sub)

    sub = add("theory", _theory, "Closed-form row_std and participation by dimension, and the K a sharpness needs.")
    json_flag(sub)

    sub = add("grid", _grid, "Run a named grid of trainings, skipping what is done; then its tables and verdicts.")
    sub.add_argument("name", metavar="NAME", help="seed-repro, h1 ... h8, specs, all or smoke")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: runs/gauge_attn/grid-NAME")
    sub.add_argument("--data", default=None, metavar="D", help="as for train; default: the grid's own")
    sub.add_argument("--folder", default=None, metavar="DIR", help="where wikitext-2 and tinyshakespeare lie")
    sub.add_argument("--steps", type=positive_int, metavar="N", help="training steps of every run")
    sub.add_argument("--seeds", type=positive_int, metavar="N", help="seeds of every cell")
    sub.add_argument("--engine", choices=("local", "ray"), default="local")
    sub.add_argument("--address", metavar="HOST:PORT", help="ray: a running cluster; default: a new one here")
    sub.add_argument("--workers", type=positive_int, metavar="N", help="runs at once")
    sub.add_argument("--gpus-per-job", type=float, default=1.0, metavar="X", help="0.1 puts ten runs on a GPU")
    sub.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the models; default: on a GPU of their own, for runs of 2000 steps or more",
    )
    sub.add_argument("--list", action="store_true", help="print the runs and do nothing")
    json_flag(sub)

    sub = add("bench", _bench, "Measure exact KL attention beside the dense reference and plain attention.")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--quick", action="store_true", help="seconds instead of minutes; figures are rough")
    sub.add_argument("--models", action="store_true", help="whole models' training speed instead of the attention's")
    device_flag(sub)

    sub = add("report", _report, "Rebuild the HTML report of a run, or of a grid's folder, from what is saved there.")
    sub.add_argument("folder", type=Path, metavar="RUN|DIR")

    sub = add("generate", _generate, "Continue a prompt with a run's model.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="for the generated language: k3 v7 k5 ...")
    sub.add_argument("--tokens", type=positive_int, default=100, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    device_flag(sub)
    return parser


def _print(text: str, value: Any, as_json: bool) -> None:
    print(json.dumps(value) if as_json else text)


def _train(argv: list[str]) -> None:
    args, preset, overrides = _train_arguments(argv)
    from gauge_attn.train import resume, train

    if args.resume is not None:
        text = resume(args.resume)
    else:
        text = train(_train_config(args, preset, overrides), args.out, name=preset)
    if text is not None:  # rank 0
        print(text)


def _train_arguments(argv: list[str]) -> tuple[argparse.Namespace, str, list[str]]:
    """Split `gauge-attn train` arguments into ours, the preset's name, and overrides of configuration fields."""
    presets = "\n".join(f"  {name:<25} {text}" for name, (text, _) in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="gauge-attn train",
        usage="gauge-attn train [PRESET] [--data D] [--out RUN] [--seed S] [--FIELD VALUE ...]\n"
        "       gauge-attn train --resume RUN",
        description="Train, evaluate on the whole validation split beside unigram and bigram, write the report.\n"
        f"Without PRESET: {DEFAULT_PRESET}. --data is a text file or folder, wikitext-2, tinyshakespeare, or\n"
        "induction, the generated language that every preset uses by default.\n\npresets:\n" + presets,
        epilog="Every field of the configuration can be set: `gauge-attn train PRESET --help` lists them, for example\n"
        "  gauge-attn train faithful-free --data tinyshakespeare --model.kappa 0.1 --optim.alignment 1\n"
        "Under torchrun the same command uses every process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where a stopped run left off")
    parser.add_argument("--data", metavar="D", help="what to train on (short for --data.data)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="default: runs/gauge_attn/PRESET-seedS-TIME")
    parser.add_argument("-h", "--help", action="store_true")
    named = bool(argv) and not argv[0].startswith("-")
    preset = argv[0] if named else DEFAULT_PRESET
    args, overrides = parser.parse_known_args(argv[1:] if named else argv)
    if preset not in PRESETS:
        parser.error(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if args.help:
        if not named:
            parser.print_help()
            raise SystemExit(0)
        overrides.append("--help")
    if args.resume is not None and (named or overrides or args.out or args.data):
        parser.error("--resume takes no other option: the run folder holds its configuration")
    return args, preset, overrides


def _train_config(args: argparse.Namespace, preset: str, overrides: list[str]) -> TrainConfig:
    from lab_shared.config import preset_cli

    config = preset_cli(PRESETS, [preset, *overrides], prog="gauge-attn train")
    return config if args.data is None else replace(config, data=replace(config.data, data=args.data))


def _evaluate(args: argparse.Namespace) -> None:
    from gauge_attn.evaluate import evaluate_run

    result = evaluate_run(args.run_dir, split=args.split, device=args.device, ablation=not args.no_ablation)
    _print(result.pop("text"), result, args.json)


def _diagnose(args: argparse.Namespace) -> None:
    from gauge_attn.evaluate import diagnose_run

    result = diagnose_run(args.run_dir, device=args.device)
    _print(result.pop("text"), result, args.json)


def _theory(args: argparse.Namespace) -> None:
    from gauge_attn.theory import main as theory

    theory(json=args.json)


def _grid(args: argparse.Namespace) -> None:
    from gauge_attn.grid import run_grid

    result = run_grid(
        args.name,
        args.out,
        data=args.data,
        data_folder=args.folder,
        steps=args.steps,
        seeds=args.seeds,
        engine=args.engine,
        address=args.address,
        workers=args.workers,
        gpus_per_job=args.gpus_per_job,
        compile=args.compile,
        only_list=args.list,
    )
    _print(result.pop("text"), result, args.json)


def _bench(args: argparse.Namespace) -> None:
    from gauge_attn.evaluate import pick_device

    device = pick_device(args.device)
    if args.models:
        from gauge_attn.speed import bench_models

        bench_models(device, args.out, quick=args.quick)
    else:
        from gauge_attn.bench import main as bench

        bench(device, args.out, quick=args.quick)


def _report(args: argparse.Namespace) -> None:
    from gauge_attn.report import write_report

    print(write_report(args.folder))


def _generate(args: argparse.Namespace) -> None:
    from gauge_attn.generate import generate_text

    print(
        generate_text(
            args.run_dir,
            args.prompt,
            n_tokens=args.tokens,
            temperature=args.temperature,
            seed=args.seed,
            device=args.device,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
