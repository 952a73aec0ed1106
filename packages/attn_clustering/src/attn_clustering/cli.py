"""The `attn-clustering` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch and tyro cost seconds and are loaded by the command that needs them, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from lab_shared.errors import UserError
from lab_shared.files import make_folder
from lab_shared.train_command import TrainWords, add_train, chosen_config, dry_run_text, recorded_time

from attn_clustering import __version__
from attn_clustering.cli_prepare import add_prepare
from attn_clustering.config import ATTENTIONS, ORDERINGS, RunConfig
from attn_clustering.data.settings import LANGUAGES
from attn_clustering.experiments import EXPERIMENTS, PARTS, Experiment, run_config

RUNS = Path("runs/attn_clustering")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error the user can mend (one line on stderr), 2 wrong usage."""
    return program().main(argv)


def program() -> Program:
    """The command with all its subcommands."""
    experiments = "\n".join(f"  {name:<16} {text}" for name, (text, _) in EXPERIMENTS.items())
    tool = Program(
        "attn-clustering",
        "Does the order of training data leave durable structure in attention heads?",
        __version__,
        epilog="experiments:\n" + experiments,
    )
    add = tool.add

    sub = add("matrix", _matrix, "Run every condition and seed of an experiment that is not done, then its report.")
    sub.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    sub.add_argument("--seeds", type=positive_int, metavar="N", help="number of seeds; default: the experiment's")
    sub.add_argument("--first-seed", type=int, metavar="S", help="default: the experiment's")
    sub.add_argument("--parts", choices=PARTS, default="all", help="endpoint: only what the primary contrast rests on")
    sub.add_argument("--out", type=Path, metavar="DIR", help=f"default: {RUNS}/EXPERIMENT")
    sub.add_argument("--data", "--corpus", metavar="DIR", help="prepared corpus (experiments on real text)")
    engine_flags(sub)
    dry_run_flag(sub)

    sub = add_train(
        tool,
        _train,
        "Train one condition; without arguments the smoke matrix with its report.",
        _conditions(EXPERIMENTS["smoke"][1]),
        name="CONDITION",
        about="Train one condition of an experiment, or go on with it. Without arguments: the smoke matrix with its\n"
        "report, or under torchrun one condition of it.",
        example="gqa-topic_ordered --experiment sanity --optim.steps 1000 --out runs/short",
        data="DIR prepared corpus (short for --data.corpus)",
        out=f"{RUNS}/EXPERIMENT/NAME",
    )
    sub.add_argument("--experiment", choices=list(EXPERIMENTS), default="smoke", help="default: smoke")
    sub.add_argument("--seed", type=int, metavar="S", help="default: the experiment's first")
    sub.add_argument("--nope", action="store_true", help="without positions from the start")
    device_flag(sub)

    sub = add("drope", _drope, "Recalibrate a trained run without its positions, in a folder beside it.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--fraction", type=float, default=0.1, metavar="F", help="of the training steps; default 0.1")
    sub.add_argument("--lr-factor", type=float, default=1.0, metavar="X", help="on the learning rates; default 1")
    sub.add_argument("--own-order", action="store_true", help="on the run's own order, not the shared shuffled stream")
    sub.add_argument("--keep-rope", action="store_true", help="the control: same steps and data, positions kept")

    sub = add("levels", _levels, "Reference losses and probe levels of a language: what can be reached, and by chance.")
    sub.add_argument("config", metavar="CONFIG", help=f"{', '.join(LANGUAGES)}, or the folder of a prepared corpus")
    json_flag(sub)

    sub = add("analyze", _analyze, "Attention statistics, probes, circuits and ablations of a trained run.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    device_flag(sub)
    json_flag(sub)

    sub = add("report", _report, "Rebuild the HTML report of a matrix from its saved arrays.")
    sub.add_argument("folder", type=Path, metavar="DIR")

    sub = add("collect", _collect, "Gather the small files of a matrix, from which its report can be rebuilt.")
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--out", type=Path, required=True, metavar="RECORD", help="a new or empty folder")

    sub = add("export-hf", _export_hf, "Write a run as a Hugging Face Qwen3ForCausalLM folder.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = add("import-hf", _import_hf, "Make a run of a Hugging Face Qwen3ForCausalLM folder, to be analysed.")
    sub.add_argument("folder", type=Path, metavar="FOLDER")
    sub.add_argument("--out", type=Path, required=True, metavar="RUN")
    sub.add_argument("--experiment", choices=list(EXPERIMENTS), default="smoke", help="on whose data to look at it")

    add_prepare(tool)

    sub = add("bench", _bench, "Measure training, languages and probes on this machine.")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--only", nargs="*", metavar="STAGE", help="train languages probes")
    sub.add_argument("--options", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help="compile and residual variants")
    sub.add_argument("--quick", action="store_true", help="fewer repeats; figures are rough")
    device_flag(sub)
    json_flag(sub)
    return tool


def _matrix(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from attn_clustering.matrix import jobs, run_matrix

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a matrix starts its own workers: run it without torchrun (--workers, --engine ray)")
    experiment = EXPERIMENTS[args.experiment][1]
    if args.data is not None:
        if experiment.data.language is not None:
            raise UserError(f"--data: {experiment.name} trains on a micro-language; use text or v2")
        experiment = replace(experiment, data=replace(experiment.data, corpus=args.data))
    out = args.out or RUNS / args.experiment
    if args.first_seed is not None:
        experiment = replace(experiment, first_seed=args.first_seed)
    if args.dry_run:
        print(job_list([job.name for job in jobs(experiment, args.seeds, args.parts)], out))
        return
    print(run_matrix(experiment, out, seeds=args.seeds, parts=args.parts, **engine_options(args)))


def _conditions(
    experiment: Experiment, seed: int | None = None, nope: bool = False
) -> dict[str, tuple[str, RunConfig]]:
    """The conditions of an experiment that `train` knows: name -> (in words, configuration)."""
    first = experiment.first_seed if seed is None else seed
    return {
        f"{attention}-{ordering}": (
            f"{attention.upper()}, {ordering.replace('_', ' ')}",
            run_config(experiment, attention, ordering, first, nope=nope),
        )
        for attention in ATTENTIONS
        for ordering in ORDERINGS
    }


def _train(parser: argparse.ArgumentParser, words: TrainWords) -> None:
    args, condition = words.args, words.name
    if args.resume is not None:
        from attn_clustering.train import resume

        _print_summary(resume(args.resume))
        return
    if condition is None:
        if words.fields or words.given:
            parser.error("name a condition, such as mha-shuffled, or give --resume RUN")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            dry = ["--dry-run"] if args.dry_run else []
            _matrix(program().parser.parse_args(["matrix", "smoke", *dry]))
            return
        condition = "mha-shuffled"
    experiment = EXPERIMENTS[args.experiment][1]
    conditions = _conditions(experiment, args.seed, args.nope)
    config = chosen_config(conditions, condition, words.fields, parser.prog, data__corpus=args.data)
    if args.dry_run:
        print(_plan_of(config))
        return
    from attn_clustering.train import train

    _print_summary(train(config, args.out or RUNS / experiment.name / config.name, device=args.device))


def _plan_of(config: RunConfig) -> str:
    import torch

    optim, language = config.optim, config.data.language
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = Path(__file__).parents[2] / "results" / "bench" / f"attn-clustering-{device}.json"
    facts = {
        "data": config.data.corpus or "a generated language",
        "work": f"{optim.steps:,} steps of {optim.batch} sequences",
    }
    if language is not None:
        tokens = optim.steps * optim.batch * language.seq_len
        row = f"train {config.experiment} {config.attention}"
        facts["time"] = recorded_time(record, tokens, "tokens_per_s", row)
    return dry_run_text(config.name, config, facts)


def _print_summary(summary: dict[str, Any] | None) -> None:
    if summary is not None:  # rank 0
        print("\n".join(f"{key:>22}  {_in_words(key, value)}" for key, value in summary.items()))


def _in_words(key: str, value: Any) -> str:
    """A value of a summary, floats to six digits and with their unit."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.6g}" + (" nats" if "loss" in key else " s" if key.endswith("_s") else "")


def _drope(args: argparse.Namespace) -> None:
    from lab_shared.config import read_config, to_json

    from attn_clustering.config import Recalibration
    from attn_clustering.drope import starting_model
    from attn_clustering.experiments import phase2_config
    from attn_clustering.train import train

    if not (args.run_dir / "config.json").is_file():
        raise UserError(f"{args.run_dir} holds no run (no config.json): check the path")
    trained, folder = read_config(RunConfig, args.run_dir / "config.json"), args.run_dir.resolve()
    if trained.phase != "rope":
        raise UserError(f"{args.run_dir} is a run of phase {trained.phase}: only one of phase rope can be recalibrated")
    recal = Recalibration(args.fraction, args.lr_factor, "own" if args.own_order else "shared")
    to_json(recal)  # its ranges are checked here, for they decide the number of steps
    config = phase2_config(trained, recal, "extra" if args.keep_rope else "drope", folder=folder.name)
    if recal.fraction and not config.optim.steps:
        raise UserError(
            f"--fraction {args.fraction:g} of {trained.optim.steps} steps is no step: raise it, or say 0 to remove the "
            "positions and train nothing"
        )
    out = folder.parent / config.name
    if (out / "config.json").is_file() and read_config(RunConfig, out / "config.json") != config:
        raise UserError(f"{out} is the recalibration of another run: move {args.run_dir} into a folder of its own")
    starting_model(config, out)  # refused before there is a folder
    _print_summary(train(config, out))


def _levels(args: argparse.Namespace) -> None:
    from attn_clustering.data import levels

    print(levels.main(args.config, as_json=args.json))


def _analyze(args: argparse.Namespace) -> None:
    from attn_clustering import analyze

    print_result(analyze.main(args.run_dir, device=args.device), args.json)


def _report(args: argparse.Namespace) -> None:
    from attn_clustering import report

    print(report.write(args.folder))


def _collect(args: argparse.Namespace) -> None:
    from attn_clustering import collect

    print(collect.collect(args.folder, args.out))


def _export_hf(args: argparse.Namespace) -> None:
    from attn_clustering.hf import export_hf

    print(export_hf(args.run_dir, args.out))


def _import_hf(args: argparse.Namespace) -> None:
    from attn_clustering.hf import import_run

    experiment = EXPERIMENTS[args.experiment][1]
    print(import_run(args.folder, args.out, run_config(experiment, "mha", "shuffled", experiment.first_seed)))


def _bench(args: argparse.Namespace) -> None:
    from attn_clustering import bench

    if args.options and args.only:
        raise UserError("--options measures training alone: leave out --only")
    if args.out is not None:
        if args.out.is_dir():
            raise UserError(f"--out {args.out} is a folder: name a file")
        make_folder(args.out.parent)  # refused now, not after minutes of measuring
    if args.options:
        rows = bench.bench_options(args.options, device=args.device, quick=args.quick)
    else:
        rows = bench.bench(device=args.device, only=args.only, quick=args.quick)
    found = bench.record(rows, args.device)
    write_record(args.out, found)
    print(json.dumps(found) if args.json else bench.table(rows))
