"""DEPENDENCIES.md: every locked package with its version and licence. `python tools/licences.py --write`.

Licences are what the installed packages' own metadata say: the SPDX expression where there is one, otherwise the
classifiers, otherwise the free text. A package that is locked but not installed here (extras, other systems) keeps the
licence its row had (at first that of another installed version); such rows may be filled in by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "DEPENDENCIES.md"
UNKNOWN = "not installed here: see its own page"
_ROW = re.compile(r"\| (\S+) \| (\S+) \| (.+) \|")

HEAD = """# Dependencies

Everything `uv.lock` pins, with the licence each package declares. Written by `python tools/licences.py --write`, held
current by a test. The lab itself is MIT.

None of this is shipped with the lab: it is fetched by uv. What is neither MIT, BSD, Apache nor a like licence:

- `nvidia-*` and `cuda-*` (NVIDIA's own licence): the CUDA libraries that PyTorch's Linux wheel needs. Not on macOS.
- MPL-2.0 (`certifi`, `tqdm`, and in development `hypothesis`, `pathspec`): file-level copyleft, used unchanged.
- `python-flint` (MIT AND LGPL-3.0-or-later): an oracle of rh_memory's tests only.
- `healpy` (GPL-2.0-only): only with iceaggr's optional extra `healpix`, imported where a .fits map is written.

## Known vulnerabilities

`make audit` compares the lock with the public vulnerability database (`uv audit`). It needs that service, so it is no
part of `make check`; run it before a release and after `uv lock --upgrade`. Where the service is out of reach it fails
with the network error and says nothing about the packages.

What the lab itself does about hostile input: no pickle is ever loaded (`numpy` with `allow_pickle=False`, weights and
checkpoints as safetensors), file names out of data are never opened unchecked, and `make fuzz` holds the readers to
that.

## Packages

| package | version | licence |
| --- | --- | --- |
"""


def page(kept: dict[tuple[str, str], str]) -> str:
    """The file's text; kept: (package, version) -> licence of packages that are not installed."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    rows = []
    for package in sorted(lock["package"], key=lambda p: (p["name"], p.get("version", ""))):
        if "registry" not in package["source"]:
            continue  # the lab's own
        key = (package["name"], package["version"])
        licence = installed_licence(*key) or kept.get(key) or installed_licence(key[0]) or UNKNOWN
        rows.append(f"| {key[0]} | {key[1]} | {licence} |")
    return HEAD + "\n".join(rows) + "\n"


def kept_rows(text: str) -> dict[tuple[str, str], str]:
    """(package, version) -> licence in an existing page."""
    return {(row[1], row[2]): row[3] for line in text.splitlines() if (row := _ROW.fullmatch(line))}


def installed_licence(name: str, version: str | None = None) -> str | None:
    """What the metadata say; None when the package, or this version of it, is not installed."""
    try:
        facts = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return None
    if version is not None and str(facts["version"]).split("+")[0] != version.split("+")[0]:
        return None
    classified = [text.split(" :: ")[-1] for text in facts.get("classifier", []) if text.startswith("License :: ")]
    free = " ".join(str(facts.get("license", "")).split())
    free = free if len(free) <= 60 else ""  # some put the whole text there
    return str(facts.get("license_expression", "")) or ", ".join(sorted(set(classified))) or free or "none declared"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write DEPENDENCIES.md instead of checking it")
    args = parser.parse_args()
    before = PAGE.read_text() if PAGE.exists() else ""
    now = page(kept_rows(before))
    if args.write:
        PAGE.write_text(now)
    elif now != before:
        print("DEPENDENCIES.md is not what uv.lock says: run `python tools/licences.py --write`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
