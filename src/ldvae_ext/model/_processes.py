"""Runs of an ensemble, side by side in processes of their own."""

from __future__ import annotations

import io
import multiprocessing
import sys
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import joblib
import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from joblib.externals.loky.backend.reduction import dump
from scipy import sparse

from ldvae_ext._files import scratch_folder
from ldvae_ext._scvi import SETUP_ARGS_KEY, get_max_epochs_heuristic
from ldvae_ext._validate import warn
from ldvae_ext.core.rows import RowReader
from ldvae_ext.kernels.threads import compiled, is_compiled
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model._runs import RunPlan, seeded
from ldvae_ext.model._workers import Workers

# Rough seconds of a training step, to judge if processes are worth their start: with no genes, and for each gene.
_STEP, _STEP_OF_GENE = 2e-3, 1.6e-6
# Seconds that a process takes to import scvi-tools and torch, and to receive its data, on a busy machine.
_START = 10.0
# Attributes that the model of this process has of its own.
_NOT_SENT = ("registry_", "init_params_")
# Arguments of a training with objects of the caller, which would collect what they collect in another process.
STAY_HERE = ("callbacks", "logger", "loggers", "profiler", "plugins", "strategy", "trainer_config")

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class _Settings:
    """Settings of this process that a training depends on."""

    of_scvi: dict[str, Any]
    n_threads: int
    is_compiled: bool
    is_deterministic: bool
    warns_of_nondeterminism: bool

    @classmethod
    def now(cls, n_threads: int) -> _Settings:
        names = ("batch_size", "dl_num_workers", "dl_persistent_workers", "logging_dir")
        of_scvi = {name: getattr(scvi.settings, name) for name in names}
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(of_scvi, n_threads, is_compiled(), torch.are_deterministic_algorithms_enabled(), warns)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The settings inside; those before afterwards, since joblib may give the process other work."""
        before = _Settings.now(torch.get_num_threads())
        self._put()
        try:
            with compiled(on=self.is_compiled):
                yield
        finally:
            before._put()

    def _put(self) -> None:
        for name, value in self.of_scvi.items():
            setattr(scvi.settings, name, value)
        torch.set_num_threads(self.n_threads)
        torch.use_deterministic_algorithms(self.is_deterministic, warn_only=self.warns_of_nondeterminism)


@dataclass(frozen=True)
class _Result:
    """A trained model without its data, and the warnings of its training."""

    weights: dict[str, np.ndarray]
    attributes: dict[str, Any]
    device: str
    warned: list[tuple[str, type[Warning], str, int, str]]


def are_in_memory(adata: AnnData) -> bool:
    """True if the registered counts are in memory, neither on disk nor computed when they are needed.

    Parameters
    ----------
    adata
        Registered cells.
    """
    manager = LDVAE._get_most_recent_anndata_manager(adata, required=True)
    layer = manager.registry[SETUP_ARGS_KEY].get("layer")
    counts = adata.X if layer is None else adata.layers[layer]
    # A reader would convert columns to rows.
    return sparse.issparse(counts) or RowReader(counts).is_in_memory


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
        Registered cells, in memory.
    n_runs, max_epochs
        Number of runs, and of their epochs.
    accelerator, batch_size, **_
        As in :meth:`LDVAE.train`.
    """
    is_on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    # A process that another one started for work of its own has been given its share of the processors.
    if not is_on_cpu or multiprocessing.parent_process() is not None:
        return 1
    n_epochs = get_max_epochs_heuristic(adata.n_obs) if max_epochs is None else max_epochs
    n_steps = n_epochs * -(-adata.n_obs // (batch_size or scvi.settings.batch_size))
    of_run = n_steps * (_STEP + _STEP_OF_GENE * adata.n_vars)
    n_jobs = min(n_runs, joblib.cpu_count())
    beside = -(-n_runs // n_jobs) * of_run
    return n_jobs if beside + _START < n_runs * of_run else 1


def train_in_processes(
    adata: AnnData, runs: Sequence[int], plan: RunPlan, n_jobs: int
) -> Generator[tuple[int, LDVAE | str]]:
    """Trained models, or why their training failed, with the number of the run.

    This process trains, too, while the others start. The registered counts are written to a file, which the others map into their
    memory.

    Parameters
    ----------
    adata
        Registered cells, in memory.
    runs, plan
        Numbers of the runs, and what they have in common.
    n_jobs
        Number of processes, this one included.
    """
    n_jobs = min(n_jobs, len(runs))
    registry, sent = _sent(adata, plan)
    settings = _Settings.now(max(1, min(torch.get_num_threads(), joblib.cpu_count() // n_jobs)))
    # Raised before any training: an argument that cannot be sent.
    dump((registry, plan, settings), io.BytesIO())
    # A process of `multiprocessing.Pool` may start no others.
    n_others = 0 if multiprocessing.current_process().daemon else n_jobs - 1
    with scratch_folder() as folder:
        path = folder / "cells"
        try:
            if n_others:
                joblib.dump(sent, path)
        except OSError as error:
            warn(f"The counts could not be written for other processes ({error}); all runs are trained in this one.")
            n_others = 0
        task = partial(_train_on_file, path, registry, plan, settings)
        others = Workers(n_others, runs, task, settings.n_threads)
        missing = set(runs)

        def from_others(*, wait: bool) -> Generator[tuple[int, LDVAE | str]]:
            for m, outcome in others.ended(wait=wait):
                missing.discard(m)
                yield m, _restored(adata, plan, outcome)

        try:
            while missing:
                m = others.next_run()
                if m is not None:
                    # scvi-tools prints why a training stopped, into the progress bar.
                    with settings.in_force(), redirect_stdout(io.StringIO()):
                        outcome = plan.train(adata, m)
                    missing.discard(m)
                    yield m, outcome
                # If there is nothing left to begin, wait for the next run that ends.
                yield from from_others(wait=m is None)
        except KeyboardInterrupt:
            yield from from_others(wait=False)
            raise
        finally:
            others.stop()


def train_by_client(
    adata: AnnData, runs: Sequence[int], plan: RunPlan, client: Any
) -> Generator[tuple[int, LDVAE | str]]:
    """As :func:`train_in_processes`, in processes that are there already.

    Parameters
    ----------
    adata, runs, plan
        As in :func:`train_in_processes`.
    client
        A client of dask, or an executor of Python.
    """
    registry, sent = _sent(adata, plan)
    settings = _Settings.now(torch.get_num_threads())
    is_dask = hasattr(client, "scatter")
    # Each worker gets the counts once, and the others have them if one is killed. dask would merge equal calls unless `pure=False`.
    data, options = (client.scatter(sent, broadcast=True), {"pure": False}) if is_dask else (sent, {})
    done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    futures = []
    try:
        for m in runs:
            futures.append(client.submit(_train, data, registry, plan, m, settings, **options))
            futures[-1].add_done_callback(lambda future, m=m: done.put((m, future)))
        for _ in runs:
            m, future = done.get()
            try:
                outcome = future.result()
            except Exception as error:  # noqa: BLE001 - a process that was killed, or arguments that cannot be sent
                outcome = f"{type(error).__name__}: {error}"
            yield m, _restored(adata, plan, outcome)
    finally:
        for future in futures:
            future.cancel()


def _sent(adata: AnnData, plan: RunPlan) -> tuple[dict[str, Any], AnnData]:
    """What other processes set up, and on what."""
    with seeded(plan.seed):
        # Raised here, before any process starts: an option that the model does not have.
        registry = plan.model(adata).registry
    return registry, _counts_and_columns(adata, registry[SETUP_ARGS_KEY])


def _counts_and_columns(adata: AnnData, arguments: dict[str, Any]) -> AnnData:
    """The registered counts and columns alone."""
    layer, columns = arguments.get("layer"), []
    for name, value in arguments.items():
        if name.endswith(("_key", "_keys")) and value is not None:
            columns += [value] if isinstance(value, str) else list(value)
    obs, var = cast("pd.DataFrame", adata.obs)[columns], pd.DataFrame(index=adata.var_names)
    if layer is None:
        return AnnData(adata.X, obs=obs, var=var)
    return AnnData(obs=obs, var=var, layers={layer: adata.layers[layer]})


def _train_on_file(
    path: Path, registry: dict[str, Any], plan: RunPlan, settings: _Settings, m: int
) -> _Result | str | TypeError:
    """Train a run on registered counts in a file of joblib."""
    return _train(_cells(path), registry, plan, m, settings)


@lru_cache(maxsize=1)
def _cells(path: Path) -> AnnData:
    """Cells in a file, the same for all runs of a process: scvi-tools keeps what is registered for each AnnData."""
    return joblib.load(path, mmap_mode="r")


def _train(
    adata: AnnData, registry: dict[str, Any], plan: RunPlan, m: int, settings: _Settings
) -> _Result | str | TypeError:
    """Train a run in this process."""
    # A worker of dask may run several tasks in its threads, and random states and settings are of the process.
    with (
        _one_at_a_time,
        settings.in_force(),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("ignore")
        LDVAE.setup_anndata(adata, source_registry=registry, **registry[SETUP_ARGS_KEY])
        warnings.simplefilter("always")
        try:
            model = plan.train(adata, m)
        except TypeError as error:
            return TypeError(str(error))
    if isinstance(model, str):
        return model
    weights = {name: value.cpu().numpy() for name, value in model.module.state_dict().items()}
    attributes = {
        name: value for name, value in model._get_user_attributes() if name.endswith("_") and name not in _NOT_SENT
    }
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    warned = [(str(w.message), w.category, w.filename, w.lineno, modules.get(w.filename, "")) for w in caught]
    return _Result(weights, attributes, str(model.device), warned)


def _restored(adata: AnnData, plan: RunPlan, result: _Result | str | TypeError) -> LDVAE | str:
    """The model of a run on the data of this process, or why there is none.

    That can be a warning that the caller's filters make an error. A TypeError, which fails all runs alike, is raised.
    """
    if isinstance(result, TypeError):
        raise result
    if isinstance(result, str):
        return result
    for text, category, filename, line, module in result.warned:
        try:
            warnings.warn_explicit(text, category, filename, line, module)
        except Warning as error:
            return f"{type(error).__name__}: {error}"
    # The drawn parameters are replaced at once. A thread of this process may be training.
    with _one_at_a_time, seeded(plan.seed):
        model = plan.model(adata)
    # Arrays that came through a mapped file cannot be written to.
    model.module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in result.weights.items()})
    model.to_device(result.device)
    model.module.eval()
    for name, value in result.attributes.items():
        setattr(model, name, value)
    return model
