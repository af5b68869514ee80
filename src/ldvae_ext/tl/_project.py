"""Factors of a reference in other cells: posteriors from the exported decoder, without the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

import ldvae_ext
from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_column, check_number, check_positive_int, listed, warn
from ldvae_ext._writing import Export, check_can_write, write_export
from ldvae_ext.core import LinearDecoder, kl_per_dimension
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.misfit import deviance_ratio
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.projection import posterior_of
from ldvae_ext.core.refitting import refit
from ldvae_ext.core.scores import SlopeSums
from ldvae_ext.get._export import export_of
from ldvae_ext.tl._cells import CellReader, ExportedCells
from ldvae_ext.tl._reference import FIT, Reference, reference_of, shared_genes, with_batches

CHUNK_SIZE = 1024
# Cells to which offsets are fitted, and of the reference whose fit is computed, at most.
N_CELLS_TO_FIT, N_REFERENCE_CELLS = 4000, 1000
# Share of the prior variance that is left of a factor about which the counts say next to nothing.
_UNSEEN = 0.9
# Mean difference between the decoder's factors and the exported ones, in prior standard deviations, and share of cells that fit badly,
# from which on there is a warning.
_SHIFT, _MISFIT = 0.5, 0.5


def project(
    adata: AnnData,
    reference: AnnData | LinearDecoder | str | Path,
    *,
    batch: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    size_factor_key: str | None = None,
    min_share: float = 0.5,
    offset_sd: float | None = None,
    seed: int = 0,
    key: str = DEFAULT_KEY,
    key_added: str | None = None,
    overwrite: bool = False,
    chunk_size: int = CHUNK_SIZE,
    copy: bool = False,
) -> AnnData | None:
    """Score cells with the factors of a reference: their posteriors given its decoder, without the network.

    The posterior of each cell is that of :func:`ldvae_ext.core.posterior_of`, from the genes that both have. Under softmax,
    expression is relative to these genes, so that no zeros are invented for the others. The result has the reference's
    order, signs and names of factors, and everything in :mod:`ldvae_ext.tl`, :mod:`ldvae_ext.get` and :mod:`ldvae_ext.pl` that reads
    an export works on it. Torch is not needed.

    Parameters
    ----------
    adata
        Cells with raw counts. Genes are matched by ``var_names``.
    reference
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to, a decoder, or the path of one that
        :meth:`ldvae_ext.core.LinearDecoder.save` wrote. The factors of a decoder are independent under the prior: of oblique
        factors (``rotate("promax")``) give the AnnData, which holds their correlations.
    batch
        Intercepts that the cells have, if the reference has several batches:

        * the name of one of its batches;
        * ``"mean"``: the mean over its batches;
        * ``"fit"``: one of their own for each gene, fitted to up to 4,000 of the cells, in turn with their factors, from the mean over the
          reference's batches on. It removes what distinguishes these cells as a whole from the reference, be it technical or not;
        * None: each cell has that of its batch, which must be one of the reference's.
    batch_key
        Column of ``obs`` with the batches: by default the one that the model was set up with. With ``"fit"``, each of them has
        intercepts of its own; they are one batch by default.
    layer
        Layer with the counts; if None, that which the model was set up with if there is one of that name, else ``X``.
    size_factor_key
        Column of ``obs`` with size factors, for models with size factors. Otherwise, the library size of a cell is the sum of its counts
        of the shared genes.
    min_share
        Least share of the reference's genes that must be in ``adata``.
    offset_sd
        Prior standard deviation of the differences from the reference under ``batch="fit"``, in log-rate; 1 if None. It matters
        for genes with few counts.
    seed
        Seed of the counts that ``obs["ldvae_fit"]`` is relative to, and of the cells to which offsets are fitted and of the reference
        that are projected.
    key
        ``key_added`` of the reference's export.
    key_added
        Replaces ``ldvae`` in all keys that are written; ``key`` if None.
    overwrite
        True to replace columns of ``var`` and ``obs`` with a name of the export.
    chunk_size
        Cells held in memory at a time. The result does not depend on it.
    copy
        True to return a copy of ``adata`` with the result and leave ``adata`` unchanged.

    Returns
    -------
    None, or the copy.

    Raises
    ------
    KeyError
        If there is no such export, layer or column.
    ValueError
        If too few genes are shared, fewer than factors, a batch is unknown, or counts are negative or not finite. Nothing is
        written. (Of values that are not integers, and of library sizes that are all equal, there is a warning.)

    Notes
    -----
    Writes what :meth:`ldvae_ext.model.LDVAE.export_to_anndata` writes, for these cells:

    * ``obsm["X_ldvae"]``, ``obsm["X_ldvae_var"]``: posterior modes and marginal variances. For cells without counts they are
      those of the prior, near 0 and 1. ``obsm["X_ldvae_u"]`` under ``"ln"``. Under a rotation ``obsm["X_ldvae_network_var"]``, variances of the
      network's latents; draws from the posterior (``use_posterior="samples"``) take these as independent;
    * ``obs["ldvae_library"]``; ``obs["ldvae_fit"]``: deviance of the cell's counts, relative to that of counts drawn from the decoder
      (:func:`ldvae_ext.core.misfit.deviance_ratio`). Cells that the factors do not describe have larger values than those of the
      reference, NaN without counts;
    * ``obs["ldvae_converged"]``: False for cells whose mode was not found to the last digits;
    * ``varm["ldvae_loadings"]`` and, if the reference has them, ``varm["ldvae_loadings_error"]``; ``varm["ldvae_scores"]`` and
      ``varm["ldvae_scores_error"]`` of these cells; ``var["ldvae"]``: True for the shared genes;
    * ``uns["ldvae"]``: as there, with the decoder of the shared genes, and ``projection``: ``n_genes``, ``n_reference_genes``,
      ``batch``, ``unseen`` (names of factors about which the counts say next to nothing, if there are any), and, if the reference has counts and
      nothing is fitted, of up to 1,000 of its cells projected in the same way, ``fit_range``: 5, 50 and 95 % quantiles of ``ldvae_fit``, and
      ``shift``: mean difference of each factor from the export.

    An export under the same key is replaced. The order of the factors is the reference's, whatever their KL is in these cells.

    Examples
    --------
    >>> cells = adata[:100].copy()
    >>> ldvae_ext.tl.project(cells, decoder, overwrite=True)
    >>> cells.obsm["X_ldvae"].shape
    (100, 5)
    """
    check_number("min_share", min_share, least=0, most=1)
    known = reference_of(reference, key)
    # A batch of the reference may be called "fit"; its name comes first.
    is_fitted = batch == FIT and FIT not in known.decoder.batches
    if offset_sd is not None:
        check_number("offset_sd", offset_sd, least=1e-6)
        if not is_fitted:
            msg = "`offset_sd` is for `batch='fit'`."
            raise ValueError(msg)
    if not adata.n_obs:
        msg = "`adata` has no cells."
        raise ValueError(msg)
    if copy and adata.isbacked:
        msg = "`copy=True` needs cells in memory; `adata.to_memory()` reads them."
        raise ValueError(msg)
    check_positive_int("seed", seed, least=0)
    check_positive_int("chunk_size", chunk_size)
    keys = check_can_write(adata, key if key_added is None else key_added, overwrite=overwrite)
    layer = known.setup.get("layer") if layer is None and known.setup.get("layer") in adata.layers else layer
    panel = known.decoder.with_genes(shared_genes(known.decoder, adata, min_share))
    source = panel
    panel, setup = with_batches(panel, adata, batch, batch_key, known.setup)
    setup |= {} if layer is None else {"layer": layer}
    cells = CellReader(adata, panel, setup)
    library_n = _libraries(adata, cells, panel, size_factor_key, layer, chunk_size)
    if is_fitted:
        panel = _fitted(panel, cells, library_n, known, 1.0 if offset_sd is None else offset_sd, layer, seed)
        cells = CellReader(adata, panel, setup)
    found = _posteriors(panel, cells, library_n, known, layer, chunk_size, np.arange(adata.n_obs), seed)
    unseen = _unseen(known, found.variance_nk)
    projection: dict[str, Any] = {
        "n_genes": len(panel.genes),
        "n_reference_genes": len(known.decoder.genes),
        "batch": "own" if batch is None else batch,
        # Empty arrays are not allowed in files for CELLxGENE.
        **({"unseen": strings(unseen)} if unseen else {}),
    }
    # With offsets of its own the query has another decoder than the reference's cells.
    checked = None if is_fitted else _checked_on_reference(known, source, seed)
    if checked is not None:
        projection["fit_range"], projection["shift"] = checked.fit_range, checked.shift_k
        _warn_of_misfit(known, checked, found.fit_n)
    if unseen:
        warn(
            f"The counts of these {len(panel.genes)} genes say next to nothing about {listed(unseen)}: more than "
            f"{_UNSEEN:.0%} of the prior variance is left."
        )
    target = adata.copy() if copy else adata
    kl_k = kl_per_dimension(found.mean_nk, found.variance_nk).mean(axis=0)
    description = {
        "setup": setup,
        "kl_weight": np.nan,
        "versions": {"ldvae_ext": ldvae_ext.__version__},
        "projection": projection,
        **({} if known.rotation is None else {"rotation": known.rotation}),
    }
    export = Export(
        decoder=panel,
        mean_nk=found.mean_nk,
        variance_nk=found.variance_nk,
        library_n=library_n,
        statistics={
            "kl": kl_k,
            "kl_share": kl_k / (kl_k.sum() or 1.0),
            "active_unit": found.mean_nk.var(axis=0, dtype=np.float64),
        },
        order=known.order,
        signs=known.signs,
        names=known.names,
        order_by="reference",
        network_variance_nk=None if known.rotation is None else found.network_variance_nk,
        scores=found.slopes.scores(),
        error_gk=known.errors(panel.genes),
        fit_n=found.fit_n,
        converged_n=found.converged_n,
        description=description,
    )
    write_export(target, keys, export)
    return target if copy else None


def _libraries(
    adata: AnnData, cells: CellReader, panel: LinearDecoder, key: str | None, layer: str | None, chunk_size: int
) -> np.ndarray:
    """Size factors, or sums of the counts of the shared genes; 1 for cells without any."""
    if panel.link == "softplus":
        if key is None:
            msg = "The reference has size factors: name the column of `obs` with those of the cells, `size_factor_key`."
            raise ValueError(msg)
        check_column(adata.obs.columns, "size_factor_key", key)
        factor_n = pd.to_numeric(pd.Series(adata.obs[key]), errors="coerce").to_numpy(dtype=np.float64)
        if not (np.isfinite(factor_n) & (factor_n > 0)).all():
            msg = f"`size_factor_key`: `adata.obs[{key!r}]` must be positive and finite."
            raise ValueError(msg)
        return factor_n
    if key is not None:
        msg = "`size_factor_key` is for models with size factors; this reference has none."
        raise ValueError(msg)
    total_n = np.empty(adata.n_obs)
    for x_ng, at in cells.count_chunks(np.arange(adata.n_obs), chunk_size, layer):
        total_n[at] = np.asarray(x_ng.sum(axis=1, dtype=np.float64)).ravel()
    if len(total_n) > 2 and np.ptp(total_n) <= 1e-3 * total_n.max() and total_n.max() > 0:
        warn(
            f"All cells have the same sum of counts, {total_n.max():g}: the counts look normalised, and posteriors need raw ones. `layer` "
            "names a layer with raw counts."
        )
    return np.where(total_n > 0, total_n, 1.0)


def _fitted(
    panel: LinearDecoder,
    cells: CellReader,
    library_n: np.ndarray,
    known: Reference,
    offset_sd: float,
    layer: str | None,
    seed: int,
) -> LinearDecoder:
    """The decoder with intercepts that are fitted to some of the cells."""
    # The same number of cells of each batch, or all of a small one.
    order, of_batch = np.random.default_rng(seed).permutation(len(library_n)), -(-N_CELLS_TO_FIT // len(panel.batches))
    chosen = [order[cells.batch_n[order] == b][:of_batch] for b in range(len(panel.batches))]
    some = np.sort(np.concatenate(chosen))
    ((x_ng, at),) = cells.count_chunks(some, len(some), layer)
    return refit(
        panel,
        x_ng,
        panel.batches[cells.batch_n[at]],
        None if cells.covariates is None else cells.covariates.iloc[at],
        library_n[at],
        None if panel.labels is None else panel.labels[cells.label_n[at]],
        prior_covariance_kk=known.prior_covariance_kk,
        offset_sd=offset_sd,
    )


@dataclass(eq=False)
class _Found:
    """Posteriors of cells on the axes of the decoder."""

    mean_nk: np.ndarray
    variance_nk: np.ndarray
    network_variance_nk: np.ndarray
    fit_n: np.ndarray
    converged_n: np.ndarray
    slopes: SlopeSums


def _posteriors(
    panel: LinearDecoder,
    cells: CellReader,
    library_n: np.ndarray,
    known: Reference,
    layer: str | None,
    chunk_size: int,
    positions: np.ndarray,
    seed: int,
) -> _Found:
    shape = (len(positions), len(panel.factors))
    back_kk = np.linalg.inv(known.axes_kk)
    out = _Found(
        np.empty(shape),
        np.empty(shape),
        np.empty(shape),
        np.empty(shape[0]),
        np.empty(shape[0], dtype=bool),
        SlopeSums(len(panel.genes), shape[1]),
    )
    prior_kk, start = known.prior_covariance_kk, 0
    for x_ng, at in cells.count_chunks(positions, chunk_size, layer):
        covariates = None if cells.covariates is None else cells.covariates.iloc[at]
        found = posterior_of(
            panel,
            x_ng,
            panel.batches[cells.batch_n[at]],
            covariates,
            library_n[at],
            None if panel.labels is None else panel.labels[cells.label_n[at]],
            prior_covariance_kk=prior_kk,
        )
        encoded = EncodedCells(
            mean=found.mean_nk,
            variance=found.variance_nk,
            library=library_n[at],
            batch=cells.batch_n[at],
            label=cells.label_n[at],
            covariates=covariates,
            counts=x_ng,
        )
        rows = slice(start, start + len(at))
        out.mean_nk[rows], out.variance_nk[rows] = found.mean_nk, found.variance_nk
        out.network_variance_nk[rows] = np.einsum("ki,nkl,li->ni", back_kk, np.asarray(found.covariance_nkk), back_kk)
        out.converged_n[rows] = found.converged_n
        out.fit_n[rows] = deviance_ratio(panel, encoded, at, seed)
        out.slopes.add(x_ng, deterministic_latent(found.mean_nk, panel.latent_distribution))
        start += len(at)
    return out


def _unseen(known: Reference, variance_nk: np.ndarray) -> list[str]:
    """Factors with nearly the prior variance, in the exported order; not those of which this holds in the reference, too."""
    left_k = variance_nk.mean(axis=0)[known.order]
    is_unseen = left_k > _UNSEEN
    if known.adata is not None:
        keys, _ = export_of(known.adata, known.key)
        is_unseen &= np.asarray(known.adata.obsm[keys.variance], dtype=np.float64).mean(axis=0) <= _UNSEEN
    return known.names[is_unseen].tolist()


class _Checked(NamedTuple):
    """The reference's own cells, projected."""

    fit_range: np.ndarray
    """5, 50 and 95 % quantiles of their fit."""
    shift_k: np.ndarray
    """Mean difference of each factor from the export, in the exported order."""


