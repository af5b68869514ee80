"""One progress bar for several trainings."""

from __future__ import annotations

from typing import Any, Self

from tqdm import tqdm


class Progress:
    """A bar that counts the epochs of all trainings.

    Parameters
    ----------
    n_runs, max_epochs
        Number of trainings, and their largest number of epochs.
    silent
        True to hide it. It is hidden, too, where the output is no terminal.
    """

    def __init__(self, n_runs: int, max_epochs: int, *, silent: bool) -> None:
        self._n_runs, self._max_epochs, self._run = n_runs, max_epochs, 0
        self._bar = tqdm(total=n_runs * max_epochs, disable=silent or None, unit="epoch", leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def callback(self) -> Any:
        """A callback of Lightning for the trainings, one after another."""
        from lightning.pytorch.callbacks import LambdaCallback

        return LambdaCallback(
            on_train_start=lambda *_: self.starts(),
            on_train_epoch_end=lambda *_: self.advances(),
            on_train_end=lambda trainer, _: self.ends(trainer.current_epoch),
        )

    def starts(self) -> None:
        """A training starts."""
        self._run += 1
        self._bar.set_description(f"Training, run {self._run} of {self._n_runs}")

    def advances(self) -> None:
        """An epoch has ended."""
        self._bar.update()

    def ends(self, n_epochs: int) -> None:
        """A training has ended, possibly before its last epoch: the other epochs are no longer expected."""
        self._bar.total -= self._max_epochs - n_epochs
        self._bar.refresh()
