"""The `gauge-attn` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch and tyro cost seconds and are loaded by the command that needs them, so
that `--help` answers at once.
"""

from __future__ import annotations

import argparse
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
)
from lab_shared.errors import UserError
from lab_shared.train_command import TrainWords, add_train, chosen_config, dry_run_text

from gauge_attn import __version__
from gauge_attn.config import PRESETS

DEFAULT_PRESET = "quick"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error the user can mend (one line on stderr), 2 wrong usage."""
    return program().main(argv)


def program() -> Program:
    """The command with all its subcommands."""
    tool = Program(
        "gauge-attn",
        "Attention as softmax(-KL/kappa) between Gaussian beliefs transported by SO(3) frames.",
        __version__,
    )
    add = tool.add

    add_train(
        tool,
        _train,
        "Train a language model; without --data it generates its own language.",
        PRESETS,
        about="Train, evaluate on the whole validation split beside unigram and bigram, write the report.\n"
        f"Without PRESET: {DEFAULT_PRESET}. --data is a text file or folder, wikitext-2, tinyshakespeare, or\n"
        "induction, the generated language that every preset uses by default.",
        example="faithful-free --data tinyshakespeare --model.kappa 0.1 --optim.alignment 1",
        data="D what to train on (short for --data.data)",
        out="runs/gauge_attn/PRESET-seedS-TIME",
    )

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
    sub.add_argument("name", metavar="NAME", help="seed-repro, matrix, h1 ... h8, specs, all or smoke")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: runs/gauge_attn/grid-NAME")
    sub.add_argument("--data", default=None, metavar="D", help="as for train; default: the grid's own")
    sub.add_argument("--folder", default=None, metavar="DIR", help="where wikitext-2 and tinyshakespeare lie")
    sub.add_argument("--steps", type=positive_int, metavar="N", help="training steps of every run; default: 300")
    sub.add_argument("--seeds", type=positive_int, metavar="N", help="seeds of every cell")
    engine_flags(sub)
    sub.add_argument("--collect", action="store_true", help="run nothing: tables and verdicts of the finished runs")
    sub.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile the models; default: on a GPU of their own, for runs of 2000 steps or more",
    )
    dry_run_flag(sub, "--list")
    json_flag(sub)

    sub = add("bench", _bench, "Measure exact KL attention beside the dense reference and plain attention.")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--quick", action="store_true", help="seconds instead of minutes; figures are rough")
    sub.add_argument("--models", action="store_true", help="whole models' training speed instead of the attention's")
    sub.add_argument(
        "--only", nargs="+", choices=("speed", "dense", "memory", "layouts", "precision"), metavar="SECTION"
    )
    sub.add_argument("--budget", type=positive_int, metavar="SECONDS", help="begin no further stage after so long")
    sub.add_argument(
        "--compile-limit",
        type=positive_int,
        default=240,
        metavar="SECONDS",
        help="what compiling the dense reference on a GPU may take, before it is measured uncompiled; default: 240",
    )
    device_flag(sub)
    json_flag(sub)

    sub = add("report", _report, "Rebuild the HTML report of a run, or of a grid's folder, from what is saved there.")
    sub.add_argument("folder", type=Path, metavar="RUN|DIR")

    sub = add("generate", _generate, "Continue a prompt with a run's model.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="for the generated language: k3 v7 k5 ...")
    sub.add_argument("--tokens", type=positive_int, default=100, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    device_flag(sub)
    return tool


def _train(parser: argparse.ArgumentParser, words: TrainWords) -> None:
    args, preset = words.args, words.name or DEFAULT_PRESET
    from gauge_attn.checks import checked

    config = checked(chosen_config(PRESETS, preset, words.fields, parser.prog, data__data=args.data))
    if args.dry_run:
        data = config.data
        work = f"{config.steps:,} steps of {data.batch} windows of {data.window} tokens"
        print(dry_run_text(f"{preset}, seed {config.seed}", config, {"data": data.data, "work": work}))
        return
    from gauge_attn.train import resume, train

    text = resume(args.resume) if args.resume is not None else train(config, args.out, name=preset)
    if text is not None:  # rank 0
        print(text)


def _evaluate(args: argparse.Namespace) -> None:
    from gauge_attn.evaluate import evaluate_run

    result = evaluate_run(args.run_dir, split=args.split, device=args.device, ablation=not args.no_ablation)
    print_result(result, args.json)


def _diagnose(args: argparse.Namespace) -> None:
    from gauge_attn.evaluate import diagnose_run

    result = diagnose_run(args.run_dir, device=args.device)
    print_result(result, args.json)


def _theory(args: argparse.Namespace) -> None:
    from gauge_attn.theory import tables, text

    result = tables()
    print_result(result | {"text": text(result)}, args.json)


def _grid(args: argparse.Namespace) -> None:
    from gauge_attn.grid import run_grid

    result = run_grid(
        args.name,
        args.out,
        data=args.data,
        data_folder=args.folder,
        steps=args.steps,
        seeds=args.seeds,
        **engine_options(args),
        compile=args.compile,
        only_list=args.dry_run,
        only_done=args.collect,
    )
    print_result(result, args.json)


def _bench(args: argparse.Namespace) -> None:
    from lab_shared.runs import pick_device

    device = pick_device(args.device)
    if args.models and (args.only or args.budget):
        raise UserError("--only and --budget choose among the attention's sections: leave them out with --models")
    if args.models:
        from gauge_attn.speed import bench_models

        result = bench_models(device, args.out, quick=args.quick)
    else:
        from gauge_attn.bench import main as bench

        result = bench(
            device,
            args.out,
            quick=args.quick,
            only=args.only,
            budget_s=args.budget,
            compile_limit_s=args.compile_limit,
        )
    print_result(result, args.json)


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
