"""A background thread that keeps a few items ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def prefetched(source: Generator[T, None, None], *, depth: int, device: torch.device) -> Generator[T, None, None]:
    """The items of `source`, made by a background thread up to `depth` ahead; 0 makes them on demand, without
    one.

    An exception in the thread is raised here. Closing the generator, or dropping it, ends the thread.
    """
    if depth == 0:
        yield from source
        return
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(is_item: bool, value: Any) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((is_item, value), timeout=0.05)
                return

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # page-locked memory belongs to a context
            for item in source:
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = ready.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join()
