"""Shell completion of a command, written out from its argparse parser. No torch.

eval "$(iceaggr --print-completion bash)"        # or zsh
iceaggr --print-completion fish | source
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from shlex import quote

SHELLS = ("bash", "zsh", "fish")


def completion(
    parser: argparse.ArgumentParser, shell: str, more_words: Mapping[str, Iterable[str]] | None = None
) -> str:
    """The script that completes the program `parser.prog` in `shell`, one of SHELLS: subcommands, flags, choices.

    Where none of these fits, file names are completed. more_words: subcommand -> flags that its parser does not know.
    """
    more = more_words or {}
    return _fish(parser, more) if shell == "fish" else _bash(parser, more, zsh=shell == "zsh")


def _bash(parser: argparse.ArgumentParser, more: Mapping[str, Iterable[str]], *, zsh: bool) -> str:
    function = "_" + parser.prog.replace("-", "_")
    commands = _subcommands(parser)
    lines = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += [
        f"{function}() {{",
        '  local words="" last="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"',
        f'  if [ "$COMP_CWORD" -eq 1 ]; then words={quote(" ".join([*commands, *_flags(parser)]))}; else',
        '  case "$command $last" in',
    ]
    for name, sub in commands.items():
        for action in sub._actions:
            if action.choices and action.option_strings:
                names = "|".join(quote(f"{name} {flag}") for flag in action.option_strings)
                lines.append(f"    {names}) words={quote(' '.join(map(str, action.choices)))} ;;")
        words = [*_choices(sub), *_flags(sub), *more.get(name, ())]
        lines.append(f"    {quote(name + ' ')}*) words={quote(' '.join(words))} ;;")
    lines += [
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
        "}",
        f"complete -o default -F {function} {parser.prog}",
    ]
    return "\n".join(lines)


def _fish(parser: argparse.ArgumentParser, more: Mapping[str, Iterable[str]]) -> str:
    program, commands = parser.prog, _subcommands(parser)
    helps = {a.dest: a.help or "" for a in _subparsers(parser)._choices_actions}
    lines = [f"complete -c {program} -n __fish_use_subcommand -l {flag[2:]}" for flag in _flags(parser)]
    for name, sub in commands.items():
        lines.append(f"complete -c {program} -n __fish_use_subcommand -a {name} -d {quote(helps.get(name, ''))}")
        within = f"complete -c {program} -n '__fish_seen_subcommand_from {name}'"
        if positional := _choices(sub):
            lines.append(f"{within} -a {quote(' '.join(positional))}")
        for action in sub._actions:
            values = f" -x -a {quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            for flag in action.option_strings:
                if flag.startswith("--"):
                    lines.append(f"{within} -l {flag[2:]}{values} -d {quote((action.help or '').replace('%%', '%'))}")
        lines += [f"{within} -l {flag[2:]}" for flag in more.get(name, ())]
    return "\n".join(lines)


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return dict(_subparsers(parser).choices)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _choices(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand as a positional argument, where it is one of a list."""
    return [str(c) for action in parser._actions if not action.option_strings for c in action.choices or ()]
