"""The `mirror` command."""

import argparse
from collections.abc import Sequence

from lab_shared.command import Program
from lab_shared.train_command import TrainWords, add_train, chosen_config, dry_run_text

from mirror import __version__
from mirror.config import PRESETS


def main(argv: Sequence[str] | None = None) -> int:
    program = Program("mirror", "Can one attention head read a line backwards?", __version__)
    about = "Train one head to say a line of letters backwards. Without PRESET: small."
    add_train(program, _train, "Train the head.", PRESETS, about=about, example="small --length 24", out="runs/mirror")
    return program.main(argv)


def _train(parser: argparse.ArgumentParser, words: TrainWords) -> None:
    preset = words.name or "small"
    config = chosen_config(PRESETS, preset, words.fields, parser.prog)
    if words.args.dry_run:
        print(dry_run_text(preset, config, {"work": f"{config.steps} steps of {config.batch} lines"}))
        return
    from mirror.train import resume, train

    print(resume(words.args.resume) if words.args.resume else train(config, words.args.out, name=preset))
