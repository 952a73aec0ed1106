"""The error a command shows as one line: something the user gave or the machine lacks, with the way out named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Base of every error a user can cause; commands print it without a traceback and exit with 1."""


class MissingPackage(UserError):
    """A third-party package that this work needs is not installed; the message has the line that installs it."""


PACKAGES = {
    "datasets": "datasets",
    "healpy": "healpy",
    "matplotlib": "matplotlib",
    "muon": "muon-optimizer",
    "plotly": "plotly",
    "polars": "polars",
    "ray": "ray",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "tyro": "tyro",
    "wandb": "wandb",
}
"""Modules imported where they are used -> what installs them, under its name on PyPI."""


@contextmanager
def needs(what: str, instead: str = "") -> Iterator[None]:
    """Around the import of a package that may be absent: `with needs("--engine ray"): import ray`.

    what: the thing that cannot be done without. instead: another way, where there is one. Raises MissingPackage; an
    ImportError about anything but the modules of PACKAGES passes, since that is a bug and not a missing package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in PACKAGES:
            raise
        name = PACKAGES[module]
        way_out = f"install it with `uv pip install {name}`" + (f", or {instead}" if instead else "")
        raise MissingPackage(f"{what} needs the package {name}, which is not installed: {way_out}") from error
