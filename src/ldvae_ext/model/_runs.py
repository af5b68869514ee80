"""Runs of an ensemble: their cells, their seeds and their training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from ldvae_ext._scvi import splitting_cells_by
from ldvae_ext.backends.loader import CountsSplitter
from ldvae_ext.model._ldvae import LDVAE


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the runs of an ensemble have in common."""

    n_latent: int
    max_epochs: int | None
    resample: str | None
    train_size: float
    seed: int
    model_kwargs: dict[str, Any]
    train_kwargs: dict[str, Any]

    def model(self, adata: AnnData) -> LDVAE:
        """A model that is not trained."""
        return LDVAE(adata, n_latent=self.n_latent, **self.model_kwargs)

    def train(self, adata: AnnData, m: int) -> LDVAE | str:
        """The model of a run on its varimax axes, or why its training failed.

        Parameters
        ----------
        adata
            Registered cells.
        m
            Number of the run.

        Raises
        ------
        TypeError
            If training does not have an argument. That fails all runs alike.
        ValueError
            If the model does not have an option.
        """
        cells, _ = cells_of_run(adata.n_obs, m, self.resample, self.train_size, self.seed)
        with seeded(self.seed + m):
            model = self.model(adata)
            try:
                train_on(model, cells, self.max_epochs, self.train_kwargs)
                model.rotate()
            except TypeError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the other runs are worth having
                return f"{type(error).__name__}: {error}"
        return model

    def kind(self, n_cells: int, m: int) -> int:
        """A number that runs on the same cells share."""
        return cells_of_run(n_cells, m, self.resample, self.train_size, self.seed)[1]


def cells_of_run(
    n_cells: int, m: int, resample: str | None, train_size: float, seed: int
) -> tuple[list[np.ndarray], int]:
    """Cells to train on (some perhaps repeatedly), to validate on and others; and a number that runs on the same cells share."""
    if resample == "bootstrap":
        drawn = np.sort(np.random.default_rng([seed, m]).choice(n_cells, n_cells))
        return [drawn, np.empty(0, dtype=np.int64), np.setdiff1d(np.arange(n_cells), drawn)], m
    shuffled = np.random.default_rng(seed).permutation(n_cells)
    if resample == "halves":
        halves = np.array_split(shuffled, 2)
        return [halves[m % 2], np.empty(0, dtype=np.int64), halves[1 - m % 2]], m % 2
    n_train = int(np.ceil(train_size * n_cells))
    return [shuffled[:n_train], shuffled[n_train:], np.empty(0, dtype=np.int64)], m


class DrawnCells(CountsSplitter):
    """scvi-tools' split by given cells, of which some may be trained on repeatedly."""

    def __init__(self, *args: Any, drawn: np.ndarray, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drawn = drawn

    def setup(self, stage: str | None = None) -> None:
        """Split the cells; scvi-tools refuses duplicate indices."""
        super().setup(stage)
        self.train_idx = self._drawn


def train_on(model: LDVAE, cells: list[np.ndarray], max_epochs: int | None, options: dict[str, Any]) -> None:
    """Train on given cells."""
    if "callbacks" in options:
        # scvi-tools adds those of the training to the list.
        options = {**options, "callbacks": list(options["callbacks"])}
    split = {"external_indexing": [np.unique(cells[0]), *cells[1:]], "drawn": cells[0]}
    with splitting_cells_by(model, DrawnCells):
        model.train(max_epochs, datasplitter_kwargs=split, **options)
    if not np.isfinite(model.module.get_loadings()).all():
        msg = "Training ended with loadings that are NaN or infinite."
        raise FloatingPointError(msg)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random draws of torch and numpy from a seed, with a quiet Lightning, and the caller's own afterwards."""
    devices = list(range(torch.cuda.device_count()))
    state = np.random.get_state()  # noqa: NPY002 - what scvi-tools draws from
    # Lightning logs a line on accelerators at each training, which would interrupt the progress bar.
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(max(logging.WARNING, lightning.getEffectiveLevel()))
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        lightning.setLevel(level)
        np.random.set_state(state)  # noqa: NPY002
