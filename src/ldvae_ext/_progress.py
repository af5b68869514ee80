"""One progress bar for several trainings, in this process or in others."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

# Events that trainings append to a file, one byte each: a training starts, an epoch ends, an epoch is left out.
_START, _EPOCH, _LEFT_OUT = b"s", b"e", b"-"
_SECONDS = 0.2
# Seconds after which a bar is shown that was not requested.
_SLOW = 5


def shown_if_slow[T](parts: Iterable[T], n_parts: int | None = None, description: str = "Reading cells") -> Iterator[T]:
    """The parts, with a bar from the fifth second on, in a terminal or a notebook.

    Parameters
    ----------
    parts
        What is passed through.
    n_parts
        Their number, if known.
    description
        Text beside the bar.
    """
    can_show = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not can_show:
        yield from parts
        return
    from tqdm.auto import tqdm as bar

    yield from bar(parts, total=n_parts, desc=description, delay=_SLOW, leave=False)


class Progress:
    """A bar that counts the epochs of all trainings.

    Trainings append what happens to a file, since some run in other processes; a thread reads it and moves the bar.

    Parameters
    ----------
    n_runs, max_epochs
        Number of trainings, and their largest number of epochs.
    silent
        True to hide it. It is hidden, too, where the output is no terminal.
    """

    def __init__(self, n_runs: int, max_epochs: int, *, silent: bool) -> None:
        self._n_runs, self._max_epochs = n_runs, max_epochs
        self._bar = tqdm(total=n_runs * max_epochs, disable=silent or None, unit="epoch", leave=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ldvae_ext-")
        self._events = Path(self._folder.name) / "events"
        self._events.touch()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        self._thread.join()
        self._bar.close()
        self._folder.cleanup()

    def callback(self) -> Any:
        """A callback of Lightning for the trainings, which can be sent to other processes."""
        from lightning.pytorch.callbacks import LambdaCallback

        path, max_epochs = self._events, self._max_epochs

        def note(events: bytes) -> None:
            with path.open("ab") as file:
                file.write(events)

        return LambdaCallback(
            on_train_start=lambda *_: note(_START),
            on_train_epoch_end=lambda *_: note(_EPOCH),
            on_train_end=lambda trainer, _: note(_LEFT_OUT * (max_epochs - trainer.current_epoch)),
        )

    def _follow(self) -> None:
        while not self._is_over.wait(_SECONDS):
            self.show()

    def show(self) -> None:
        """Move the bar to what trainings have written."""
        events = self._events.read_bytes()
        n_started = events.count(_START)
        if n_started:
            self._bar.set_description(f"Training, run {n_started} of {self._n_runs}", refresh=False)
        self._bar.total = self._n_runs * self._max_epochs - events.count(_LEFT_OUT)
        self._bar.update(events.count(_EPOCH) - self._bar.n)
        self._bar.refresh()
