"""References that cells are projected on: their decoder, order, signs, genes and batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._keys import DEFAULT_KEY
from ldvae_ext._validate import check_column, listed
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.levels import match_levels
from ldvae_ext.get._export import export_of, parts_of

# Choices of batch that are no batch of the reference.
MEAN, FIT = "mean", "fit"


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference:
    """A decoder with the order, signs, names and axes of its factors."""

    decoder: LinearDecoder
    order: np.ndarray
    signs: np.ndarray
    names: np.ndarray
    setup: dict[str, str]
    rotation: dict[str, Any] | None = None
    adata: AnnData | None = None
    key: str = DEFAULT_KEY

    @property
    def axes_kk(self) -> np.ndarray:
        """Axes of the factors in the network's latents, latents x factors."""
        n_factors = len(self.decoder.factors)
        return np.eye(n_factors) if self.rotation is None else np.asarray(self.rotation["matrix"], dtype=np.float64)

    @property
    def prior_covariance_kk(self) -> np.ndarray:
        """Prior covariance of the factors."""
        return self.axes_kk.T @ self.axes_kk

    def errors(self, genes: np.ndarray) -> np.ndarray | None:
        """Standard errors of the loadings of some genes, genes x factors in the decoder's order; None if not known."""
        if self.adata is None:
            return None
        keys, _ = export_of(self.adata, self.key)
        if keys.loadings_error not in self.adata.varm:
            return None
        at = self.adata.var_names.astype(str).get_indexer_for(pd.Index(genes))
        if len(at) != len(genes) or (at < 0).any():
            return None
        return np.asarray(self.adata.varm[keys.loadings_error])[at][:, np.argsort(self.order)]


def reference_of(reference: Any, key: str) -> Reference:
    """The reference from what a user gives."""
    if isinstance(reference, (str, Path)):
        if Path(reference).suffix != ".npz":
            msg = f"`reference`: a path must be that of an .npz file that `LinearDecoder.save` wrote; read {str(reference)!r} first."
            raise ValueError(msg)
        reference = LinearDecoder.load(reference)
    if isinstance(reference, LinearDecoder):
        k = len(reference.factors)
        return Reference(
            decoder=reference, order=np.arange(k), signs=np.ones(k, dtype=np.int64), names=reference.factors, setup={}
        )
    if not isinstance(reference, AnnData):
        msg = f"`reference` must be an AnnData with an export, a LinearDecoder, or the path of one; got {type(reference).__name__}."
        raise TypeError(msg)
    _, info = export_of(reference, key)
    order, signs = parts_of(info, key, "order", "signs")
    return Reference(
        decoder=LinearDecoder.from_arrays(info["decoder"]),
        order=np.asarray(order),
        signs=np.asarray(signs),
        names=strings(info["names"]),
        setup={name: str(value) for name, value in dict(info.get("setup", {})).items()},
        rotation=info.get("rotation"),
        adata=reference,
        key=key,
    )


def shared_genes(decoder: LinearDecoder, adata: AnnData, min_share: float) -> np.ndarray:
    """Genes of the decoder that the cells have, or an error if there are too few."""
    names = adata.var_names.astype(str)
    is_shared = np.isin(decoder.genes, names)
    genes, n_all = decoder.genes[is_shared], len(decoder.genes)
    if len(genes) < max(min_share * n_all, 1):
        msg = (
            f"`adata` has {len(genes)} of the {n_all} genes of the reference, less than `min_share={min_share:g}`; the reference's are "
            f"{listed(decoder.genes, 3)}, those of `adata` {listed(names, 3)}. A lower `min_share` allows it."
        )
        raise ValueError(msg)
    if len(genes) < len(decoder.factors):
        msg = f"`adata` has {len(genes)} genes of the reference, fewer than its {len(decoder.factors)} factors."
        raise ValueError(msg)
    twice = names[names.isin(genes) & names.duplicated()]
    if len(twice):
        msg = f"`adata.var_names` must be unique; {twice[0]!r} occurs more than once."
        raise ValueError(msg)
    return genes


def with_batches(
    panel: LinearDecoder, adata: AnnData, batch: str | None, batch_key: str | None, setup: dict[str, str]
) -> tuple[LinearDecoder, dict[str, str]]:
    """The decoder with the batches of the query, and the columns of ``obs`` to read."""
    columns = {name: value for name, value in setup.items() if name == "labels_key"}
    known = panel.batches.tolist()
    if batch_key is not None:
        check_column(adata.obs.columns, "batch_key", batch_key)
        if (batch is not None and (batch != FIT or batch in known)) or (batch is None and len(known) == 1):
            why = (
                "the reference has a single batch"
                if batch is None
                else f"all cells have the intercepts of `batch={batch!r}`"
            )
            msg = f"`batch_key` has no use: {why}."
            raise ValueError(msg)
    if batch is not None and batch in known:
        return panel.with_batches([batch], batch), columns
    if batch == MEAN:
        return panel.with_batches([MEAN]), columns
    if batch == FIT:
        names = ["query"] if batch_key is None else pd.unique(pd.Series(adata.obs[batch_key]).astype(str)).tolist()
        return panel.with_batches(names), columns | ({} if batch_key is None else {"batch_key": batch_key})
    if batch is not None:
        msg = f"`batch` must be {MEAN!r}, {FIT!r}, or a batch of the reference, {listed(known)}; got {batch!r}."
        raise ValueError(msg)
    if len(known) == 1:
        return panel, columns
    column = setup.get("batch_key") if batch_key is None else batch_key
    choices = f"`batch` chooses their intercepts: {MEAN!r}, {FIT!r}, or a batch of the reference, {listed(known)}."
    if column is None or column not in adata.obs:
        msg = (
            f"The reference has {len(known)} batches, and `adata.obs` has no column with those of the cells. {choices}"
        )
        raise ValueError(msg)
    values = list(pd.unique(pd.Series(adata.obs[column])))
    unknown = [value for value, code in zip(values, match_levels(column, values, known), strict=True) if code < 0]
    if unknown:
        msg = f"`adata.obs[{column!r}]` has {listed(unknown)}, which are no batches of the reference. {choices}"
        raise ValueError(msg)
    return panel, columns | {"batch_key": column}
