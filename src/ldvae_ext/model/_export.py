"""Latents and loadings in order of information, written to AnnData."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import ldvae_ext
from ldvae_ext._groups import table_of
from ldvae_ext._row_store import HeldRows, RowStore, check_store, row_store
from ldvae_ext._scvi import ADATA_MINIFY_TYPE
from ldvae_ext._stats import MEASURES
from ldvae_ext._validate import check_one_of, warn
from ldvae_ext._writing import Export, check_can_write, write_export
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.posterior import InformationSums, deterministic_latent
from ldvae_ext.core.scores import GeneScores, SlopeSums
from ldvae_ext.model._axes import (
    ENCODER,
    REFINED,
    UsePosterior,
    canonical_signs,
    factor_decoder,
    factor_stream,
    network_stream,
)
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells, shared_counts_agree
from ldvae_ext.model._collection import as_anndata
from ldvae_ext.model._fingerprint import check_unchanged
from ldvae_ext.model._shrinkage import loading_errors
from ldvae_ext.model._stats import factor_stats

# "network": latents as they are, factors of a rotation as they are numbered.
ORDERS = ("network", *MEASURES)


class _ExportedCells(NamedTuple):
    """Posteriors of the cells to export."""

    mean: Any
    """Arrays of numpy, or of dask for a result on disk."""
    variance: Any
    library: Any
    network_variance: Any
    """Variances of the network's latents, if the factors are rotated."""
    statistics: dict[str, np.ndarray]
    """Mean KL, its share, and variance of the posterior means."""
    source: AnnData | None
    """Whose cells they are; None: the model's own."""
    rows: np.ndarray | None
    """Their positions there; None: all."""
    scores: GeneScores | None
    """Gene scores of the factors as they are numbered; None without counts."""


