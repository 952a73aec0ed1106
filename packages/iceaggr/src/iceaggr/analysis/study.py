"""What every analysis hands over: tables, arrays, single numbers and a figure, or the reason why it does not apply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lab_shared.page import Width

from iceaggr.summaries import Array, Columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Study:
    """One analysis of one run."""

    name: str
    """Of its files: NAME.npz, NAME.csv (NAME-TABLE.csv for further tables), NAME.png."""
    title: str
    caption: str
    """The definition, in words."""
    tables: dict[str, Columns]
    """By caption; columns of equal length."""
    figure: Figure
    scalars: dict[str, float | str] = field(default_factory=dict)
    """What stands in analysis.json and in comparisons of runs."""
    arrays: dict[str, Array] = field(default_factory=dict)
    """For the npz, beside the tables' columns."""
    width: Width = "half"


@dataclass(frozen=True)
class Absent:
    """An analysis that does not apply to this model."""

    name: str
    title: str
    reason: str
