"""Splits that keep their distance, and windows gathered on the device.

Shape suffixes: B windows, W positions in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from lab_shared.errors import UserError
from torch import Tensor

from rh_memory.data.unfold import Spacings

Range = tuple[int, int]
Part = Literal["train", "val", "test", "val_tail"]


class SplitError(UserError):
    """There are too few spacings for the split asked for."""


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """B windows of W consecutive spacings, all known once the window's last gap has ended."""

    s_BW: Tensor  # float32, unfolded spacings
    log_height_BW: Tensor  # float32, log(gamma / 2 pi) at the end of each gap
    gamma_BW: Tensor  # float64, height of the end of each gap above the end of the window's first gap

    def __len__(self) -> int:
        return len(self.s_BW)

    def to(self, device: torch.device | str) -> WindowBatch:
        return WindowBatch(self.s_BW.to(device), self.log_height_BW.to(device), self.gamma_BW.to(device))

    def inputs(self) -> WindowBatch:
        """The first W - 1 positions: what a model may read to predict `targets()`, position by position."""
        return WindowBatch(self.s_BW[:, :-1], self.log_height_BW[:, :-1], self.gamma_BW[:, :-1])

    def targets(self) -> Tensor:
        """(B, W-1): the spacing after each position of `inputs()`."""
        return self.s_BW[:, 1:]


class SpacingData:
    """All spacings on one device; a window is an index plus an arange, and nothing waits for the device."""

    def __init__(self, spacings: Spacings, device: torch.device | str = "cpu") -> None:
        self.s = torch.tensor(spacings.s, device=device)
        self.log_height = torch.tensor(spacings.log_height, device=device)
        self.centre = torch.tensor(spacings.centre, device=device)
        self.offset = torch.tensor(spacings.offset, device=device)

    def __len__(self) -> int:
        return len(self.s)

    def window(self, starts_B: Tensor, width: int, mirrored_B: Tensor | None = None) -> WindowBatch:
        """Windows of `width` spacings that start at the indices starts_B (int64, on the data's device).

        mirrored_B: bool; these windows are read downwards, as the zeros at the heights -gamma follow each other.

        Indices are not checked (that would wait for the device): take them from `Split.starts`.
        """
        index_BW = starts_B[:, None] + torch.arange(width, device=starts_B.device)
        end_BW = index_BW
        if mirrored_B is not None:
            index_BW = torch.where(mirrored_B[:, None], index_BW.flip(1), index_BW)
            # Read downwards a gap ends at the zero below it. That of the first gap of all is not kept, and no input.
            end_BW = (index_BW - mirrored_B[:, None].long()).clamp(min=0)
        centre_BW, offset_BW = self.centre[end_BW], self.offset[end_BW]
        # Centres and offsets apart: their differences are exact or nearly so, those of the sums are not.
        gamma_BW = (centre_BW - centre_BW[:, :1]) + (offset_BW - offset_BW[:, :1])
        if mirrored_B is not None:
            gamma_BW = torch.where(mirrored_B[:, None], -gamma_BW, gamma_BW)
        return WindowBatch(self.s[index_BW], self.log_height[end_BW], gamma_BW)


@dataclass(frozen=True)
class Split:
    """Disjoint ranges [first, last) of spacings.

    val is for early stopping and choices, test for the figure at the end. val_tail is the whole tail that the original
    experiments scored on (val and test together); empty in an interleaved split.
    """

    train: tuple[Range, ...]
    val: tuple[Range, ...]
    test: tuple[Range, ...]
    val_tail: tuple[Range, ...] = ()

    def starts(self, part: Part, stride: int = 1, width: int = 257) -> Tensor:
        """Starts (int64) of windows of `width` spacings, every `stride`, each inside one range. Raises SplitError."""
        ranges: tuple[Range, ...] = getattr(self, part)
        starts = [torch.arange(first, last - width + 1, stride) for first, last in ranges if last - first >= width]
        if not starts:
            raise SplitError(
                f"no window of {width} spacings fits into the {part} part, ranges {list(ranges)[:3]}: "
                "use more zeros or a shorter window"
            )
        return torch.cat(starts)


def split(
    n_spacings: int,
    kind: Literal["tail", "interleaved"] = "tail",
    *,
    row: int = 256,
    width: int = 257,
    guard: int = 256,
    segment: int = 0,
) -> Split:
    """Divide n_spacings into train, val and test.

    tail: rows of `row` spacings; the last tenth of the rows (rounded down) is val_tail, the rest train, what does not
    fill a row is unused: 7035 and 781 rows of 256 for the first 2,001,052 zeros. The first half of the tail is val,
    the second half test. Measures extrapolation in height.
    interleaved: 20 ranges or a multiple of it, over all heights; of every 20 the 7th is val and the 17th test, and
    `guard` spacings are left out between parts that differ. Measures the same heights as training.
    segment: spacings of different segments share no range (see `Spacings.segment`).

    Raises SplitError if a part could not hold one window of `width`.
    """
    if kind == "tail":
        parts = _tail(n_spacings, row)
    else:
        parts = _interleaved(n_spacings, width, guard)
    result = Split(**{name: tuple(_cut(ranges, segment)) for name, ranges in parts.items()})
    for name in ("train", "val", "test"):
        if not any(last - first >= width for first, last in getattr(result, name)):
            needed = 20 * row * -(-width // row) if kind == "tail" else 20 * (width + guard)
            raise SplitError(
                f"{n_spacings:,} spacings are too few for a {kind} split whose {name} part holds a window of {width}"
                + (f" within segments of {segment}" if segment else f": {needed:,} are enough, of {needed + 1:,} zeros")
            )
    return result


def _tail(n: int, row: int) -> dict[str, list[Range]]:
    rows = n // row
    tail = rows // 10
    first, middle, last = (rows - tail) * row, (rows - tail + tail // 2) * row, rows * row
    return {"train": [(0, first)], "val": [(first, middle)], "test": [(middle, last)], "val_tail": [(first, last)]}


_CYCLE = ("train",) * 6 + ("val",) + ("train",) * 9 + ("test",) + ("train",) * 3


def _interleaved(n: int, width: int, guard: int) -> dict[str, list[Range]]:
    # At most 50 cycles, and ranges never so short that guards and window ends eat most of them.
    cycles = max(1, min(50, n // (len(_CYCLE) * 8 * (width + guard))))
    pieces = cycles * len(_CYCLE)
    parts: dict[str, list[Range]] = {"train": [], "val": [], "test": []}
    previous = _CYCLE[0]
    for i in range(pieces):
        name = _CYCLE[i % len(_CYCLE)]
        first, last = i * n // pieces, (i + 1) * n // pieces
        ranges = parts[name]
        if name != previous:
            ranges.append((first + guard, last))
        elif ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], last)
        else:
            ranges.append((first, last))
        previous = name
    return parts


def _cut(ranges: list[Range], segment: int) -> Iterator[Range]:
    """The ranges, cut at the multiples of `segment` (0: as they are)."""
    for first, last in ranges:
        while segment and first // segment < (last - 1) // segment:
            border = (first // segment + 1) * segment
            yield first, border
            first = border
        yield first, last


def rows(ranges: tuple[Range, ...], row: int = 256) -> Tensor:
    """Starts (int64) of the whole rows of `row` spacings in `ranges`, as the original experiments cut their data."""
    starts = [torch.arange(first, last - row + 1, row) for first, last in ranges if last - first >= row]
    return torch.cat(starts) if starts else torch.empty(0, dtype=torch.int64)
