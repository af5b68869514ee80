"""The ensemble of several trainings: its consensus, what replicates, and the export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import CONSENSUS as CONSENSUS_FORMAT
from ldvae_ext._keys import CONSENSUS_KEY, consensus_keys
from ldvae_ext._stats import STABILITY, replicates
from ldvae_ext._validate import check_positive_int, listed
from ldvae_ext.core._arrays import at_positions
from ldvae_ext.core.matching import STABLE, UNSTABLE, Consensus, flags, procrustes
from ldvae_ext.core.rotation import CONSENSUS, Rotation
from ldvae_ext.model._counts import check_given_anndata
from ldvae_ext.model._ensemble_files import load_ensemble, save_ensemble
from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model.programs import Programs, additive_programs
from ldvae_ext.model.replication import N_TOP, agreement, readouts, sets_of

CELLS = {None: "same", "halves": "disjoint halves", "bootstrap": "bootstrap"}


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Models of the same data, and their consensus; from :func:`fit_ensemble`.

    Examples
    --------
    >>> models
    Ensemble of 2 runs (...); 5 consensus factors: ...
    >>> models.loadings.shape
    (765, 5)
    """

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
    replication: pd.DataFrame | None = None
    """With ``resample="halves"``, one row for each consensus factor: agreement of the two halves' own consensus factors in
    ``scores`` (cosine of gene scores), ``top_genes`` (share of the 50 genes with the largest scores that both have) and
    ``usages`` (correlation over all cells). None for other ensembles."""

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
        ``"same"`` (only seeds differ), ``"disjoint halves"`` or ``"bootstrap"``. With ``resample="halves"`` also ``scores``,
        ``top_genes`` and ``usages`` (:attr:`replication`), and ``replicates``: True if ``scores`` are at least 0.8 and ``usages`` at
        least 0.9. The flag is about loadings, of which rare genes decide; ``replicates`` is about the genes and cells that a factor is
        read by.

        Examples
        --------
        >>> models.stats[["reproducibility", "flag", "replicates"]].shape
        (5, 3)
        """
        reproducibility_k = self.consensus.reproducibility_k
        table = pd.DataFrame(
            {
                "reproducibility": reproducibility_k,
                "lowest": self.consensus.cosine_mk.min(axis=0),
                "flag": flags(reproducibility_k),
                "kl": self.kl_k,
                "cells": CELLS[self.resample],
            },
            index=pd.Index(self.names, name="factor"),
        )
        if self.replication is not None:
            table = table.join(self.replication).assign(replicates=replicates(self.replication))
        return table

    @property
    def n_replicated(self) -> int:
        """Number of factors that replicate between the halves of the cells, see :attr:`stats`.

        Raises
        ------
        ValueError
            If the ensemble was not fitted with ``resample="halves"``.
        """
        return int(replicates(self._replication()).sum())

    def _replication(self) -> pd.DataFrame:
        if self.replication is None:
            msg = "Replication between cells needs `fit_ensemble(resample='halves')`."
            raise ValueError(msg)
        return self.replication

    def compare_readouts(self, n_programs: int | None = None, n_top: int = N_TOP) -> pd.DataFrame:
        """Agreement of the two halves of the cells in factors and programs, read in different ways.

        Parameters
        ----------
        n_programs
            Number of additive programs; the number of latents if None.
        n_top
            Number of genes in the comparison of top genes.

        Returns
        -------
        Rows ``"factors, loadings"`` (consensus of varimax), ``"factors"`` (the same with gene scores), ``"promax"`` (its oblique
        factors, with gene scores) and ``"programs"``; columns ``scores`` (median absolute cosine of matched factors), ``top_genes`` (mean
        share of common top genes) and ``usages`` (median absolute correlation over all cells).

        Raises
        ------
        ValueError
            If the ensemble was not fitted with ``resample="halves"``, or a half has less than two cells for each program.

        Examples
        --------
        >>> models.compare_readouts().index.tolist()
        ['factors, loadings', 'factors', 'promax', 'programs']
        """
        self._replication()
        check_positive_int("n_top", n_top)
        n_programs = len(self.names) if n_programs is None else n_programs
        check_positive_int("n_programs", n_programs, least=2)
        first, second = (readouts(*side, n_programs) for side in sets_of(self.models, self.cells_of_run))
        rows = {}
        for name, readout in first.items():
            found = agreement(readout, second[name], n_top)
            rows[name] = {
                "scores": found["scores"].median(),
                "top_genes": found["top_genes"].mean(),
                "usages": found["usages"].median(),
            }
        return pd.DataFrame(rows).T.rename_axis("readout")

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
        replicated = "" if self.replication is None else f"; {self.n_replicated} replicate between the halves"
        return (
            f"Ensemble of {len(self.models)} runs{failed} ({meaning}); {len(self.names)} consensus factors: "
            f"{counts}{replicated}"
        )

    def save(self, dir_path: str | Path, *, overwrite: bool = False) -> None:
        """Save the ensemble with its runs, without the cells, in files that hold no code.

        Parameters
        ----------
        dir_path
            Folder, new or empty. An error or the end of the process leaves an ensemble that was there as it was.
        overwrite
            True to replace an ensemble in it.

        Raises
        ------
        ValueError
            If the folder has other files, or an ensemble that is not to be replaced.

        Examples
        --------
        >>> models.save("ensemble")
        >>> ldvae_ext.model.Ensemble.load("ensemble", adata).names
        ['C_0', 'C_1', 'C_2', 'C_3', 'C_4']
        """
        runs = dict(zip(self.seeds, self.models, strict=True))
        save_ensemble(Path(dir_path), runs, self._results(), overwrite=overwrite)

    @classmethod
    def load(cls, dir_path: str | Path, adata: AnnData | None = None) -> Ensemble:
        """Open an ensemble that :meth:`save` or ``fit_ensemble(folder=...)`` wrote. No pickle is read.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Cells of the runs, which are set up as at the fit. If None, the runs have no cells; the consensus needs none.

        Raises
        ------
        ValueError
            If the folder has no complete ensemble, or one of a newer version, or ``adata`` has other genes.

        Examples
        --------
        >>> models.save("ensemble")
        >>> ldvae_ext.model.Ensemble.load("ensemble").stats.equals(models.stats)
        True
        """
        runs, results = load_ensemble(Path(dir_path), adata)
        try:
            results["consensus"] = Consensus(*(results["consensus"][name] for name in Consensus._fields))
            seeds = results["seeds"]
            results["agreement"] = pd.DataFrame(results["agreement"], index=seeds, columns=seeds)
            return cls(runs, **results)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{dir_path} holds no ensemble that can be read: {error}."
            raise ValueError(msg) from error

    def _results(self) -> dict[str, Any]:
        """All but the runs, as plain values."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "models"}
        return own | {"consensus": self.consensus._asdict(), "agreement": self.agreement.to_numpy()}

    def representative(self) -> LDVAE:
        """The run that is nearest to the consensus, rotated so that its factors ``F_k`` are as near to ``C_k`` as they can be.

        The rotation (orthogonal Procrustes, Schonemann 1966, 10.1007/BF02289451) is a view as any other (:meth:`LDVAE.rotate`),
        called ``"consensus"``, with the order and signs of the consensus. Use the model to encode cells, to export and to
        ablate. It has a network of its own, so that the run in ``models`` does not change, and shares the data.

        Examples
        --------
        >>> model = models.representative()
        >>> model.rotation.method
        'consensus'
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

        Examples
        --------
        >>> models.programs(n_programs=5).names
        ['P_0', 'P_1', 'P_2', 'P_3', 'P_4']
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
        * ``uns["ldvae_consensus"]``: ``format`` (2), ``names``, ``statistics`` (``reproducibility``, ``lowest``, ``kl``, with ``resample="halves"`` the
          columns of :attr:`replication`), ``flag``, ``cosine`` (runs x
          factors), ``agreement`` (runs x runs), ``seeds``, ``cells_of_run``, ``resample`` (``"none"``, ``"halves"`` or
          ``"bootstrap"``), ``thresholds``, ``n_failed``.

        :func:`ldvae_ext.get.stability` and :func:`ldvae_ext.pl.stability` read them.

        Examples
        --------
        >>> models.export_to_anndata(adata)
        >>> ldvae_ext.get.stability(adata).index.tolist()
        ['C_0', 'C_1', 'C_2', 'C_3', 'C_4']
        """
        check_given_anndata(adata)
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
            "format": CONSENSUS_FORMAT,
            "names": np.array(self.names),
            "statistics": {name: stats[name].to_numpy() for name in STABILITY if name in stats},
            "flag": stats["flag"].to_numpy().astype(np.str_),
            "cosine": self.consensus.cosine_mk,
            "agreement": self.agreement.to_numpy(),
            "seeds": np.array(self.seeds),
            "cells_of_run": np.array(self.cells_of_run),
            "resample": self.resample or "none",
            "thresholds": np.array([UNSTABLE, STABLE]),
            "n_failed": len(self.failures),
        }
