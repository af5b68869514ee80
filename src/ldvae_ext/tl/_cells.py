"""Cells of an export, in the order and signs of the network or of its rotated factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._groups import table_of
from ldvae_ext._keys import MINIFIED_INFO, MINIFIED_WITHOUT_COUNTS
from ldvae_ext._progress import shown_if_slow
from ldvae_ext._validate import given_names, listed, warn
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.cells import EncodedCells, PosteriorAxes, check_sparse, has_fractions, values_of
from ldvae_ext.core.levels import match_levels
from ldvae_ext.core.rows import row_chunks
from ldvae_ext.get._export import export_of, latents_of, parts_of

# A count beyond this is none, and sums over genes would lose the others.
_MOST = 1e12


class CellReader:
    """Counts and conditions of cells, as a decoder needs them.

    Parameters
    ----------
    adata
        The cells.
    decoder
        The decoder, whose genes they have.
    setup
        Columns of ``obs`` with batches and labels, and the layer with the counts; only those that there are.
    """

    def __init__(self, adata: AnnData, decoder: LinearDecoder, setup: dict[str, str]) -> None:
        self.decoder, self._adata, self._setup = decoder, adata, setup
        self._obs = table_of(adata.obs)
        self._has_warned = False
        self.batch_n = self._codes("batch_key", decoder.batches)
        labels = decoder.labels
        self.label_n = np.zeros(adata.n_obs, dtype=np.int64) if labels is None else self._codes("labels_key", labels)
        self.covariates = self._covariates()

    def _codes(self, setup: str, names: np.ndarray) -> np.ndarray:
        if len(names) == 1:
            return np.zeros(self._adata.n_obs, dtype=np.int64)
        column = self._setup.get(setup)
        if column is None:
            msg = f"The decoder has several levels of `{setup}`, but the export does not name the column of obs with them."
            raise KeyError(msg)
        return self._level_codes(names, column)

    def _level_codes(self, names: np.ndarray, column: str) -> np.ndarray:
        """Code of the level of each cell. Levels are matched once for each value, not for each cell."""
        code_n, unique = pd.factorize(self._column(column), use_na_sentinel=False)
        values = list(unique)
        code_of = match_levels(column, values, names.tolist())
        if (code_of < 0).any():
            unknown = [value for value, code in zip(values, code_of, strict=True) if code < 0]
            msg = f"`adata.obs[{column!r}]` has {listed(unknown)}, which the decoder does not; allowed are {listed(names)}."
            raise ValueError(msg)
        return code_of[code_n]

    def _column(self, name: str) -> pd.Series:
        if name not in self._obs:
            msg = f"`adata.obs` lacks {name!r}, which the decoder needs; it has {listed(self._obs.columns, 20)}."
            raise KeyError(msg)
        return pd.Series(self._obs[name])

    def _covariates(self) -> pd.DataFrame | None:
        if not self.decoder.covariates:
            return None
        # Levels are matched by name, also those that are numbers.
        return pd.DataFrame(
            {
                c.name: self._column(c.name)
                if c.levels is None
                else pd.Series(c.levels[self._level_codes(c.levels, c.name)], index=self._adata.obs_names)
                for c in self.decoder.covariates
            }
        )

    def counts(self, layer: str | None) -> Any:
        """Count matrix with all genes of the AnnData."""
        if self._adata.uns.get(MINIFIED_INFO) == MINIFIED_WITHOUT_COUNTS:
            msg = "`adata` was minified: scvi-tools removed its counts, and the likelihood needs them."
            raise ValueError(msg)
        layer = self._setup.get("layer") if layer is None else layer
        if layer is not None and layer not in self._adata.layers:
            msg = f"`layer`: {layer!r} is not in `adata.layers`, which has {listed(filter(None, self._adata.layers)) or 'none'}."
            raise KeyError(msg)
        counts = self._adata.X if layer is None else self._adata.layers[layer]
        if counts is None:
            msg = "`adata.X` is empty; name the `layer` that holds the counts."
            raise ValueError(msg)
        check_sparse(counts, "adata.X" if layer is None else f"adata.layers[{layer!r}]")
        return counts

    def _gene_positions(self) -> np.ndarray | None:
        """Columns of the decoder's genes; None if these are all columns, in order."""
        names = self._adata.var_names.astype(str)
        position = names.get_indexer_for(pd.Index(self.decoder.genes))
        if len(position) != len(self.decoder.genes) or (position < 0).any():
            missing = self.decoder.genes[~np.isin(self.decoder.genes, names)]
            problem = (
                f"lacks {len(missing)} of its {len(self.decoder.genes)} genes: {listed(missing)}"
                if len(missing)
                else "has a gene twice"
            )
            msg = f"The likelihood of a cell needs the counts of all genes of the decoder; `adata` {problem}."
            raise ValueError(msg)
        return None if np.array_equal(position, np.arange(self._adata.n_vars)) else position

    def count_chunks(
        self, positions: np.ndarray, chunk_size: int, layer: str | None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Counts of the decoder's genes, with positions of cells. Layer and genes are checked at the call, before the first chunk."""
        counts, genes = self.counts(layer), self._gene_positions()
        layer = self._setup.get("layer") if layer is None else layer
        where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        return self._read_counts(counts, genes, positions, chunk_size, where)

    def _read_counts(
        self, counts: Any, genes: np.ndarray | None, positions: np.ndarray, chunk_size: int, where: str
    ) -> Iterator[tuple[Any, np.ndarray]]:
        n_chunks = -(-len(positions) // chunk_size)
        for i, chunk in enumerate(shown_if_slow(row_chunks(counts, positions, chunk_size), n_chunks)):
            x_ng = chunk if genes is None else chunk[:, genes]
            self._has_warned = _check_counts(x_ng, where, has_warned=self._has_warned)
            yield x_ng, positions[i * chunk_size : (i + 1) * chunk_size]


class ExportedCells(CellReader):
    """Exported latents of each cell, converted back to the order and signs of the network, and its counts.

    Random draws, sets and sums are then the same as in the model.
    """

    def __init__(self, adata: AnnData, key: str) -> None:
        keys, info = export_of(adata, key)
        decoder = LinearDecoder.from_arrays(info["decoder"])
        is_ln = decoder.latent_distribution == "ln"
        if keys.library not in adata.obs or (is_ln and keys.logits not in adata.obsm):
            missing = f"obs[{keys.library!r}]" if keys.library not in adata.obs else f"obsm[{keys.logits!r}]"
            msg = f"This export lacks `adata.{missing}`; export again with `LDVAE.export_to_anndata`."
            raise KeyError(msg)
        self.names = strings(info["names"]).tolist()
        self.order, self.signs = map(np.asarray, parts_of(info, keys.info, "order", "signs"))
        self._back = np.argsort(self.order)
        latent_nk = latents_of(adata, key)
        self._latent_nk = np.asarray(adata.obsm[keys.logits]) if is_ln else latent_nk
        self._variance_nk = np.asarray(adata.obsm[keys.variance])
        self._axes = None
        if "rotation" in info:
            if keys.network_variance not in adata.obsm:
                msg = f"This export lacks `adata.obsm[{keys.network_variance!r}]`; export again with `LDVAE.export_to_anndata`."
                raise KeyError(msg)
            self._axes = PosteriorAxes(
                np.asarray(adata.obsm[keys.network_variance]), np.asarray(info["rotation"]["matrix"])
            )
        self.library_n = np.asarray(adata.obs[keys.library], dtype=np.float64)
        super().__init__(adata, decoder, dict(info.get("setup", {})))

    def mean(self, at: Any = slice(None)) -> np.ndarray:
        """Posterior means (of u under ``"ln"``) of some cells, float64."""
        return (self._latent_nk[at].astype(np.float64) * self.signs)[:, self._back]

    def variance(self, at: Any = slice(None)) -> np.ndarray:
        """Posterior variances of some cells, float64."""
        return self._variance_nk[at].astype(np.float64)[:, self._back]

    def axes(self, at: Any = slice(None)) -> PosteriorAxes | None:
        """Variances and rotation that make up the posterior covariances of some cells; None without a rotation."""
        if self._axes is None:
            return None
        return self._axes._replace(variance_nk=self._axes.variance_nk[at].astype(np.float64))

    def batch_codes(self, transform_batch: Any) -> tuple[int | None, ...]:
        """Codes of the batches in which cells are decoded; None for each cell's own batch."""
        if transform_batch is None:
            return (None,)
        known = self.decoder.batches.tolist()
        given = given_names("transform_batch", transform_batch)
        codes = [int(match_levels("transform_batch", [batch], known)[0]) for batch in given]
        if min(codes) < 0:
            msg = f"`transform_batch` must name batches of the decoder, {listed(known)}; got {listed(given)}."
            raise ValueError(msg)
        return tuple(codes)

    def chunks(
        self, positions: np.ndarray, chunk_size: int, layer: str | None
    ) -> Iterator[tuple[EncodedCells, np.ndarray]]:
        """Chunks of cells with their positions. Layer and genes are checked at the call, before the first chunk."""
        chunks = self.count_chunks(positions, chunk_size, layer)
        return ((self._encoded(x_ng, at), at) for x_ng, at in chunks)

    def _encoded(self, x_ng: Any, at: np.ndarray) -> EncodedCells:
        return EncodedCells(
            mean=self.mean(at),
            variance=self.variance(at),
            library=self.library_n[at],
            batch=self.batch_n[at],
            label=self.label_n[at],
            covariates=None if self.covariates is None else self.covariates.iloc[at],
            counts=x_ng,
            axes=self.axes(at),
        )


def _check_counts(x_ng: Any, where: str, *, has_warned: bool) -> bool:
    """Raise on negative or non-finite values; warn once about fractions. Return True if a warning was issued."""
    values = values_of(x_ng)
    if values.dtype.kind not in "biuf":
        msg = f"`{where}` must hold counts, real numbers; its type is {values.dtype}."
        raise TypeError(msg)
    # Both comparisons are false for NaN.
    if values.size and not (values.min() >= 0 and values.max() < np.inf):
        msg = f"`{where}` must hold counts, but holds NaN, infinite or negative values; `layer` names a layer with raw counts."
        raise ValueError(msg)
    if values.size and float(values.max()) > _MOST:
        msg = (
            f"`{where}` must hold counts, but holds {values.max():g}; more than {_MOST:g} of a gene in a cell is none."
        )
        raise ValueError(msg)
    if not has_warned and has_fractions(values):
        warn(
            f"`{where}` holds values that are not integers; the likelihood is for raw counts. `layer` names a layer with "
            "raw counts."
        )
        return True
    return has_warned