class ExportMixin(LDVAEBase):
    """The information of each latent, and the export that is ordered by it."""

    def get_latent_kl(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        batch_size: int | None = None,
        dataloader: Any = None,
        use_posterior: UsePosterior = "encoder",
    ) -> pd.DataFrame | np.ndarray:
        """KL divergence of each cell's posterior from the prior, per latent dimension.

        ``KL = (mean^2 + variance - 1 - log variance) / 2``. Its mean over cells is an upper bound of the information of a
        latent about the cells, and is 0 for a latent that is not used. Under ``latent_distribution="ln"`` it is the KL of u,
        with z = softmax(u).

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            Cells, as in :meth:`get_latent_representation`.
        use_posterior
            ``"encoder"``: posteriors are those of the network's encoder. ``"refined"``: modes and marginal variances of
            :meth:`get_refined_posterior`, from the decoder and the counts of each cell.

        Returns
        -------
        Cells x ``Z_i`` in the network's order, float64, in nats; an array if ``dataloader`` is given.

        Examples
        --------
        >>> kl = model.get_latent_kl()
        >>> kl.shape, bool((kl >= 0).all(axis=None))
        ((700, 5), True)
        """
        with network_stream(self, adata, indices, batch_size, dataloader, use_posterior=use_posterior) as cells:
            kl = [kl_per_dimension(chunk.mean, chunk.variance) for chunk in cells.chunks]
            kl_nk = np.concatenate(kl) if kl else np.empty((0, self.n_latent))
            return kl_nk if cells.obs is None else pd.DataFrame(kl_nk, index=cells.obs.index, columns=self.latent_names)

    def export_to_anndata(
        self,
        adata: AnnData | None = None,
        key_added: str | None = None,
        order_by: str | None = None,
        *,
        stats: bool = False,
        as_pca: bool = False,
        overwrite: bool = False,
        batch_size: int | None = None,
        use_posterior: UsePosterior = "encoder",
        store: str | Path | None = None,
    ) -> AnnData | None:
        """Write latents, loadings and decoder to an AnnData, in order of information.

        Factors are named after the network's dimension (``Z_3``), sorted by their mean KL over the exported cells, and
        with signs such that the longer tail of genes is positive (:meth:`ldvae_ext.core.LinearDecoder.signs`); loadings
        are centred over genes. Under a rotation (:meth:`rotate`) the factors ``F_0``, ``F_1``, ... are exported. Then ``softmax(X_ldvae @ ldvae_loadings.T + intercept)`` is the decoded expression,
        where the intercept is ``ldvae_ext.get.decoder(adata).intercept_bg`` of the cell's batch, for the genes of the model. (To
        decode the exported latents use that decoder; :meth:`decode` takes latents with the network's signs.) For the first five
        factors in scanpy: ``sc.pp.neighbors(adata, use_rep="X_ldvae", n_pcs=5)``.

        Parameters
        ----------
        adata
            AnnData to write to; the model's own if None. It has the model's cells by name, whose posteriors are then those of
            the model's data, or cells with counts that the model can encode. If both hold and the counts differ, the cells are
            encoded; without counts to compare, a warning follows. Genes that are not in the model get NaN loadings.
        key_added
            Replaces ``ldvae`` in all keys together.
        order_by
            ``"kl"``, or another measure of :meth:`get_factor_stats`, descending; ``"network"``: latents as they are, factors of a
            rotation as they are numbered. None: ``"kl"``, but ``"network"`` where factors have an order of their own, after
            ``rotate("deviance")`` and :meth:`order_factors`, and for :meth:`Ensemble.representative`.
        stats
            True to also store all measures of :meth:`get_factor_stats`, as is always done for an order by one of them.
        as_pca
            True to also write the result as a PCA, for scanpy's PCA plots.
        overwrite
            True to replace an existing PCA, or columns of ``var`` and ``obs`` with a name of the export.
        batch_size
            Cells per minibatch; ``scvi.settings.batch_size`` if None.
        use_posterior
            ``"encoder"``: posteriors are those of the network's encoder. ``"refined"``: modes and marginal variances of
            :meth:`get_refined_posterior`, from the decoder and the counts of each cell. Draws of rotated factors take the
            network's latents as independent, as an encoder's are.
        store
            Folder in which the export is written as zarr while it is computed, instead of to ``adata``, for any number of
            cells. It must not exist. It is an AnnData with the genes of the model, ``obs``, and no counts.

        Returns
        -------
        None; with ``store`` the AnnData that was written, whose ``obsm`` has arrays of dask that read the folder.

        Raises
        ------
        ValueError
            If the cells are not the model's and cannot be encoded, or if a PCA or a column of ``var`` or ``obs`` would be replaced.
            Nothing is written.

        Notes
        -----
        Writes

        * ``obsm["X_ldvae"]``: posterior means, cells x factors, float32 (softmax of the means of u under ``"ln"``);
        * ``obsm["X_ldvae_var"]``: posterior variances, same order, float32 (of u under ``"ln"``);
        * ``obsm["X_ldvae_network_var"]``: posterior variances of the network's latents, in the network's order, float32; only
          under a rotation, with which the covariance of a cell's factors, ``R'diag(v)R``, cannot be computed from the
          marginal variances above;
        * ``obsm["X_ldvae_u"]``: posterior means of u, same order, float32; only under ``"ln"``;
        * ``obs["ldvae_library"]``: library size of each cell in counts, or its size factor, float64;
        * ``varm["ldvae_loadings"]``: genes x factors, float32, in log-rate;
        * ``varm["ldvae_loadings_error"]``: their standard errors, from 2,000 of the cells, which are encoded
          once more (:meth:`get_shrunken_loadings`), float32;
          not under ``"ln"``;
        * ``varm["ldvae_scores"]``, ``varm["ldvae_scores_error"]``: slope of each gene's standardised log-normalised counts on the
          standardised latent, in [-1, 1], and its standard error, genes x factors, float32; not from data without counts;
        * ``var["ldvae"]``: True for genes of the model;
        * ``uns["ldvae"]``: ``format`` (2), ``names``, ``order`` and ``signs`` of the factors, ``statistics`` (``kl`` in nats, ``kl_share``,
          ``active_unit``: the variance of the posterior mean; with ``stats`` the other measures), ``order_by``, under a rotation
          ``rotation`` (``method``, ``matrix``: network's latents x factors as numbered, and ``latents``), ``decoder`` (arrays, in the network's order),
          ``likelihood``, ``latent_distribution``, ``posterior`` (``use_posterior``), ``setup`` (names of the layer and of the columns of obs that the model was
          set up with), ``kl_weight`` at the end of training (NaN if not known), ``n_cells``,
          ``versions``;
        * with ``as_pca``: ``obsm["X_pca"]``, ``varm["PCs"]`` (0 for other genes) and ``uns["pca"]``; its ``variance`` and
          ``variance_ratio`` are the KL and its share, as ``params`` notes.

        Examples
        --------
        >>> model.export_to_anndata(stats=True)
        >>> adata.obsm["X_ldvae"].shape, adata.varm["ldvae_loadings"].shape
        ((700, 5), (765, 5))
        >>> adata.uns["ldvae"]["order_by"]
        'kl'
        """
        if order_by is None:
            order_by = "network" if self._has_own_order else "kl"
        check_one_of("order_by", order_by, ORDERS)
        adata, target = as_anndata(adata), given_cells(self, adata)
        keys = check_can_write(target, key_added, overwrite=overwrite, as_pca=as_pca)
        if store is not None:
            # Columns of an earlier export are not of this one.
            obs = table_of(target.obs).drop(columns=[keys.library, keys.fit, keys.converged], errors="ignore")
            check_store(store, obs)
            target = AnnData(obs=obs, var=pd.DataFrame(index=np.asarray(self.get_var_names()).astype(str)))
        check_one_of("use_posterior", use_posterior, (ENCODER, REFINED))
        options: dict[str, Any] = {
            "order_by": order_by,
            "stats": stats,
            "batch_size": batch_size,
            "use_posterior": use_posterior,
        }
        if store is None:
            write_export(target, keys, _export(self, adata, HeldRows(), **options), as_pca=as_pca)
            return None
        with row_store(store) as on_disk:
            write_export(target, keys, _export(self, adata, on_disk, **options), as_pca=as_pca)
            return on_disk.write(target)


