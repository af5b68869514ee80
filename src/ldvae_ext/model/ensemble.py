"""Several trainings of one model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scvi.utils import track

from ldvae_ext._files import check_is_path
from ldvae_ext._validate import check_one_of, check_positive_int, listed, warn
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.matching import consensus_of, cosines, match_columns
from ldvae_ext.model._arguments import check_mapping, penalties
from ldvae_ext.model._axes import factor_stream
from ldvae_ext.model._ensemble import Ensemble
from ldvae_ext.model._ensemble_files import RunFolder
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model._processes import STAY_HERE, are_in_memory, n_processes, train_by_client, train_in_processes
from ldvae_ext.model._runs import RunPlan
from ldvae_ext.model.replication import factor_replication

RESAMPLES = ("halves", "bootstrap")
_TRAIN_SIZE = 0.9
# Arguments that an ensemble sets for each of its runs.
_DECIDED = ("datasplitter_kwargs", "datamodule", "shuffle_set_split", "validation_size")
_OWN_ARGUMENTS = ("adata", "n_latent", "max_epochs")


def fit_ensemble(
    adata: AnnData,
    n_runs: int = 5,
    *,
    n_latent: int = 10,
    resample: Literal["halves", "bootstrap"] | None = None,
    max_epochs: int | None = None,
    seed: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    train_kwargs: dict[str, Any] | None = None,
    n_jobs: int | None = None,
    client: Any = None,
    folder: str | Path | None = None,
    silent: bool = False,
) -> Ensemble:
    """Train the same model several times, and find out which factors come back.

    Each run is rotated by varimax. The consensus is computed from the pooled loadings (their leading singular vectors, then
    varimax), and does not depend on the axes of a run. The reproducibility of a factor is the mean absolute cosine
    between its partner in a run and the consensus of the other runs.

    Runs that have not been trained to the end look unstable, whatever the data hold: give ``max_epochs`` and a learning rate
    (``train_kwargs={"plan_kwargs": {"lr": 5e-3}}``) with which the loss has settled.

    **Seeds are not samples.** Runs that differ only by their seed are trained on the same cells: a factor on which they agree
    is a property of these cells and of the model, and can still be noise of these cells. ``resample`` tests if it recurs with
    other cells; the agreement is then much lower, and is the number to report. (Quantities computed from the data before training,
    the prior of a latent library size and the start of ``bias="auto"``, are from all cells then, too.)

    Parameters
    ----------
    adata
        AnnData registered by :meth:`LDVAE.setup_anndata`. All runs read it; it is neither copied nor written to.
    n_runs
        Number of runs, at least 2.
    n_latent
        Number of latents.
    resample
        Cells of each run. None: the same for all. ``"halves"``: the cells are divided at random into two halves, runs alternate
        between them, and each run is compared with the consensus of the runs on the other half; then each run encodes all
        cells once more to find what replicates. ``"bootstrap"``: cells drawn with
        replacement for each run, in the number of all cells.
    max_epochs
        As in :meth:`LDVAE.train`.
    seed
        Seed of the first run; the others count on from it. Cells are drawn by it, too. ``scvi.settings.seed`` if None, or 0.
    model_kwargs, train_kwargs
        Arguments of :class:`LDVAE` and of :meth:`LDVAE.train`, whose ``kl_warmup`` is ``"auto"`` here unless given. A
        ``train_size`` cuts off the same cells in all runs (0.9 if not given; with ``resample`` all drawn cells are trained on).
    n_jobs
        Number of processes that train side by side, this one included, with the same results but for rounding. None: one for
        each processor, as long as there are runs for it, if the network is trained on a CPU, the trainings are long enough
        to be worth the start of processes, and ``train_kwargs`` have no callbacks, loggers or other objects of the caller, of which
        other processes would change copies.
    client
        A ``dask.distributed.Client``, or a ``concurrent.futures.Executor`` such as a ``ProcessPoolExecutor``, whose processes train
        the runs, with the same results but for rounding. They need the package, and what ``train_kwargs`` hold. Each run takes
        ``torch.get_num_threads()`` threads, and a process trains one run at a time.
    folder
        Folder for the runs, each of which is written when it is done, without a pickle. If the process was killed, the same call
        trains the runs that are missing; a larger ``n_runs`` adds runs. :meth:`Ensemble.load` opens the complete ensemble.
    silent
        True to hide the progress bar, which counts runs.

    Returns
    -------
    An :class:`Ensemble`. A run that fails is left out, with a warning. After Ctrl-C it has the runs that were done, if they can be
    compared.

    Raises
    ------
    TypeError
        If an argument has another type, or ``folder`` is given with an option of the model that only a pickle can hold.
    ValueError
        If an option is unknown or decided by the ensemble, the latent is logistic-normal, which has no other axes, or ``folder`` has
        runs with other arguments or data.
    RuntimeError
        If fewer than two runs, or none on one of the halves, succeeded.

    Examples
    --------
    >>> from ldvae_ext.model import fit_ensemble
    >>> models = fit_ensemble(adata, n_runs=2, n_latent=5, max_epochs=3)
    >>> models.names
    ['C_0', 'C_1', 'C_2', 'C_3', 'C_4']
    """
    if not isinstance(adata, AnnData):
        msg = f"`adata` must be an AnnData that `LDVAE.setup_anndata` registered; got {type(adata).__name__}."
        raise TypeError(msg)
    check_positive_int("n_runs", n_runs)
    check_positive_int("n_latent", n_latent)
    if n_jobs is not None:
        check_positive_int("n_jobs", n_jobs)
    if client is not None and not callable(getattr(client, "submit", None)):
        msg = f"`client` must be a client of dask or an executor, with a method `submit`; got {type(client).__name__}."
        raise TypeError(msg)
    if client is not None and n_jobs is not None:
        msg = f"Give either `client` or `n_jobs` ({n_jobs}): the processes of a client are there already."
        raise ValueError(msg)
    if n_runs < 2:
        msg = f"`n_runs` must be at least 2, since runs are compared; got {n_runs}."
        raise ValueError(msg)
    if resample is not None:
        check_one_of("resample", resample, RESAMPLES)
    if folder is not None:
        check_is_path("folder", folder)
    check_mapping("model_kwargs", model_kwargs)
    check_mapping("train_kwargs", train_kwargs)
    if max_epochs is not None:
        check_positive_int("max_epochs", max_epochs)
    model_kwargs, train_kwargs = dict(model_kwargs or {}), dict(train_kwargs or {})
    if model_kwargs.get("latent_distribution") == "ln":
        msg = "`latent_distribution='ln'` cannot be rotated, and unrotated runs are not comparable."
        raise ValueError(msg)
    own = [name for name in (*model_kwargs, *train_kwargs) if name in _OWN_ARGUMENTS]
    if own:
        msg = f"{listed(own)}: arguments of `fit_ensemble` itself."
        raise ValueError(msg)
    decided = [name for name in train_kwargs if name in _DECIDED or (name == "train_size" and resample is not None)]
    if decided:
        msg = f"`train_kwargs`: {listed(decided)}: the ensemble decides which cells a run is trained on."
        raise ValueError(msg)
    if train_kwargs.get("resume") is not None:
        msg = "`train_kwargs`: 'resume' would be one checkpoint for all runs; `fit_ensemble(folder=...)` keeps the runs that are done."
        raise ValueError(msg)
    if train_kwargs.get("decoder_penalty") is not None:
        penalties(train_kwargs["decoder_penalty"])
    train_size = train_kwargs.pop("train_size", None)
    train_size = _TRAIN_SIZE if train_size is None else train_size
    is_number = isinstance(train_size, (int, float, np.integer, np.floating)) and not isinstance(train_size, bool)
    if not is_number or not 0 < train_size <= 1:
        msg = f"`train_size` must be above 0 and at most 1; got {train_size!r}."
        raise ValueError(msg)
    seed = (0 if scvi.settings.seed is None else scvi.settings.seed) if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        msg = f"`seed` must be an integer of at least 0; got {seed!r}."
        raise ValueError(msg)
    plan = RunPlan(
        n_latent=n_latent,
        max_epochs=max_epochs,
        resample=resample,
        train_size=train_size,
        seed=int(seed),
        model_kwargs=model_kwargs,
        train_kwargs={"kl_warmup": "auto", "enable_progress_bar": False, **train_kwargs},
    )
    if client is not None or n_jobs not in (None, 1):
        _check_in_memory(adata, n_jobs)
    store = None if folder is None else RunFolder(Path(folder), plan, adata)
    trained = {} if store is None else store.done(n_runs)
    missing = [m for m in range(n_runs) if m not in trained]
    outcomes = _trained(adata, missing, plan, n_jobs, client)
    failures: dict[int, str] = {}
    try:
        # Closed, so that other processes end if the writing of a run fails.
        with closing(outcomes):
            for m, outcome in track(outcomes, description="Training runs", disable=silent, total=len(missing)):
                if isinstance(outcome, str):
                    failures[seed + m] = outcome
                    warn(f"The run with seed {seed + m} failed and is left out ({outcome}).")
                else:
                    trained[m] = outcome
                    if store is not None:
                        store.keep(m, outcome)
    except KeyboardInterrupt:
        if len({plan.kind(adata.n_obs, m) for m in trained}) < 2:
            if store is None:
                raise
            msg = f"{folder} has {len(trained)} of {n_runs} runs; the same call trains the others."
            raise KeyboardInterrupt(msg) from None
        warn(f"Interrupted: the ensemble has the {len(trained)} of {n_runs} runs that were done.")
    done = sorted(trained)
    models, seeds = [trained[m] for m in done], [seed + m for m in done]
    kinds = [plan.kind(adata.n_obs, m) for m in done]
    if len(set(kinds)) < 2:
        msg = (
            f"{len(models)} of {n_runs} runs succeeded, which cannot be compared. Errors: {listed(failures.values())}."
        )
        raise RuntimeError(msg)
    ensemble = _ensemble(models, seeds, kinds, resample, failures)
    if store is not None:
        store.keep_results(seeds, ensemble._results())
    return ensemble


def _check_in_memory(adata: AnnData, n_jobs: int | None) -> None:
    if are_in_memory(adata):
        return
    given, instead = ("client", "no client") if n_jobs is None else (f"n_jobs={n_jobs}", "`n_jobs=1`")
    msg = f"`{given}` needs counts in memory, and `adata` reads them when they are needed; use {instead} or `adata.to_memory()`."
    raise ValueError(msg)


def _trained(
    adata: AnnData, runs: list[int], plan: RunPlan, n_jobs: int | None, client: Any
) -> Generator[tuple[int, LDVAE | str]]:
    """Runs by number, here or in other processes, in the order in which they end."""
    if runs and n_jobs is None and client is None:
        stays = any(plan.train_kwargs.get(name) for name in STAY_HERE) or not are_in_memory(adata)
        n_jobs = 1 if stays else n_processes(adata, len(runs), plan.max_epochs, **plan.train_kwargs)
    if n_jobs == 1 or not runs:
        return ((m, plan.train(adata, m)) for m in runs)
    if n_jobs is None:
        return train_by_client(adata, runs, plan, client)
    return train_in_processes(adata, runs, plan, n_jobs)


def _ensemble(
    models: list[LDVAE], seeds: list[int], kinds: list[int], resample: str | None, failures: dict[int, str]
) -> Ensemble:
    """The consensus of trained models, by descending KL."""
    loadings = [model.get_loadings(canonical=True).to_numpy() for model in models]
    consensus = consensus_of(loadings, kinds)
    kl_mk = np.zeros(consensus.cosine_mk.shape)
    for m, model in enumerate(models):
        with factor_stream(model, None, None, None) as cells:
            kl = [kl_per_dimension(chunk.mean, chunk.variance) for chunk in cells.chunks]
        kl_mk[m] = np.concatenate(kl).mean(axis=0)[consensus.partner_mk[m]]
    order = np.argsort(-kl_mk.mean(axis=0), kind="stable")
    replication = None
    if resample == "halves":
        replication = factor_replication(models, kinds, consensus.loading_gk).iloc[order]
        replication.index = pd.Index([f"C_{k}" for k in range(len(order))], name="factor")
    single_mm = [[np.median(match_columns(cosines(a, b)).cosine) for b in loadings] for a in loadings]
    return Ensemble(
        models,
        seeds,
        resample,
        failures,
        genes=np.asarray(models[0].get_var_names()).astype(str),
        consensus=consensus.arranged(order),
        kl_k=kl_mk.mean(axis=0)[order],
        agreement=pd.DataFrame(single_mm, index=seeds, columns=seeds),
        cells_of_run=kinds,
        replication=replication,
    )
