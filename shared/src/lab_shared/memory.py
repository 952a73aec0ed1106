"""A full accelerator as an error that says which flag to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lab_shared.errors import UserError


class DeviceMemoryError(UserError):
    """The accelerator's memory does not hold the work; the message names the flags that make it smaller."""


@contextmanager
def lower_when_full(*flags: str) -> Iterator[None]:
    """Raise DeviceMemoryError, naming `flags`, where torch runs out of device memory; a decorator too.

    Several ranks: the one whose device is full says so and ends, and torchrun then ends the others.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The first sentences say how much was asked for and was free; the rest is about the allocator.
        reason = ". ".join(str(error).split(". ")[:2]).strip()
        raise DeviceMemoryError(
            f"the device is out of memory ({reason}): start a new run with a lower {' or '.join(flags)}"
        ) from error
