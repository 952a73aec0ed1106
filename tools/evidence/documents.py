"""Generated parts of the READMEs, and the numbers in their prose.

A part stands between `<!-- table: NAME -->` or `<!-- claim: NAME -->` and `<!-- end -->`. What is written there by hand
is lost. Outside such parts, every number with a decimal point or a unit must be in the sentence of a claim, or be
allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

MARKED = re.compile(r"<!-- (table|claim): ([^\s>]+) -->(.*?)<!-- end -->", re.DOTALL)
_UNITS = (
    "%|°|degrees?|nats|ns|us|ms|seconds?|s|minutes?|min|hours?|bytes|kB|MB|GB|times|(?<! )x|million|"
    "(?:events|tokens|windows|targets|zeros|spacings)/s|(?:events|tokens|windows|targets|zeros) a second"
)
NUMBER = re.compile(rf"(?<![\w.])[-−+]?((?:\d[\d,]*)?\.?\d+(?:e-?\d+)?)(?: ?({_UNITS})(?![\w/^]))?(?![\w])")
_NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|<!--.*?-->|\]\([^)]*\)|https?://\S+|arXiv:\S+", re.DOTALL)
_ONE = {"degrees": "degree", "second": "s", "seconds": "s", "minutes": "min", "minute": "min", "hours": "hour"}


class DocumentError(Exception):
    """A marker that names nothing, or has no end."""


def fill(text: str, tables: Mapping[str, Callable[[], str]], sentences: Mapping[str, str]) -> str:
    """The document with its generated parts made anew. Raises DocumentError."""

    def made(match: re.Match[str]) -> str:
        kind, name, old = match.groups()
        if "<!-- table:" in old or "<!-- claim:" in old:
            raise DocumentError(f"<!-- {kind}: {name} --> has no <!-- end --> of its own")
        known: Mapping[str, object] = tables if kind == "table" else sentences
        if name not in known:
            raise DocumentError(f"no {kind} is named {name}; there are: {', '.join(sorted(known))}")
        new = f"\n{tables[name]()}\n" if kind == "table" else sentences[name]
        return f"<!-- {kind}: {name} -->{new}<!-- end -->"

    filled = MARKED.sub(made, text)
    if left := re.search(r"<!-- (?:table|claim|end)[^>]*>", MARKED.sub("", filled)):
        raise DocumentError(f"{left[0]} is not one half of a pair")
    return filled


def numbers(text: str) -> list[tuple[str, str]]:
    """(number, unit) of all that have a decimal point or a unit; "" for none. Signs and leading zeros do not count."""
    found = []
    for match in NUMBER.finditer(text):
        number, unit = match[1], match[2] or ""
        if "." in number or unit:
            plain = number.replace(",", "")
            found.append(("0" + plain if plain.startswith(".") else plain, _ONE.get(unit, unit)))
    return found


def unrecorded(text: str, sentences: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Numbers in the prose of a document that no claim's sentence has and no allowed snippet covers.

    A number with a unit has to be in a sentence with that unit, one without in any. allowed: literal pieces of text.
    """
    prose = _NOT_PROSE.sub(" ", MARKED.sub(" ", text))
    prose = re.sub(r"[*_]{2}", "", re.sub(r"\s+", " ", prose))
    for snippet in sorted(allowed, key=len, reverse=True):
        prose = prose.replace(snippet, " ; ")
    known = {pair for sentence in sentences for pair in numbers(sentence)}
    bare = {number for number, _ in known}
    return [
        f"{number} {unit}".strip()
        for number, unit in numbers(prose)
        if (number, unit) not in known and (unit or number not in bare)
    ]
