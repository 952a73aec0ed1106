"""`make report`: the tables, figures and claims of the READMEs made anew from the records; --check says what is stale.

How to add one: tools/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from evidence import (
    attn_clustering,
    gauge_attn,
    iceaggr,
    iceaggr_ablations,
    iceaggr_figures,
    lab,
    rh_memory,
    rh_memory_claims,
)
from evidence.allowed import ALLOWED, EVERYWHERE
from evidence.documents import DocumentError, fill, unrecorded
from evidence.record import ROOT, Claim
from lab_shared.files import atomic_write, make_folder

PARTS = {
    "packages/iceaggr": iceaggr,
    "packages/attn_clustering": attn_clustering,
    "packages/gauge_attn": gauge_attn,
    "packages/rh_memory": rh_memory,
    "shared": lab,
}
CLAIMS = (iceaggr.claims, attn_clustering.claims, gauge_attn.claims, rh_memory_claims.claims, lab.claims)
DOCUMENTS = ("README.md", *(f"{part}/{name}" for part in PARTS for name in ("README.md", "RESULTS.md")))
TABLES = {name: table for part in PARTS.values() for name, table in part.TABLES.items()}
DRAWINGS = [
    *iceaggr_figures.DRAWINGS,
    *iceaggr_ablations.DRAWINGS,
    *gauge_attn.DRAWINGS,
    *rh_memory.DRAWINGS,
    *attn_clustering.DRAWINGS,
]


@cache
def claims() -> dict[str, Claim]:
    """Every claim by name, "iceaggr/realism"."""
    found: dict[str, Claim] = {}
    for made in CLAIMS:
        for claim in made():
            if claim.name in found:
                raise DocumentError(f"two claims are named {claim.name}")
            found[claim.name] = claim
    return found


def wanted_texts() -> dict[Path, str]:
    """File -> what it should hold: documents with their generated parts, and a JSON for each claim."""
    sentences = {name: claim.sentence for name, claim in claims().items()}
    texts = {}
    for name in DOCUMENTS:
        path = ROOT / name
        if path.is_file():
            try:
                texts[path] = fill(path.read_text(encoding="utf-8"), TABLES, sentences)
            except DocumentError as error:
                raise DocumentError(f"{name}: {error}") from None
    for name, claim in claims().items():
        part, file = name.split("/", 1)
        texts[claim_folder(part) / f"{file}.json"] = claim.text()
    return texts


def claim_folder(part: str) -> Path:
    """Where the claims of iceaggr, ... or shared are kept."""
    return ROOT / ("shared" if part == "shared" else f"packages/{part}") / "results" / "claims"


def left_over(texts: dict[Path, str]) -> Iterator[Path]:
    """Files of claims that are made no more."""
    for part in PARTS:
        for path in sorted((ROOT / part / "results" / "claims").glob("*.json")):
            if path not in texts:
                yield path


def stale() -> list[str]:
    """What `make report` would change, one line each."""
    texts = wanted_texts()
    found = [
        f"{path.relative_to(ROOT)}: not what the records give"
        for path, text in texts.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    found += [f"{path.relative_to(ROOT)}: a claim that is made no more" for path in left_over(texts)]
    return found + [f"{drawing.path}: drawn from other records" for drawing in DRAWINGS if drawing.stale()]


def numbers_without_record() -> list[str]:
    """Numbers in the prose of the documents that no claim has: "DOCUMENT: number unit"."""
    found = []
    for name in DOCUMENTS:
        if (ROOT / name).is_file():
            own = [
                claim.sentence
                for key, claim in claims().items()
                if name == "README.md" or key.split("/")[0] in (*Path(name).parts, "shared")
            ]
            allowed = [*EVERYWHERE, *ALLOWED.get(name, ())]
            text = (ROOT / name).read_text(encoding="utf-8")
            found += [f"{name}: {number}" for number in unrecorded(text, own, allowed)]
    return found


def write() -> list[str]:
    """Bring everything up to date; returns the files that changed."""
    texts, changed = wanted_texts(), []
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            make_folder(path.parent)
            atomic_write(path, text)
            changed.append(path)
    for path in left_over(texts):
        path.unlink()
        changed.append(path)
    for drawing in DRAWINGS:
        if drawing.stale():
            make_folder((ROOT / drawing.path).parent)
            atomic_write(ROOT / drawing.path, drawing.png())
            changed.append(ROOT / drawing.path)
    return [str(path.relative_to(ROOT)) for path in changed]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is stale")
    args = parser.parse_args()
    try:
        lines = stale() if args.check else [f"wrote {path}" for path in write()]
        missing = numbers_without_record()
    except DocumentError as error:
        print(error, file=sys.stderr)
        return 1
    for line in lines:
        print(line)
    for line in missing:
        print(f"{line}: no claim has this number; take it from a record, or allow it in tools/evidence/allowed.py")
    if not lines and not missing:
        print(f"{len(claims())} claims, {len(TABLES)} tables and {len(DRAWINGS)} figures are what the records give")
    return 1 if missing or (args.check and lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
