"""Stopping on request: the first SIGINT or SIGTERM becomes a flag, the second keeps its default effect."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """Ends the program with 128 + signal, after a stop signal and once the state is saved."""


class StopSignals:
    """A context in which the first SIGINT or SIGTERM only sets `received`, and the second kills at once.

    Outside the main thread python delivers no signals, and `received` stays None.
    """

    def __init__(self, *, announce: bool) -> None:
        """announce: say on stderr what the signal does."""
        self.received: int | None = None
        self._announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that python did not set
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        if self._announce:
            # Not print: the handler may have interrupted one, whose buffer does not allow a second.
            text = f"\n{signal.Signals(number).name}: finishing this step and saving; once more stops at once\n"
            os.write(2, text.encode())
