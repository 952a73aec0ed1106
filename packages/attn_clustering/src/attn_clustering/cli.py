"""The `attn-clustering` command. Results go to stdout, progress and complaints to stderr; exit 0, 1 failure, 2 usage.

Only argparse is imported at the top: torch and tyro cost seconds and are loaded by the command that needs them, so that
`--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab_shared.command import device_flag, json_flag, positive_int, run_command
from lab_shared.errors import UserError

from attn_clustering import __version__
from attn_clustering.config import ATTENTIONS, EXPERIMENTS, ORDERINGS
from attn_clustering.data.settings import LANGUAGES

RUNS = Path("runs/attn_clustering")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 an error the user can mend (one line on stderr), 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return run_command("attn-clustering", _train, argv[1:])
    if argv[:1] == ["prepare"]:
        return run_command("attn-clustering", _prepare, argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return run_command("attn-clustering", args.run, args)


def _parser() -> argparse.ArgumentParser:
    experiments = "\n".join(f"  {name:<14} {text}" for name, (text, _) in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="attn-clustering",
        description="Does the order of training data leave durable structure in attention heads?",
        epilog="experiments:\n" + experiments,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attn-clustering {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = add("matrix", _matrix, "Run every condition and seed of an experiment that is not done, then its report.")
    sub.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    sub.add_argument("--seeds", type=positive_int, metavar="N", help="number of seeds; default: the experiment's")
    sub.add_argument("--out", type=Path, metavar="DIR", help=f"default: {RUNS}/EXPERIMENT")
    sub.add_argument("--corpus", metavar="DIR", help="prepared corpus (experiments on real text)")
    sub.add_argument("--engine", choices=("local", "ray"), default="local")
    sub.add_argument("--address", help="Ray cluster; default: a new one on this machine")
    sub.add_argument("--workers", type=positive_int, metavar="N", help="jobs at a time; default: GPUs / gpus-per-job")
    sub.add_argument("--gpus-per-job", type=float, default=1.0, metavar="F", help="a fraction shares one GPU")

    commands.add_parser("train", help="Train one condition; without arguments the smoke matrix with its report.")

    sub = add("drope", _drope, "Recalibrate a trained run without its positions, in a folder beside it.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--fraction", type=float, default=0.1, metavar="F", help="of the training steps; default 0.1")
    sub.add_argument("--lr-factor", type=float, default=1.0, metavar="X", help="on the learning rates; default 1")
    sub.add_argument("--own-order", action="store_true", help="on the run's own order, not the shared shuffled stream")
    sub.add_argument("--keep-rope", action="store_true", help="the control: same steps and data, positions kept")

    sub = add("levels", _levels, "Reference losses and probe levels of a language: what can be reached, and by chance.")
    sub.add_argument("config", choices=list(LANGUAGES), metavar="CONFIG", help=", ".join(LANGUAGES))
    json_flag(sub)

    sub = add("analyze", _analyze, "Attention statistics, probes, circuits and ablations of a trained run.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    device_flag(sub)
    json_flag(sub)

    sub = add("report", _report, "Rebuild the HTML report of a matrix from its saved arrays.")
    sub.add_argument("folder", type=Path, metavar="DIR")

    sub = add("export-hf", _export_hf, "Write a run as a Hugging Face Qwen3ForCausalLM folder.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")

    sub = add("import-hf", _import_hf, "Make a run of a Hugging Face Qwen3ForCausalLM folder, to be analysed.")
    sub.add_argument("folder", type=Path, metavar="FOLDER")
    sub.add_argument("--out", type=Path, required=True, metavar="RUN")
    sub.add_argument("--experiment", choices=list(EXPERIMENTS), default="smoke", help="on whose data to look at it")

    commands.add_parser("prepare", help="Turn text into the corpus that the experiments on real text train on.")

    sub = add("bench", _bench, "Measure training, languages and probes on this machine.")
    sub.add_argument("--out", type=Path, metavar="JSON", help="write the record here as well")
    sub.add_argument("--only", nargs="*", metavar="STAGE", help="train languages probes")
    sub.add_argument("--options", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help="compile and residual variants")
    sub.add_argument("--quick", action="store_true", help="fewer repeats; figures are rough")
    device_flag(sub)
    json_flag(sub)
    return parser


def _matrix(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from attn_clustering.matrix import run_matrix

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a matrix starts its own workers: run it without torchrun (--workers, --engine ray)")
    experiment = EXPERIMENTS[args.experiment][1]
    if args.corpus is not None:
        if experiment.data.language is not None:
            raise UserError(f"--corpus: {experiment.name} trains on a micro-language; use text or v2")
        experiment = replace(experiment, data=replace(experiment.data, corpus=args.corpus))
    print(
        run_matrix(
            experiment,
            args.out or RUNS / args.experiment,
            seeds=args.seeds,
            engine=args.engine,
            address=args.address,
            workers=args.workers,
            gpus_per_job=args.gpus_per_job,
        )
    )


def _train(argv: list[str]) -> None:
    if not argv:
        _matrix(_parser().parse_args(["matrix", "smoke"]))
        return
    parser = argparse.ArgumentParser(
        prog="attn-clustering train",
        usage="attn-clustering train CONDITION [--experiment NAME] [--seed S] [--out RUN] [--FIELD VALUE ...]\n"
        "       attn-clustering train --resume RUN\n       attn-clustering train",
        description="Train one condition, or go on with it. Without arguments: the smoke matrix with its report.\n\n"
        f"CONDITION is {' or '.join(ATTENTIONS)}, a hyphen, and one of {', '.join(ORDERINGS)}.",
        epilog="Every field can be set: `attn-clustering train mha-shuffled --help` lists them, for example\n"
        "  attn-clustering train gqa-topic_ordered --experiment sanity --optim.steps 1000 --out runs/short",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where a stopped run left off")
    parser.add_argument("--experiment", choices=list(EXPERIMENTS), default="smoke", help="default: smoke")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the experiment's first")
    parser.add_argument("--out", type=Path, metavar="RUN", help=f"default: {RUNS}/EXPERIMENT/NAME")
    parser.add_argument("--nope", action="store_true", help="without positions from the start")
    device_flag(parser)
    parser.add_argument("-h", "--help", action="store_true")
    condition = argv[0] if not argv[0].startswith("-") else None
    args, overrides = parser.parse_known_args(argv[1:] if condition else argv)
    if condition is None and args.help:
        parser.print_help()
        return
    if (condition is None) == (args.resume is None):
        parser.error("name a condition, such as mha-shuffled, or give --resume RUN (and not both)")
    if args.resume is not None:
        from attn_clustering.train import resume

        _print_summary(resume(args.resume))
        return
    assert condition is not None
    _train_condition(condition, args, [*overrides, *(["--help"] if args.help else [])])


def _train_condition(condition: str, args: argparse.Namespace, overrides: list[str]) -> None:
    from attn_clustering.config import parse_condition, run_config

    experiment = EXPERIMENTS[args.experiment][1]
    attention, ordering = parse_condition(condition)
    seed = experiment.first_seed if args.seed is None else args.seed
    config = run_config(experiment, attention, ordering, seed, nope=args.nope)
    if overrides:
        from lab_shared.config import preset_cli

        text = f"{condition} of {experiment.name}"
        config = preset_cli({condition: (text, config)}, [condition, *overrides], prog="attn-clustering train")
    from attn_clustering.train import train

    _print_summary(train(config, args.out or RUNS / experiment.name / config.name, device=args.device))


def _print_summary(summary: dict[str, Any] | None) -> None:
    if summary is not None:  # rank 0
        print("\n".join(f"{key:>22}  {value}" for key, value in summary.items()))


def _drope(args: argparse.Namespace) -> None:
    from lab_shared.config import from_json

    from attn_clustering.config import Recalibration, RunConfig, phase2_config
    from attn_clustering.train import train

    if not (args.run_dir / "config.json").is_file():
        raise UserError(f"{args.run_dir} holds no run (no config.json): check the path")
    trained = from_json(RunConfig, (args.run_dir / "config.json").read_text())
    recal = Recalibration(args.fraction, args.lr_factor, "own" if args.own_order else "shared")
    config = phase2_config(trained, recal, "extra" if args.keep_rope else "drope", folder=args.run_dir.resolve().name)
    _print_summary(train(config, args.run_dir.resolve().parent / config.name))


def _levels(args: argparse.Namespace) -> None:
    from attn_clustering.data import levels

    print(levels.main(args.config, as_json=args.json))


def _analyze(args: argparse.Namespace) -> None:
    from attn_clustering import analyze

    result = analyze.main(args.run_dir, json=args.json, device=args.device)
    if not args.json:
        print(result["text"])


def _report(args: argparse.Namespace) -> None:
    from attn_clustering import report

    print(report.write(args.folder))


def _export_hf(args: argparse.Namespace) -> None:
    from attn_clustering.hf import export_hf

    print(export_hf(args.run_dir, args.out))


def _import_hf(args: argparse.Namespace) -> None:
    from attn_clustering.config import run_config
    from attn_clustering.hf import import_run

    experiment = EXPERIMENTS[args.experiment][1]
    print(import_run(args.folder, args.out, run_config(experiment, "mha", "shuffled", experiment.first_seed)))


def _prepare(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="attn-clustering prepare",
        usage="attn-clustering prepare SOURCE ... --out DIR [--FIELD VALUE ...]",
        description="Read text, split it by document, find its topics, train a tokenizer, write token sequences.\n"
        "SOURCE: a .jsonl, .jsonl.gz, .parquet or .txt file, a folder of such files, or hf:DATASET:CONFIG.",
        epilog="Every field of the corpus settings can be set; `prepare SOURCE --out DIR --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("-h", "--help", action="store_true")
    n_sources = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    sources, (args, overrides) = argv[:n_sources], parser.parse_known_args(argv[n_sources:])
    if args.help and not sources:
        parser.print_help()
        return
    if not sources or (args.out is None and not args.help):
        parser.error("give at least one SOURCE, and --out DIR")
    from lab_shared.config import preset_cli

    from attn_clustering.data.settings import CorpusConfig

    config = preset_cli(
        {"corpus": ("Settings of a corpus.", CorpusConfig(sources=tuple(sources)))},
        ["corpus", *overrides, *(["--help"] if args.help else [])],
        prog="attn-clustering prepare",
    )
    from attn_clustering.data.corpus import prepare

    prepare(config, args.out)
    print(args.out)


def _bench(args: argparse.Namespace) -> None:
    from attn_clustering import bench

    if args.options:
        rows = bench.bench_options(args.options, device=args.device, quick=args.quick)
    else:
        rows = bench.bench(device=args.device, only=args.only, quick=args.quick)
    found = bench.record(rows, args.device)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if args.json else bench.table(rows))


if __name__ == "__main__":
    raise SystemExit(main())
