"""Ctrl-C in a training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Notes Ctrl-C, so that a training can end after its step with a model that can be used.

    Lightning would end the program and leave the signal ignored. A second Ctrl-C raises at once.
    """

    def __init__(self) -> None:
        self.has_happened = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note Ctrl-C inside. In other threads, or if the program handles Ctrl-C itself, nothing changes."""
        is_ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if not is_ours:
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.has_happened:
            signal.default_int_handler(number, frame)
        self.has_happened = True
