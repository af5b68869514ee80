"""Several trainings of one model, and their consensus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scvi.utils import track

from ldvae_ext._keys import CONSENSUS_KEY, consensus_keys
from ldvae_ext._validate import check_one_of, check_positive_int, listed, warn
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core._arrays import at_positions
from ldvae_ext.core.matching import STABLE, UNSTABLE, Consensus, consensus_of, cosines, flags, match_columns, procrustes
from ldvae_ext.core.rotation import CONSENSUS, Rotation
from ldvae_ext.model._axes import factor_stream
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model._runs import cells_of_run, seeded, train_on
from ldvae_ext.model.programs import Programs, additive_programs

RESAMPLES = ("halves", "bootstrap")
CELLS = {None: "same", "halves": "disjoint halves", "bootstrap": "bootstrap"}
_TRAIN_SIZE = 0.9
# Arguments that an ensemble sets for each of its runs.
_DECIDED = ("datasplitter_kwargs", "datamodule", "shuffle_set_split", "validation_size")
_OWN_ARGUMENTS = ("adata", "n_latent", "max_epochs")


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Models of the same data, and their consensus; from :func:`fit_ensemble`."""

    models: list[LDVAE]
    """Successful runs, each with its varimax rotation, on which no result below depends."""
    seeds: list[int]
    """Their seeds."""
    resample: str | None
    """Training cells of the runs: None: the same for all."""
    failures: dict[int, str]
    """Error messages of failed runs, by seed."""
    genes: np.ndarray
    consensus: Consensus
    """Consensus and reproducibility as arrays; :attr:`loadings`, :attr:`stats` and :attr:`spread` have names."""
    kl_k: np.ndarray
    """Mean over runs of the KL of the matched factors, in nats per cell."""
    agreement: pd.DataFrame
    """Median absolute cosine of the matched factors of each two runs, runs x runs, named by seed: single runs, no consensus. With
    ``resample="halves"`` look at runs with another number in ``cells_of_run``."""
    cells_of_run: list[int]
    """Kind of each run; runs of a kind are left out together. With ``resample="halves"`` the half, else the number of the run."""

    @property
    def names(self) -> list[str]:
        """``C_0``, ``C_1``, ...: consensus factors by descending KL."""
        return [f"C_{k}" for k in range(len(self.kl_k))]

    @property
    def loadings(self) -> pd.DataFrame:
        """Consensus loadings, genes x factors, centred over genes, in log-rate."""
        return pd.DataFrame(self.consensus.loading_gk, index=self.genes, columns=self.names)

    @property
    def spread(self) -> pd.DataFrame:
        """Standard deviation over runs of the loading of each gene in the matched factors, genes x factors."""
        return pd.DataFrame(self.consensus.spread_gk, index=self.genes, columns=self.names)

    @property
    def stats(self) -> pd.DataFrame:
        """One row for each consensus factor.

        ``reproducibility`` in [0, 1]: mean over runs of the absolute cosine between the run's factor and its factor in a
        consensus of the others; ``lowest``, the smallest of them; ``flag``: ``"stable"`` from 0.8 on, ``"unstable"`` below 0.6,
        else ``"uncertain"``; ``kl``: mean over runs, in nats per cell; ``cells``: relation of the cells of compared runs,
        ``"same"`` (only seeds differ), ``"disjoint halves"`` or ``"bootstrap"``.
        """
        reproducibility_k = self.consensus.reproducibility_k
        return pd.DataFrame(
            {
                "reproducibility": reproducibility_k,
                "lowest": self.consensus.cosine_mk.min(axis=0),
                "flag": flags(reproducibility_k),
                "kl": self.kl_k,
                "cells": CELLS[self.resample],
            },
            index=pd.Index(self.names, name="factor"),
        )

    @property
    def n_stable(self) -> int:
        """Number of stable factors."""
        return int((self.consensus.reproducibility_k >= STABLE).sum())

    def __repr__(self) -> str:
        flag = self.stats["flag"].value_counts()
        counts = ", ".join(f"{flag.get(name, 0)} {name}" for name in ("stable", "uncertain", "unstable"))
        meaning = {
            None: "other seeds, same cells: no information about other cells",
            "halves": "trained on two disjoint halves of the cells",
            "bootstrap": "each trained on cells drawn with replacement",
        }[self.resample]
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"Ensemble of {len(self.models)} runs{failed} ({meaning}); {len(self.names)} consensus factors: {counts}"

    def representative(self) -> LDVAE:
        """The run that is nearest to the consensus, rotated so that its factors ``F_k`` are as near to ``C_k`` as they can be.

        The rotation (orthogonal Procrustes, Schonemann 1966, 10.1007/BF02289451) is a view as any other (:meth:`LDVAE.rotate`),
        called ``"consensus"``, with the order and signs of the consensus. Use the model to encode cells, to export and to
        ablate. It has a network of its own, so that the run in ``models`` does not change, and shares the data.
        """
        nearest = copy(self.models[int(np.argmax(self.consensus.cosine_mk.mean(axis=1)))])
        nearest.module = deepcopy(nearest.module)
        loading_gk = nearest.get_decoder().centered().weight_gk
        matrix_kk, _ = procrustes(self.consensus.loading_gk, loading_gk)
        nearest.rotation_ = {"matrix": Rotation(matrix_kk=matrix_kk, method=CONSENSUS).matrix_kk, "method": CONSENSUS}
        return nearest

    def programs(
        self,
        n_programs: int | Sequence[int] | None = None,
        groupby: str | None = None,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        max_cells: int = 5000,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> Programs:
        """Additive gene programs of the mean expression that the runs decode.

        The mean over several runs varies less from training to training than a single run. See :meth:`LDVAE.get_programs`
        for definitions, arguments and errors.

        Returns
        -------
        The programs. Their ``stability`` compares them with the programs of single runs, which with
        ``resample="halves"`` have seen other cells. Factors in ``relations`` are the consensus factors of :meth:`representative`.
        """
        return additive_programs(
            self.models,
            n_programs,
            groupby,
            adata,
            indices,
            max_cells=max_cells,
            seed=seed,
            batch_size=batch_size,
            representative=self.representative(),
        )

    def export_to_anndata(self, adata: AnnData, key_added: str | None = None, *, overwrite: bool = False) -> None:
        """Write the consensus to an AnnData.

        Parameters
        ----------
        adata
            AnnData to write to; genes that are not in the models get NaN.
        key_added
            Replaces ``ldvae_consensus`` in all keys together.
        overwrite
            True to replace entries under these keys that are not a consensus.

        Raises
        ------
        ValueError
            If ``adata`` has none of the genes, or something else would be replaced. Nothing is written.

        Notes
        -----
        Writes

        * ``varm["ldvae_consensus"]``: consensus loadings, genes x factors, float32;
        * ``varm["ldvae_consensus_spread"]``: their standard deviation over runs, float32;
        * ``uns["ldvae_consensus"]``: ``names``, ``statistics`` (``reproducibility``, ``lowest``, ``kl``), ``flag``, ``cosine`` (runs x
          factors), ``agreement`` (runs x runs), ``seeds``, ``cells_of_run``, ``resample`` (``"none"``, ``"halves"`` or
          ``"bootstrap"``), ``thresholds``, ``n_failed``.

        :func:`ldvae_ext.get.stability` and :func:`ldvae_ext.pl.stability` read them.
        """
        keys = consensus_keys(CONSENSUS_KEY if key_added is None else key_added)
        info = adata.uns.get(keys.info)
        is_consensus = isinstance(info, Mapping) and "cosine" in info
        taken = [name for name in (keys.loadings, keys.spread) if name in adata.varm]
        taken += [keys.info] if info is not None else []
        if taken and not is_consensus and not overwrite:
            msg = f"{listed(taken)} of `adata` would be replaced and is no consensus; choose another `key_added`, or `overwrite=True`."
            raise ValueError(msg)
        position = pd.Index(adata.var_names.astype(str)).get_indexer(self.genes)
        if not (position >= 0).any():
            msg = f"`adata` has none of the {len(self.genes)} genes of the models, such as {listed(self.genes[:3])}."
            raise ValueError(msg)
        for key, value_gk in ((keys.loadings, self.consensus.loading_gk), (keys.spread, self.consensus.spread_gk)):
            adata.varm[key] = at_positions(value_gk, position, adata.n_vars)
        stats = self.stats
        adata.uns[keys.info] = {
            "names": np.array(self.names),
            "statistics": {name: stats[name].to_numpy() for name in ("reproducibility", "lowest", "kl")},
            "flag": stats["flag"].to_numpy().astype(np.str_),
            "cosine": self.consensus.cosine_mk,
            "agreement": self.agreement.to_numpy(),
            "seeds": np.array(self.seeds),
            "cells_of_run": np.array(self.cells_of_run),
            "resample": self.resample or "none",
            "thresholds": np.array([UNSTABLE, STABLE]),
            "n_failed": len(self.failures),
        }


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
        between them, and each run is compared with the consensus of the runs on the other half. ``"bootstrap"``: cells drawn with
        replacement for each run, in the number of all cells.
    max_epochs
        As in :meth:`LDVAE.train`.
    seed
        Seed of the first run; the others count on from it. Cells are drawn by it, too. ``scvi.settings.seed`` if None, or 0.
    model_kwargs, train_kwargs
        Arguments of :class:`LDVAE` and of :meth:`LDVAE.train`, whose ``kl_warmup`` is ``"auto"`` here unless given. A
        ``train_size`` cuts off the same cells in all runs (0.9 if not given; with ``resample`` all drawn cells are trained on).
    silent
        True to hide the progress bar, which counts runs.

    Returns
    -------
    An :class:`Ensemble`. A run that fails is left out, with a warning.

    Raises
    ------
    ValueError
        If an option is unknown or decided by the ensemble, or the latent is logistic-normal, which has no other axes.
    RuntimeError
        If fewer than two runs, or none on one of the halves, succeeded.
    """
    if not isinstance(adata, AnnData):
        msg = f"`adata` must be an AnnData that `LDVAE.setup_anndata` registered; got {type(adata).__name__}."
        raise TypeError(msg)
    check_positive_int("n_runs", n_runs)
    check_positive_int("n_latent", n_latent)
    if n_runs < 2:
        msg = f"`n_runs` must be at least 2, since runs are compared; got {n_runs}."
        raise ValueError(msg)
    if resample is not None:
        check_one_of("resample", resample, RESAMPLES)
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
    train_size = train_kwargs.pop("train_size", None)
    train_size = _TRAIN_SIZE if train_size is None else train_size
    if not 0 < train_size <= 1:
        msg = f"`train_size` must be above 0 and at most 1; got {train_size!r}."
        raise ValueError(msg)
    seed = (0 if scvi.settings.seed is None else scvi.settings.seed) if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        msg = f"`seed` must be an integer of at least 0; got {seed!r}."
        raise ValueError(msg)
    options = {"kl_warmup": "auto", "enable_progress_bar": False, **train_kwargs}
    models: list[LDVAE] = []
    seeds, kinds, failures = [], [], {}
    for m in track(range(n_runs), description="Training runs", disable=silent):
        cells, kind = cells_of_run(adata.n_obs, m, resample, train_size, seed)
        with seeded(seed + m):
            # Raised at once: an option that the model does not have fails in all runs.
            model = LDVAE(adata, n_latent=n_latent, **model_kwargs)
            try:
                train_on(model, cells, max_epochs, options)
                model.rotate()
            except TypeError:
                # An argument that training does not have would fail all runs alike.
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the other runs are worth having
                failures[seed + m] = f"{type(error).__name__}: {error}"
                warn(f"The run with seed {seed + m} failed and is left out ({failures[seed + m]}).")
                continue
        models.append(model)
        seeds.append(seed + m)
        kinds.append(kind)
    if len(set(kinds)) < 2:
        msg = (
            f"{len(models)} of {n_runs} runs succeeded, which cannot be compared. Errors: {listed(failures.values())}."
        )
        raise RuntimeError(msg)
    return _ensemble(models, seeds, kinds, resample, failures)


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
    )
