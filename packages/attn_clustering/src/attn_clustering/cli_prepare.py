"""`attn-clustering prepare`: text into a corpus. It reads its own words, for every setting of a corpus is a flag."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lab_shared.command import Program, dry_run_flag
from lab_shared.config import field_names, preset_cli, to_json

from attn_clustering.data.settings import CorpusConfig


def add_prepare(program: Program) -> None:
    """Give the program its `prepare`."""
    sub = program.add_free(
        "prepare",
        _prepare,
        "Turn text into the corpus that the experiments on real text train on.",
        more_words=[f"--{name.replace('_', '-')}" for name in field_names(CorpusConfig()) if name != "sources"],
        usage="attn-clustering prepare SOURCE ... --out DIR [--dry-run] [--FIELD VALUE ...]",
        description="Read text, split it by document, find its topics, train a tokenizer, write token sequences.\n"
        "SOURCE: a .jsonl, .jsonl.gz, .parquet or .txt file, a folder of such files, or hf:DATASET:CONFIG.\n\n"
        "There are no shards: doubles, topics and merges of tokens are found in all documents together, and\n"
        "encoding them uses every core already. Unchanged stages are not made again.",
        epilog="Every field of the corpus settings can be set; `prepare SOURCE --out DIR --help` lists them.",
    )
    sub.add_argument("--out", type=Path, metavar="DIR")
    dry_run_flag(sub)
    sub.add_argument("-h", "--help", action="store_true")


def _prepare(parser: argparse.ArgumentParser, words: list[str]) -> None:
    n_sources = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    sources, (args, fields) = words[:n_sources], parser.parse_known_args(words[n_sources:])
    if args.help and not sources:
        parser.print_help()
        return
    if not sources or (args.out is None and not args.help):
        parser.error("give at least one SOURCE, before all flags, and --out DIR")
    presets = {"corpus": ("Settings of a corpus.", CorpusConfig())}
    config = preset_cli(presets, ["corpus", *fields, *(["--help"] if args.help else [])], prog=parser.prog)
    config = replace(config, sources=tuple(sources))
    if args.dry_run:
        print(_plan_of(config, args.out))
        return
    from attn_clustering.data.corpus import prepare

    prepare(config, args.out)
    print(args.out)


def _plan_of(config: CorpusConfig, out: Path) -> str:
    from attn_clustering.data.sources import files_of

    lines = []
    for source in config.sources:
        if source.startswith("hf:"):
            lines.append(f"  {source}: at most {config.max_documents} documents, downloaded")
        else:
            files = files_of(source)
            lines.append(f"  {source}: {len(files):,} files, {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB")
    return "\n".join([f"would make the corpus {out} of", *lines, to_json(config)])
