"""Reading records, and the claims and tables that are made from them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent.parent
Row: TypeAlias = Sequence[str]


@dataclass(frozen=True)
class Claim:
    """One sentence with what it rests on; `make report` writes it to PART/results/claims/NAME.json.

    name: part and file name, "iceaggr/quick-error". raw: the records, paths from the root. values: one per seed where
    there are several. verdict: holds, fails, undecided; met, NOT met; measured where nothing was asked.
    """

    name: str
    sentence: str
    metric: str
    values: Sequence[float]
    verdict: str
    raw: Sequence[str]
    config: str = ""
    seeds: Sequence[int] = ()
    interval: tuple[float, float] | None = None
    test: str = "none"
    required: str | None = None
    git_sha: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "git_sha", commits(self.raw))

    def text(self) -> str:
        """The JSON file; six digits, so that another version of a library makes the same one."""
        return json.dumps(_six_digits(asdict(self)), indent=1, ensure_ascii=False) + "\n"


def _six_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _six_digits(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_six_digits(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def verdict(measured: float, required: float, *, at_most: bool = False) -> str:
    """met or NOT met."""
    return "met" if (measured <= required if at_most else measured >= required) else "NOT met"


def read(path: str) -> Any:
    """A JSON record, or the rows of a .jsonl one, by its path from the root; read once."""
    return _read(ROOT / path)


@cache
def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def columns(path: str) -> dict[str, Any]:
    """A figure's .csv as arrays by name: of numbers where all of a column are."""
    import numpy as np

    with (ROOT / path).open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    found = {}
    for name, texts in zip(header, zip(*rows, strict=True), strict=True):
        try:
            found[name] = np.array(texts, float)
        except ValueError:
            found[name] = np.array(texts)
    return found


def commits(paths: Sequence[str]) -> list[str]:
    """The commits these records were made from, "+dirty" with changes; "unknown" where a record does not say.

    It is said by manifest.json beside a run's files, by environment.json in the folder of a record of many runs or
    above it, or by the record itself.
    """
    return sorted({sha for path in paths for sha in _commits(path)})


def _commits(path: str) -> list[str]:
    folder = (ROOT / path).parent
    said = [folder / "manifest.json", *(above / "environment.json" for above in (folder, *folder.parents))]
    file = next((file for file in said if file.is_file() and ROOT in file.parents), None)
    if file is not None:
        facts = _read(file)
        return [_commit(one) for one in (facts if isinstance(facts, list) else [facts])]
    record = read(path) if path.endswith(".json") else {}
    parts = record if isinstance(record, list) else [record.get("environment", record)]
    if not isinstance(record, list) and "environment" not in record:
        parts = [part for part in record.values() if isinstance(part, dict) and "git_sha" in part] or parts
    return sorted({_commit(part.get("environment", part)) for part in parts})


def _commit(facts: Mapping[str, Any]) -> str:
    sha = facts.get("git_sha") or facts.get("git")
    return f"{sha}+dirty" if sha and facts.get("git_dirty") else sha or "unknown"


def observed(part: str, path: str) -> list[Claim]:
    """Claims of what was read off a console: {"rows": [{name, sentence, value, unit, at_most}]}."""
    return [
        Claim(
            f"{part}/{row['name']}",
            row["sentence"],
            row["unit"],
            [row["value"]],
            "measured" if row["at_most"] is None else verdict(row["value"], row["at_most"], at_most=True),
            [path],
            test="one run, read off a console",
            required=None if row["at_most"] is None else f"at most {row['at_most']} {row['unit']}",
        )
        for row in read(path)["rows"]
    ]


def markdown(header: Row, body: Sequence[Row], align: str = "") -> str:
    """A GitHub table. align: a letter per column, l or r; default: all left."""
    rule = ["---:" if letter == "r" else "---" for letter in align.ljust(len(header), "l")]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, rule, *body)
    )


def slug(text: str) -> str:
    """Its letters and digits in small letters, anything else a hyphen: for a claim's file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def bare(x: float, digits: int) -> str:
    """A number without the zero in front of its point: .505, -1.03."""
    text = f"{x:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def interval(x: Mapping[str, Any], digits: int, *, short: bool = False) -> str:
    """value [low, high]; short: numbers without the zero in front of the point."""

    def number(value: float) -> str:
        return bare(value, digits) if short else f"{value:.{digits}f}"

    if x.get("low") is None:
        return number(x["value"])
    return f"{number(x['value'])} [{number(x['low'])}, {number(x['high'])}]"
