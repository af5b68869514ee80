"""Reading all counts once before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ldvae_ext._validate import check_column, check_names_last, listed, warn
from ldvae_ext.core.cells import check_sparse, values_of
from ldvae_ext.core.levels import match_levels
from ldvae_ext.core.rows import RowReader, row_chunks

_CHUNK_VALUES = 2**24


def check_is_anndata(adata: Any) -> None:
    """Raise unless ``adata`` is an AnnData, or None."""
    if adata is not None and not isinstance(adata, AnnData):
        given = repr(adata) if isinstance(adata, (str, int, float)) else type(adata).__name__
        msg = f"`adata` must be an AnnData or None, for the model's own; got {given}. Other arguments are best given by name."
        raise TypeError(msg)


def check_given_anndata(adata: Any) -> None:
    """Raise unless ``adata`` is an AnnData."""
    if not isinstance(adata, AnnData):
        hint = "; pass one modality, such as `mdata['rna']`" if type(adata).__name__ == "MuData" else ""
        msg = f"`adata` must be an AnnData; got {type(adata).__name__}{hint}."
        raise TypeError(msg)


def counts_of(adata: AnnData, layer: str | None) -> Any:
    """The count matrix, or an error that lists the layers."""
    # anndata lists X among the layers, with the name None.
    layers = listed(filter(None, adata.layers.keys())) or "none"
    if layer is None:
        if adata.X is None:
            msg = f"`adata.X` is empty and no `layer` was named; layers: {layers}."
            if adata.raw is not None:
                msg += " `adata.layers['counts'] = adata.raw[:, adata.var_names].X` makes a layer of `adata.raw`, if it holds counts."
            raise ValueError(msg)
        return adata.X
    if layer not in adata.layers:
        msg = f"`layer`: {layer!r} is not in `adata.layers`, which has {layers}."
        raise KeyError(msg)
    return adata.layers[layer]


def _row_chunks(counts: Any) -> Iterator[tuple[int, Any]]:
    step = max(1, _CHUNK_VALUES // max(1, counts.shape[1]))
    for i, chunk in enumerate(row_chunks(counts, np.arange(counts.shape[0]), step)):
        yield i * step, chunk


def check_counts(adata: AnnData, layer: str | None, *, may_be_empty: bool = False) -> None:
    """Raise on negative, NaN or infinite counts, warn on fractions and on cells without counts.

    Every stored value is read once, in chunks of rows. A matrix without counts is an error, or a warning with
    ``may_be_empty``: a saved model can be opened with latents only.
    """
    counts = counts_of(adata, layer)
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    if isinstance(counts, np.ma.MaskedArray):
        msg = f"`{where}` is a masked array, and a masked count is not 0 to a likelihood; give an array, such as `{where}.filled(0)`."
        raise TypeError(msg)
    if 0 in adata.shape and not may_be_empty:
        msg = f"`adata` must have cells and genes; got {adata.n_obs} cells and {adata.n_vars} genes."
        raise ValueError(msg)
    check_sparse(counts, where)
    fraction: float | None = None
    empty: list[int] = []
    for start, chunk in _row_chunks(counts):
        values = values_of(chunk)
        if values.dtype.kind not in "biuf":
            msg = f"`{where}` must hold counts, real numbers; its type is {values.dtype}."
            raise TypeError(msg)
        for problem, is_bad in (("NaN or infinite", ~np.isfinite(values)), ("negative", values < 0)):
            if is_bad.any():
                msg = f"`{where}` must hold counts, but holds {problem} values, such as {values[is_bad].flat[0]!s}."
                raise ValueError(msg)
        if fraction is None:
            is_fraction = values % 1 != 0
            if is_fraction.any():
                fraction = float(values[is_fraction].flat[0])
        totals = totals_of(chunk)
        empty += (start + np.flatnonzero(totals == 0)).tolist()
    if fraction is not None:
        warn(f"`{where}` has values that are not integers, such as {fraction:g}; LDVAE models raw counts.")
    if len(empty) == adata.n_obs:
        msg = f"`{where}` has no counts."
        if not may_be_empty:
            raise ValueError(msg)
        warn(f"{msg} `minify_adata` makes the model read the posteriors in `adata.obsm` instead.")
    elif empty:
        warn(
            f"{len(empty)} of {adata.n_obs} cells have no counts in `{where}`; the first is "
            f"{adata.obs_names[empty[0]]!r}. They do not contribute to the prior of the library size."
        )


def totals_of(counts: Any) -> np.ndarray:
    """Total of each cell, shape (cells,); in the type that numpy chooses, as in LinearSCVI, but not in float16."""
    return np.asarray(_native(counts).sum(axis=1)).ravel()


def _native(counts: Any) -> Any:
    """The matrix; of float32 for types that cannot hold totals, or that scipy does not multiply."""
    is_short = counts.dtype.kind == "f" and counts.dtype.itemsize < 4
    return counts.astype(np.float32) if is_short or not counts.dtype.isnative else counts


def has_counts(counts: Any) -> bool:
    """True if any value is not 0."""
    return any(values_of(chunk).any() for _, chunk in _row_chunks(counts))


def are_counts(counts: Any, columns: Any = slice(None)) -> bool:
    """True if all values of some columns are finite, non-negative integers."""
    for _, chunk in _row_chunks(counts):
        values = values_of(chunk[:, columns])
        if not np.isfinite(values).all() or (values < 0).any() or (values % 1 != 0).any():
            return False
    return True


def same_counts(counts: Any, rows: np.ndarray, columns: np.ndarray, other: Any, other_columns: np.ndarray) -> bool:
    """True if the given rows and columns of one matrix equal given columns of another matrix."""
    reader = RowReader(counts)
    for start, chunk in _row_chunks(other):
        differ = reader.take(rows[start : start + chunk.shape[0]])[:, columns] != chunk[:, other_columns]
        if (differ.nnz if sparse.issparse(differ) else np.asarray(differ).sum()) > 0:
            return False
    return True


def check_categories(adata: AnnData, name: str, key: str | None, known: np.ndarray | None = None) -> None:
    """Raise unless a categorical column exists, has no NaN and, if ``known`` is given, no other value."""
    if key is None:
        return
    check_column(adata.obs.columns, name, key)
    values = adata.obs[key]
    _check_levels(pd.Series(values), name, key)
    # All categories, which scvi-tools registers. `unique` of early pandas takes names that differ in a NUL for one.
    check_names_last(
        name, values.cat.categories if isinstance(values.dtype, pd.CategoricalDtype) else dict.fromkeys(values)
    )
    if values.isna().any():
        msg = f"`{name}`: `adata.obs[{key!r}]` is NaN for {int(values.isna().sum())} of {adata.n_obs} cells; name a value for each."
        raise ValueError(msg)
    if known is not None:
        given = list(values.unique())
        position = match_levels(name, given, known.tolist())
        unseen = [value for value, at in zip(given, position, strict=True) if at < 0]
        if unseen:
            msg = (
                f"`{name}`: the model has not seen {listed(unseen)} in `adata.obs[{key!r}]`; it knows {listed(known)}."
            )
            raise ValueError(msg)


_DATES = ("datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period", "interval")


def _check_levels(values: pd.Series, name: str, key: str) -> None:
    """Raise on dates and on values of several types, of which a file or another library would make other levels."""
    kind = pd.api.types.infer_dtype(values.cat.categories if hasattr(values, "cat") else values, skipna=True)
    if kind in _DATES or (kind.startswith("mixed") and kind != "mixed-integer-float"):
        what = "dates" if kind in _DATES else "values of several types"
        msg = (
            f"`{name}`: `adata.obs[{key!r}]` must hold text, numbers or booleans; it has {what}, such as {listed(values.unique(), 3)}. "
            f"Write them as text: `adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)`."
        )
        raise TypeError(msg)


def checked_keys(name: str, keys: Any) -> list[str]:
    """The columns that an argument names, as a list."""
    if keys is None:
        return []
    if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
        msg = f"`{name}` must be a list of columns of `adata.obs`; got {keys!r}."
        raise TypeError(msg)
    if len(set(keys)) < len(keys):
        msg = f"`{name}` must name each column once; got {listed(keys)}."
        raise ValueError(msg)
    return list(keys)


def check_numbers(adata: AnnData, name: str, key: str, *, positive: bool = False) -> None:
    """Raise unless a column of obs exists and has finite, or positive, numbers."""
    check_column(adata.obs.columns, name, key)
    values = adata.obs[key]
    if not pd.api.types.is_numeric_dtype(values):
        msg = f"`{name}`: `adata.obs[{key!r}]` must hold numbers; its type is {values.dtype}."
        raise TypeError(msg)
    array = np.asarray(values, dtype=np.float64)
    bad = ~np.isfinite(array) | ((array <= 0) if positive else False)
    if bad.any():
        what = "positive" if positive else "finite"
        msg = f"`{name}`: `adata.obs[{key!r}]` must hold {what} numbers; {int(bad.sum())} of {adata.n_obs} are not, such as {array[bad][0]:g}."
        raise ValueError(msg)


# 300 simulated cells, ELBO per cell: -119 for a standard normal covariate, -120 for 8 +- 4, -125 for 20 +- 5, -239 for
# 100 +- 10, -9015 for years.
_LARGE = 10


def check_scale(adata: AnnData, key: str) -> None:
    """Warn on a continuous covariate that is far from standardised: its gradients are as large as its values."""
    values = np.asarray(adata.obs[key], dtype=np.float64)
    mean, deviation = values.mean(), values.std()
    if max(abs(mean), deviation) > _LARGE:
        column = f"adata.obs[{key!r}]"
        warn(
            f"`continuous_covariate_keys`: `{column}` has mean {mean:.4g} and standard deviation {deviation:.4g}. Values of this size "
            "keep the network from learning; standardise them before `setup_anndata`: "
            f"`{column} = ({column} - {column}.mean()) / {column}.std()`."
        )


def mean_expression(counts: Any, size_n: np.ndarray | None = None) -> np.ndarray:
    """Share of each gene in all counts, or its mean of counts over size factors.

    Half a count is added to each gene, so that the logarithm of one that was never seen is finite.

    Parameters
    ----------
    counts
        Cells x genes.
    size_n
        Size factors, shape (cells,).

    Returns
    -------
    Shape (genes,), float32, positive.
    """
    total_g, n_cells = np.full(counts.shape[1], 0.5), 0
    for start, chunk in _row_chunks(counts):
        n_cells += chunk.shape[0]
        weights = np.ones(chunk.shape[0]) if size_n is None else 1 / size_n[start : start + chunk.shape[0]]
        total_g += np.asarray(_native(chunk).T @ weights, dtype=np.float64).ravel()
    return (total_g / (np.sum(total_g) if size_n is None else n_cells)).astype(np.float32)


def library_prior(counts: Any, batch_n: np.ndarray | None, n_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the log library of each batch, of the cells that have counts.

    Equal to LinearSCVI's where every cell has counts; there, one empty cell counts as a library of one and can
    multiply the variance.

    Parameters
    ----------
    counts
        Cells x genes, or None where there are none, as for a model restored from its registry.
    batch_n
        Batch codes, shape (cells,).
    n_batch
        Number of batches.

    Returns
    -------
    Two arrays of shape (1, batches), in log counts; mean 0 and variance 1 for a batch without cells, variance 1 also for one
    whose cells all have the same total (such as a single cell), with which LinearSCVI cannot be trained.
    """
    means, variances = np.zeros((1, n_batch)), np.ones((1, n_batch))
    if counts is None or batch_n is None:
        return means, variances
    total_n = np.concatenate([totals_of(chunk) for _, chunk in _row_chunks(counts)])
    for code in np.unique(batch_n):
        means[0, code], variances[0, code] = prior_of_totals(total_n[batch_n == code])
    return means, variances


def prior_of_totals(totals: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the log of those totals of a batch that are not zero; see :func:`library_prior`."""
    logs = np.log(totals[totals > 0])
    if not logs.size:
        return 0.0, 1.0
    return float(np.mean(logs).astype(np.float32)), float(np.var(logs).astype(np.float32)) or 1.0
