"""A background thread that keeps a few items ready, and what crosses from the host to its device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def prefetched(source: Generator[T, None, None], *, depth: int, device: torch.device) -> Generator[T, None, None]:
    """The items of `source`, made by a background thread up to `depth` ahead; 0 makes them on demand, without
    one.

    On a GPU the thread works on a CUDA stream of its own, and the consumer's stream waits for each item; whoever
    uses an item's tensors passes them to `handed_over`. An exception in the thread is raised here. Closing the
    generator, or dropping it, ends the thread.
    """
    if depth == 0:
        yield from source
        return
    # an item and when it is finished on the device; or what ended the thread
    ready: queue.Queue[tuple[Any, Any, bool]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(value: Any, finished: Any, is_item: bool) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((value, finished, is_item), timeout=0.05)
                return

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # page-locked memory belongs to a context
                torch.cuda.set_stream(torch.cuda.Stream(device))  # of this thread alone
            for item in source:
                put(item, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None, True)
                if stop.is_set():
                    return
            put(None, None, False)
        except BaseException as error:
            put(error, None, False)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, finished, is_item = ready.get()
            if is_item:
                if finished is not None:
                    torch.cuda.current_stream(device).wait_event(finished)
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join()


def handed_over(batch: T) -> T:
    """A dataclass of tensors from another thread's stream: its memory stays until this stream is done with it."""
    for x in vars(batch).values():
        if isinstance(x, torch.Tensor) and x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))
    return batch


def default_depth(device: torch.device) -> int:
    """Batches to make ahead. On a CPU a thread would only take cores from the model."""
    return 2 if device.type == "cuda" else 0


def with_index(device: torch.device | str) -> torch.device:
    """cuda becomes cuda:0 (or whichever is current), which other threads do not know."""
    return torch.empty(0, device=device).device


def on_device(x: np.ndarray | None, device: torch.device) -> Tensor | None:
    """The array on the device, through page-locked memory to a GPU so that nobody waits; None stays None."""
    if x is None:
        return None
    tensor = torch.from_numpy(x)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
