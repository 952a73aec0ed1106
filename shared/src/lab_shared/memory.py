"""Peak memory of a process, and memory that is full as an error that says which flag to lower."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lab_shared.errors import UserError


class DeviceMemoryError(UserError):
    """The memory does not hold the work; the message names the flags that make it smaller."""


@contextmanager
def lower_when_full(*flags: str) -> Iterator[None]:
    """Raise DeviceMemoryError, naming `flags`, where torch or numpy run out of memory; a decorator too.

    Several ranks: the one whose device is full says so and ends, and torchrun then ends the others.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The first sentences say how much was asked for and was free; the rest is about the allocator.
        reason = ". ".join(str(error).split(". ")[:2]).strip()
        raise _full("device", reason, flags) from error
    except MemoryError as error:
        raise _full("machine", str(error), flags) from error
    except RuntimeError as error:
        _, of_cpus, reason = str(error).partition("DefaultCPUAllocator: ")
        if not of_cpus:
            raise
        raise _full("machine", reason.partition(". ")[0], flags) from error


def _full(where: str, reason: str, flags: tuple[str, ...]) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the {where} is out of memory ({reason}): start a new run with a lower {' or '.join(flags)}"
    )


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: the most allocated on a GPU since its last reset, or the largest resident size of this process.

    The resident peak is that of the whole life of the process: to measure one piece of work, give it a process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
