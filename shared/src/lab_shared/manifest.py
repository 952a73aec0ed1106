"""What a run stood on: code, lock file, versions, device, command. Nothing names the machine or its user."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# What can change a result; the lock file's hash covers the rest where there is one.
_PACKAGES = ("lab-shared", "torch", "numpy", "polars", "safetensors", "muon-optimizer", "triton")


def describe(seed: int, world: int = 1) -> tuple[dict[str, Any], str]:
    """The facts needed to repeat a run, JSON-ready, and the uncommitted changes ("" without any).

    git_* and diff_sha256 are None outside a git checkout, lock_sha256 without a uv.lock above the code.
    """
    import torch

    here = Path(__file__).resolve()
    git, diff = git_state(here)
    lock = next((p / "uv.lock" for p in here.parents if (p / "uv.lock").is_file()), None)
    cuda = torch.cuda.is_available()
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": command_line(),
        "seed": seed,
        **git,
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock else None,
        "python": platform.python_version(),
        "versions": _versions(),
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "processes": world,
    }
    return facts, diff


def command_line() -> list[str]:
    """sys.argv with the program reduced to its name (`python -m package` for a package's __main__)."""
    program = Path(sys.argv[0] or "python")
    name = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return name + sys.argv[1:]


def git_state(file: Path) -> tuple[dict[str, Any], str]:
    """Commit of the checkout that tracks `file`, and the difference of its tracked files to that commit.

    Untracked files are counted, not recorded: they may be data. All None where `file` is not tracked, so that
    an installed package is not taken for a part of whatever repository its environment happens to lie in.
    """
    unknown = {"git_sha": None, "git_dirty": None, "git_untracked": None, "diff_sha256": None}
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return unknown, ""
    sha = _git(file.parent, "rev-parse", "HEAD")
    diff = _git(file.parent, "diff", "HEAD", "--no-color", "--no-ext-diff")
    top = _git(file.parent, "rev-parse", "--show-toplevel")
    if sha is None or diff is None or top is None:
        return unknown, ""
    untracked = _git(Path(top.strip()), "ls-files", "--others", "--exclude-standard") or ""
    return {
        "git_sha": sha.strip(),
        "git_dirty": bool(diff),
        "git_untracked": len(untracked.splitlines()),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }, diff


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in `folder`; None when it fails or there is no git."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
