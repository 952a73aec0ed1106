"""The `train` subcommand that every experiment has: PRESET, fields of its configuration as flags, --resume. No torch.

mine train [PRESET] [--data D] [--out RUN] [--dry-run] [--FIELD VALUE ...]
mine train --resume RUN
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lab_shared.command import Program, dry_run_flag
from lab_shared.config import field_names, preset_cli, to_json, with_field

T = TypeVar("T")


class TrainWords(NamedTuple):
    """What stands behind `train`: the flags of its parser, the leading name if there is one, and all the rest.

    given: which flags of the parser were set, but for --dry-run.
    """

    args: argparse.Namespace
    name: str | None
    fields: list[str]
    given: list[str]


def add_train(
    program: Program,
    run: Callable[[argparse.ArgumentParser, TrainWords], None],
    text: str,
    presets: Mapping[str, tuple[str, Any]],
    *,
    about: str,
    example: str,
    data: str | None = None,
    out: str,
    name: str = "PRESET",
) -> argparse.ArgumentParser:
    """Give the program its `train`, and return the parser for flags that only this experiment has.

    presets: name -> (description, configuration). about: what training does, and what it does without a name. example:
    words behind `train` that set fields. data: what --data takes, in a word and a phrase parted by a space; None: no
    such flag. out: the default of --out, in words. name: what a preset is called here.
    """
    command = f"{program.name} train"
    data_usage = f" [--data {data.split()[0]}]" if data else ""
    width = max(map(len, presets)) + 2
    listed = "\n".join(f"  {preset:<{width}}{described}" for preset, (described, _) in presets.items())
    first = next(iter(presets))
    parser = program.add_free(
        "train",
        lambda parser, words: run(parser, train_words(parser, words, presets, name)),
        text,
        more_words=[*presets, *(f"--{field.replace('_', '-')}" for field in field_names(presets[first][1]))],
        usage=f"{command} [{name}]{data_usage} [--out RUN] [--seed S] [--dry-run] [--FIELD VALUE ...]\n"
        f"       {command} --resume RUN",
        description=f"{about}\n\n{name.lower()}s:\n{listed}",
        epilog=f"Every field of the configuration can be set: `{command} {first} --help` lists them, for example\n"
        f"  {command} {example}\nUnder torchrun the same command uses every process.",
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where a stopped run left off")
    if data:
        metavar, _, meaning = data.partition(" ")
        parser.add_argument("--data", metavar=metavar, help=meaning)
    parser.add_argument("--out", type=Path, metavar="RUN", help=f"run folder; default: {out}")
    dry_run_flag(parser)
    parser.add_argument("-h", "--help", action="store_true", help="this text; behind a name: all fields of it")
    return parser


def train_words(
    parser: argparse.ArgumentParser, words: Sequence[str], presets: Mapping[str, Any], name: str = "PRESET"
) -> TrainWords:
    """Part the words behind `train`. Wrong usage raises SystemExit(2), and --help without a name SystemExit(0)."""
    chosen = words[0] if words and not words[0].startswith("-") else None
    args, fields = parser.parse_known_args(words[1:] if chosen else list(words))
    if chosen is not None and chosen not in presets:
        near = difflib.get_close_matches(chosen, presets, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        parser.error(f"no {name.lower()} {chosen!r}{meant}; there are {', '.join(presets)}")
    if args.help:
        if chosen is None:
            parser.print_help()
            raise SystemExit(0)
        fields.append("--help")
    given = [key for key, value in vars(args).items() if key != "dry_run" and value != parser.get_default(key)]
    if args.resume is not None and (chosen or fields or args.dry_run or given != ["resume"]):
        parser.error("--resume takes no other option: the run folder holds its configuration")
    return TrainWords(args, chosen, fields, given)


def chosen_config(
    presets: Mapping[str, tuple[str, T]], name: str, fields: Sequence[str], prog: str, **replaced: Any
) -> T:
    """The preset `name` with the fields that flags set, and then those of `replaced` whose value is not None.

    replaced: dotted names with a double underscore for the dot, data__folder="x". A preset as it is needs no tyro.
    """
    config = preset_cli(presets, [name, *fields], prog) if fields else presets[name][1]
    for field, value in replaced.items():
        if value is not None:
            config = with_field(config, field.replace("__", "."), value)
    return config


def dry_run_text(title: str, config: Any, facts: Mapping[str, str]) -> str:
    """What a training would be: a title, some facts, and the whole configuration as JSON."""
    width = max(map(len, facts), default=0) + 2
    return "\n".join([f"would train {title}", *(f"  {k:<{width}}{v}" for k, v in facts.items()), to_json(config)])


def recorded_time(record: Path, work: float, rate: str, row: str | None = None) -> str:
    """How long `work` takes at the speed `rate` ("events_per_s") of a bench record, in words with the source.

    record: JSON as `bench --out` writes it. row: the stage or name; None: the last with such a rate. Where there is no
    such row, the words say that.
    """
    if not record.is_file():
        return f"not known: no record {record.name}; `bench` measures"
    found = json.loads(record.read_text())
    rows = found["rows"] if isinstance(found, dict) else found
    fitting = [r for r in rows if rate in r and row in (None, r.get("stage"), r.get("name"))]
    if not fitting:
        return f"not known: {record.name} has no {row!r}; `bench` measures"
    of_row = fitting[-1]
    where = (found if isinstance(found, dict) else of_row)["environment"]["device"]
    seconds = work / of_row[rate]
    unit, size = ("h", 3600) if seconds >= 5400 else ("min", 60) if seconds >= 90 else ("s", 1)
    speed = f"{of_row[rate]:,.0f} {rate.removesuffix('_per_s')}/s"
    return f"about {seconds / size:.1f} {unit} at {speed} ({record.name}, {where})"
