"""Runs of an ensemble, side by side in processes of their own."""

from __future__ import annotations

import io
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData

from ldvae_ext._scvi import SETUP_ARGS_KEY, get_max_epochs_heuristic
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model._runs import RunPlan

# Rough seconds of a training step, to judge if processes are worth their start: with no genes, and for each gene.
_STEP, _STEP_OF_GENE = 2e-3, 1.6e-6
# Seconds that a process takes to import scvi-tools and torch, and to receive its data, on a busy machine.
_START = 10.0
# Attributes that belong to the model of this process: made again, or bound to its data.
_OWN = ("registry_", "init_params_")


@dataclass(frozen=True)
class _Result:
    """A trained model without its data, and the warnings of its training."""

    weights: dict[str, np.ndarray]
    attributes: dict[str, Any]
    warned: list[tuple[str, type[Warning], str, int, str]]


def n_processes(
    adata: AnnData,
    n_runs: int,
    max_epochs: int | None,
    *,
    accelerator: str = "auto",
    batch_size: int | None = None,
    **_: Any,
) -> int:
    """Number of processes with which the runs of an ensemble end soonest; 1 trains in this one.

    Parameters
    ----------
    adata
        Registered cells.
    n_runs, max_epochs
        Number of runs, and of their epochs.
    accelerator, batch_size, **_
        As in :meth:`LDVAE.train`.
    """
    is_on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    # A process that another one started for work of its own has been given its share of the processors.
    if not is_on_cpu or adata.isbacked or multiprocessing.parent_process() is not None:
        return 1
    n_epochs = get_max_epochs_heuristic(adata.n_obs) if max_epochs is None else max_epochs
    n_steps = n_epochs * -(-adata.n_obs // (batch_size or scvi.settings.batch_size))
    of_run = n_steps * (_STEP + _STEP_OF_GENE * adata.n_vars)
    n_jobs = min(n_runs, joblib.cpu_count())
    beside = -(-n_runs // n_jobs) * of_run
    return n_jobs if beside + _START < n_runs * of_run else 1


def train_in_processes(adata: AnnData, n_runs: int, plan: RunPlan, n_jobs: int) -> Iterator[tuple[int, Any]]:
    """Trained models, or the errors of their training, in the order in which they end, with the number of the run.

    The counts are in memory once: processes read them from files that joblib maps.

    Parameters
    ----------
    adata
        Registered cells.
    n_runs, plan
        The runs.
    n_jobs
        Number of processes.
    """
    # Raised here, before any process starts: an option that the model does not have.
    registry = plan.model(adata).registry
    light = _light(adata, registry[SETUP_ARGS_KEY].get("layer"))
    settings = {name: getattr(scvi.settings, name) for name in ("batch_size", "dl_num_workers")}
    n_threads = max(1, min(torch.get_num_threads(), joblib.cpu_count() // n_jobs))
    work = joblib.delayed(_train)
    parallel = joblib.Parallel(n_jobs, return_as="generator_unordered", mmap_mode="r", backend="loky")
    results = parallel(work(light, registry, plan, m, settings, n_threads) for m in range(n_runs))
    try:
        for m, result in results:
            if isinstance(result, TypeError):
                raise result
            yield m, result if isinstance(result, Exception) else _restored(adata, plan, result)
    finally:
        with warnings.catch_warnings():
            # Of results that nobody takes, if a run raised or the caller stopped.
            warnings.simplefilter("ignore")
            results.close()


def _light(adata: AnnData, layer: str | None) -> AnnData:
    """The registered counts and the columns of the cells alone."""
    obs: Any = adata.obs
    var = pd.DataFrame(index=adata.var_names)
    if layer is None:
        return AnnData(adata.X, obs=obs, var=var)
    return AnnData(obs=obs, var=var, layers={layer: adata.layers[layer]})


def _train(
    adata: AnnData, registry: dict[str, Any], plan: RunPlan, m: int, settings: dict[str, Any], n_threads: int
) -> tuple[int, _Result | Exception]:
    """Train a run in this process."""
    torch.set_num_threads(n_threads)
    for name, value in settings.items():
        setattr(scvi.settings, name, value)
    # scvi-tools prints why a training stopped, into the progress bar of the first process.
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        LDVAE.setup_anndata(adata, source_registry=registry, **registry[SETUP_ARGS_KEY])
        warnings.simplefilter("always")
        try:
            model = plan.train(adata, m)
        except TypeError as error:
            model = error
    if isinstance(model, Exception):
        return m, model
    weights = {name: value.cpu().numpy() for name, value in model.module.state_dict().items()}
    attributes = {
        name: value for name, value in model._get_user_attributes() if name.endswith("_") and name not in _OWN
    }
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    warned = [(str(w.message), w.category, w.filename, w.lineno, modules.get(w.filename, "")) for w in caught]
    return m, _Result(weights, attributes, warned)


def _restored(adata: AnnData, plan: RunPlan, result: _Result) -> LDVAE:
    """The model of a run on the data of this process."""
    for text, category, filename, line, module in result.warned:
        warnings.warn_explicit(text, category, filename, line, module)
    # The drawn parameters are replaced at once.
    with torch.random.fork_rng(devices=[]):
        model = plan.model(adata)
    # Arrays that came through a mapped file cannot be written to.
    model.module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in result.weights.items()})
    model.module.eval()
    for name, value in result.attributes.items():
        setattr(model, name, value)
    return model