def _export(
    model: LDVAEBase,
    adata: AnnData | None,
    rows: HeldRows | RowStore,
    *,
    order_by: str,
    stats: bool,
    batch_size: int | None,
    use_posterior: str,
) -> Export:
    """What is exported of some cells, whose posteriors are kept in ``rows``."""
    cells = _cells_for_export(model, adata, batch_size, use_posterior, rows)
    statistics = dict(cells.statistics)
    if stats or order_by not in ("network", *statistics):
        # The cells of the model are read from its data, whatever else `adata` contains.
        table = factor_stats(
            model, None, cells.source, cells.rows, batch_size=batch_size, use_posterior=use_posterior
        ).table()
        statistics |= {name: table[name].to_numpy() for name in MEASURES if name not in statistics}
    if order_by != "network" and not np.isfinite(statistics[order_by]).all():
        msg = f"`order_by={order_by!r}` needs counts, which data minified without them do not have."
        raise ValueError(msg)
    decoder, error_gk = factor_decoder(model), None
    if decoder.latent_distribution != "ln":
        error_gk = loading_errors(
            model, decoder, cells.source, cells.rows, seed=0, batch_size=batch_size, use_posterior=use_posterior
        )
    order = np.arange(model.n_latent)
    if order_by != "network":
        order = np.argsort(-statistics[order_by], kind="stable")
    signs = canonical_signs(model, decoder)[order]
    description: dict[str, Any] = {
        "posterior": use_posterior,
        "setup": _setup_keys(model),
        "kl_weight": model.final_kl_weight,
        "versions": {"ldvae_ext": ldvae_ext.__version__, "scvi-tools": scvi.__version__},
    }
    if model.rotation is not None:
        description["rotation"] = {
            "method": model.rotation.method,
            "matrix": model.rotation.matrix_kk,
            "latents": np.array(model.latent_names),
        }
    return Export(
        decoder=decoder,
        mean_nk=cells.mean,
        variance_nk=cells.variance,
        library_n=cells.library,
        statistics=statistics,
        order=order,
        signs=signs,
        names=decoder.factors[order],
        order_by=order_by,
        network_variance_nk=cells.network_variance,
        scores=cells.scores,
        error_gk=error_gk,
        description=description,
    )


def _setup_keys(model: LDVAEBase) -> dict[str, str]:
    """Columns of an AnnData with batch, labels, covariates and size factors; only registered ones."""
    given = model.registry.get("setup_args", {})
    return {name: given[name] for name in ("layer", "batch_key", "labels_key") if given.get(name) is not None}


def _cells_for_export(
    model: LDVAEBase, adata: AnnData | None, batch_size: int | None, use_posterior: str, kept: HeldRows | RowStore
) -> _ExportedCells:
    """Cells of ``adata`` on the axes in force, encoded or, for the model's cells, found by name."""
    rows = None if adata is None or adata is model.adata else _own_rows(model, adata)
    source = adata if rows is None else None
    has_counts = model.minified_data_type != ADATA_MINIFY_TYPE.LATENT_POSTERIOR
    slopes, summary = SlopeSums(len(model.get_var_names()), model.n_latent), InformationSums(model.n_latent)
    with factor_stream(model, source, rows, batch_size, use_posterior=use_posterior) as cells:
        for chunk in cells.chunks:
            kept.add("mean", chunk.mean)
            kept.add("variance", chunk.variance)
            kept.add("library", chunk.library.ravel())
            if chunk.axes is not None:
                kept.add("network_variance", chunk.axes.variance_nk)
            summary.add(chunk.mean, chunk.variance)
            if has_counts:
                slopes.add(chunk.counts, deterministic_latent(chunk.mean, model.module.latent_distribution))
    if not summary.n_cells:
        msg = "There are no cells to export."
        raise ValueError(msg)
    return _ExportedCells(
        kept.array("mean"),
        kept.array("variance"),
        kept.array("library"),
        kept.array("network_variance") if "network_variance" in kept else None,
        summary.statistics(),
        source,
        rows,
        slopes.scores() if has_counts else None,
    )


def _own_rows(model: LDVAEBase, adata: AnnData) -> np.ndarray | None:
    """Rows of the model's data with the cells of ``adata``, or None if its counts are to be encoded."""
    if model.adata is None or not model.adata.obs_names.is_unique:
        return None
    rows = model.adata.obs_names.get_indexer(adata.obs_names)
    if (rows < 0).any():
        return None
    try:
        check_unchanged(model.adata_manager)
    except ValueError:
        return None  # cells with counts are encoded; those without raise an error of their own
    layer = model.get_setup_arg("layer")
    has_matrix = adata.X is not None if layer is None else layer in adata.layers
    if model.minified_data_type is not None or not has_matrix:
        confirmed = None
    else:
        confirmed = shared_counts_agree(model, adata, rows)
    # Other counts under the same names belong to other cells. Values that are not counts, such as normalised expression,
    # do not decide it.
    if confirmed is None:
        warn(
            f"The {adata.n_obs} cells of `adata` were identified with those of the model by their names only, since it has no "
            "counts to compare."
        )
    return None if confirmed is False else rows
