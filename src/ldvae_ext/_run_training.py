"""Trainings of the main job, and the agreement of their factors."""

from __future__ import annotations

import io
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext.core.matching import cosines, match_columns

if TYPE_CHECKING:
    from ldvae_ext._run import Options
    from ldvae_ext.model import LDVAE, Ensemble

# The learning rate is that of the LDVAE tutorial of scvi-tools. Training stops when the ELBO of held-out cells has not improved for
# PATIENCE epochs, not before the KL weight is 1.
LEARNING_RATE, MAX_EPOCHS, WARMUP, PATIENCE = 5e-3, 400, 50, 15
# With fewer cells, all epochs are trained.
MIN_TO_STOP = 100
REPRODUCIBILITY = "reproducibility"


def stops_early(adata: AnnData) -> bool:
    """True if a training ends when held-out cells are no better: with few of them, their ELBO says little."""
    return adata.n_obs >= MIN_TO_STOP


def train_models(selected: AnnData, options: Options, *, silent: bool) -> tuple[LDVAE, Ensemble | None]:
    """The model to read, and the ensemble that it is of, if there are several runs."""
    import torch

    from ldvae_ext._progress import Progress
    from ldvae_ext.model import LDVAE, fit_ensemble
    from ldvae_ext.model._processes import n_processes

    max_epochs = MAX_EPOCHS if options.max_epochs is None else options.max_epochs
    warmup = min(WARMUP, max(1, max_epochs // 2))
    progress = Progress(options.n_runs, max_epochs, silent=silent)
    # One cell in ten is held out: with fewer than ten cells there is none.
    has_held_out = selected.n_obs >= 10
    training: dict[str, Any] = {
        "accelerator": "cpu" if not torch.cuda.is_available() else "auto",
        "kl_warmup": warmup,
        "plan_kwargs": {"lr": LEARNING_RATE},
        "check_val_every_n_epoch": 1 if has_held_out else None,
        "enable_progress_bar": False,
        "callbacks": [progress.callback()],
        **(
            {"early_stopping": True, "early_stopping_patience": PATIENCE, "early_stopping_warmup_epochs": warmup}
            if stops_early(selected)
            else {}
        ),
    }
    with _seeded(options.seed), _quiet_lightning(), torch_threads_kept(), progress:
        # Minibatches are small: several threads save little time on an idle machine, and wait for each other on a busy one.
        torch.set_num_threads(1)
        if options.n_runs == 1:
            model = LDVAE(selected, n_latent=options.n_latent)
            model.train(max_epochs, **training)
            model.rotate(options.rotation)
            return model, None
        ensemble = fit_ensemble(
            selected,
            options.n_runs,
            n_latent=options.n_latent,
            max_epochs=max_epochs,
            seed=options.seed,
            train_kwargs=training,
            n_jobs=n_processes(selected, options.n_runs, max_epochs, **training),
            silent=True,
        )
    model = ensemble.representative()
    if options.rotation != "varimax":
        model.rotate(options.rotation)
    return model, ensemble


def reproducibility(model: LDVAE, ensemble: Ensemble) -> pd.Series:
    """Reproducibility of the factors of the exported model, by name."""
    rotation = model.rotation
    if rotation is not None and rotation.method == "consensus":
        return pd.Series(ensemble.stats[REPRODUCIBILITY].to_numpy(), index=model.factor_names)
    # Mean absolute cosine with the partner in each run that is another training.
    method: Any = "none" if rotation is None else rotation.method
    own_gk, found = _loadings(model), []
    for other in ensemble.models:
        if other.history is model.history:
            continue
        kept = other.rotation_
        other.rotate(method)
        other_gk = _loadings(other)
        other.rotation_ = kept
        found.append(match_columns(cosines(own_gk, other_gk)).cosine)
    return pd.Series(np.mean(found, axis=0), index=model.factor_names)


def _loadings(model: LDVAE) -> np.ndarray:
    return model.get_decoder(rotated=model.rotation is not None).centered().weight_gk


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, the seed of scvi-tools; afterwards the caller's, and what scvi-tools and Lightning set with a seed as it was."""
    import scvi
    import torch

    own, cudnn = scvi.settings.seed, torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    environment = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    with random_states_kept():
        try:
            scvi.settings.seed = seed
            yield
        finally:
            scvi.settings.seed = own
            cudnn.deterministic, cudnn.benchmark = flags
            for name, value in environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch: the caller's draws go on as if there had been none inside."""
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - scvi-tools draws from it
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without the notices of Lightning and scvi-tools on accelerators, products and the end of the training."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        # scvi-tools prints why a training stopped, and Lightning warns about loggers and data loaders.
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore the number of torch's threads, which scanpy's selection of genes changes, too."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
