"""Types of configuration fields that say which numbers make sense: `steps: Count = 1000`. No torch.

They are int and float to Python, type checkers and the command line. `lab_shared.config` refuses values outside when it
reads or writes a configuration, and so before any run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """low <= x <= high; without the ends themselves where they are open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        return above and (x < self.high if self.open_high else x <= self.high)

    def __str__(self) -> str:
        """What follows "a number": "of at least 1", "above 0", "from 0 to below 1"."""
        if self.high == math.inf:
            return f"above {self.low}" if self.open_low else f"of at least {self.low}"
        low, high = ("above " if self.open_low else ""), ("below " if self.open_high else "")
        return f"from {low}{self.low} to {high}{self.high}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
"""What every generator used here takes."""
Positive = Annotated[float, Range(0, open_low=True, open_high=True)]
"""Finite, as the next one."""
NonNegative = Annotated[float, Range(0, open_high=True)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, open_high=True)]
"""Factor of a running average, a step."""
Dropout = Decay
"""Probability of leaving out."""