def _checked_on_reference(known: Reference, panel: LinearDecoder, seed: int) -> _Checked | None:
    """Fit and shift of some cells of the reference; None if it lacks counts or columns of ``obs``."""
    if known.adata is None:
        return None
    layer, n_all = known.setup.get("layer"), known.adata.n_obs
    some = np.sort(np.random.default_rng(seed).permutation(n_all)[:N_REFERENCE_CELLS])
    try:
        own = ExportedCells(known.adata, known.key)
        chunks = list(own.count_chunks(some, CHUNK_SIZE, layer))
    except (KeyError, TypeError, ValueError):
        return None
    cells, library_n = CellReader(known.adata, panel, known.setup), own.library_n
    if panel.link == "softmax":
        inside = np.isin(own.decoder.genes, panel.genes)
        library_n = np.ones(n_all)
        for x_ng, at in chunks:
            library_n[at] = np.maximum(np.asarray(x_ng[:, inside].sum(axis=1, dtype=np.float64)).ravel(), 1.0)
    found = _posteriors(panel, cells, library_n, known, layer, CHUNK_SIZE, some, seed)
    fit_n = found.fit_n[np.isfinite(found.fit_n)]
    if not len(fit_n):
        return None
    shift_k = (found.mean_nk - own.mean(some)).mean(axis=0)
    return _Checked(np.quantile(fit_n, [0.05, 0.5, 0.95]), shift_k[known.order] * known.signs)


def _warn_of_misfit(known: Reference, checked: _Checked, fit_n: np.ndarray) -> None:
    """Warn if the reference's decoder and encoder disagree, or if most cells are not described."""
    is_shifted = np.abs(checked.shift_k) > _SHIFT
    if is_shifted.any():
        largest = np.abs(checked.shift_k).max()
        warn(
            "From these genes, the decoder of the reference does not give its own cells the factors of the export: "
            f"{listed(known.names[is_shifted])} are "
            f"shifted by up to {largest:.1f} prior standard deviations. A model that was trained for longer, and with "
            "`use_observed_lib_size=True`, agrees better."
        )
    share = np.mean(fit_n[np.isfinite(fit_n)] > checked.fit_range[2])
    if share > _MISFIT:
        warn(
            f"{share:.0%} of the cells fit worse than 95 % of the reference's: genes may be named wrongly, counts may be "
            "normalised, or the factors do not describe these cells."
        )
