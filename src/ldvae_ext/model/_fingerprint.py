"""Comparison of registered data with the data at their set-up."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary
from zlib import crc32

import numpy as np
import pandas as pd
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from ldvae_ext._validate import listed, warn

# Counts with more stored values are compared in a sample of the cells, so that the comparison takes less than 0.1 s.
_MOST_VALUES = 10**8
_SAMPLE_IN_MEMORY, _SAMPLE_ON_DISK = 1024, 32
_CHUNK_VALUES = 2**15


class Fingerprint(NamedTuple):
    """Summary of registered data by which a change can be seen."""

    cells: pd.Index
    """Names of the cells, shape (cells,)."""
    rows: np.ndarray | None
    """Positions of the compared cells; None if the counts cannot be read by row."""
    weighted_sum: np.ndarray | None
    """Sum of the counts of each compared cell, with a weight for each gene, float64; NaN if a count is NaN."""
    fields: dict[str, int]
    """Checksum of each other registered field, such as the codes of batches."""


_at_set_up: WeakKeyDictionary[AnnDataManager, Fingerprint] = WeakKeyDictionary()


def check_unchanged(manager: AnnDataManager) -> None:
    """Raise if registered data are no longer those of the set-up; the first call remembers them.

    Compared are the names of genes, the counts (of all cells, or of a sample if there are very many), and the registered columns
    of obs. Cells that were removed in place are left out of the comparison.

    Parameters
    ----------
    manager
        Manager of the AnnData.

    Raises
    ------
    ValueError
        If something differs.
    """
    _check_genes_unchanged(manager)
    now, before = _fingerprint(manager), _at_set_up.get(manager)
    if before is None:
        _at_set_up[manager] = now
        return
    pairs = _same_cells(before, now)
    if pairs is not None:
        _check_counts_unchanged(manager, before, now, *pairs)
    if len(before.cells) == len(now.cells):
        changed = [name for name, value in before.fields.items() if now.fields.get(name) != value]
        if changed:
            msg = (
                f"The registered {listed(changed)} of the cells changed since `setup_anndata`, which the model was built on. Undo the "
                "change of `adata.obs`, or set up a copy of the AnnData and train a new model on it."
            )
            raise ValueError(msg)


def _check_genes_unchanged(manager: AnnDataManager) -> None:
    names = np.asarray(manager.adata.var_names).astype(str)
    registered = np.asarray(manager.get_state_registry(REGISTRY_KEYS.X_KEY)["column_names"]).astype(str)
    if np.array_equal(names, registered):
        return
    if len(names) != len(registered):
        msg = (
            f"`adata` had {len(registered)} genes at `setup_anndata` and has {len(names)} now: genes were filtered in place. Filter a copy "
            "instead, or set up the filtered AnnData again and train a new model on it."
        )
        raise ValueError(msg)
    if set(names) & set(registered):
        msg = (
            "`adata.var_names` are not those of `setup_anndata`, or in another order. `adata.var.sort_index(inplace=True)` moves names but "
            "not counts. Put the names back, or set up the AnnData again and train a new model on it."
        )
        raise ValueError(msg)
    compare_genes(names, registered)


def compare_genes(names: np.ndarray, known: np.ndarray) -> None:
    """Raise unless genes are those of a set-up in the same order; other names of as many genes are allowed, with a warning.

    Parameters
    ----------
    names, known
        Names of as many genes.
    """
    if np.array_equal(names, known):
        return
    missing = known[~np.isin(known, names)]
    if len(missing) == 0:
        msg = (
            "The genes of `adata` are in another order than at the set-up of the model, and are read by position here; "
            "`adata[:, model.get_var_names()].copy()` has the order of the model."
        )
        raise ValueError(msg)
    if len(missing) < len(known):
        msg = f"`adata` lacks {len(missing)} of the {len(known)} genes of the model: {listed(missing)}."
        raise ValueError(msg)
    warn(
        "No gene of `adata` has the name of a gene of the model; they are taken for the same genes under other names, in the "
        f"same order ({str(names[0])!r} for {str(known[0])!r})."
    )


def _same_cells(before: Fingerprint, now: Fingerprint) -> tuple[np.ndarray, np.ndarray] | None:
    """Positions of the same cells in two fingerprints: by name, or by position if as many cells have other names."""
    if before.weighted_sum is None or now.weighted_sum is None or before.rows is None or now.rows is None:
        return None
    if before.cells is now.cells or before.cells.equals(now.cells):
        return np.arange(len(before.rows)), np.arange(len(now.rows))
    if before.cells.is_unique and now.cells.is_unique:
        position = before.cells[before.rows].get_indexer(now.cells[now.rows])
        found = np.flatnonzero(position >= 0)
        if len(found):
            return position[found], found
    if len(before.cells) == len(now.cells):
        return np.arange(len(before.rows)), np.arange(len(now.rows))
    return None


def _check_counts_unchanged(
    manager: AnnDataManager, before: Fingerprint, now: Fingerprint, at_before: np.ndarray, at_now: np.ndarray
) -> None:
    old, new = before.weighted_sum[at_before], now.weighted_sum[at_now]  # type: ignore[index]
    if np.array_equal(old, new):
        return
    differ = ~np.isclose(old, new, rtol=1e-9, atol=0)
    if not differ.any():
        return
    layer = manager.data_registry[REGISTRY_KEYS.X_KEY].attr_key
    where = "adata.X" if layer in (None, "None") else f"adata.layers[{layer!r}]"
    first = now.cells[now.rows[at_now[differ][0]]]  # type: ignore[index]
    msg = (
        f"The counts in `{where}` are no longer those of `setup_anndata`: {int(differ.sum())} of {len(old)} compared cells differ, such "
        f"as {first!r}. If they were normalised in place, put the counts back, or into a layer before the normalisation: "
        "`adata.layers['counts'] = adata.X.copy()` and `setup_anndata(adata, layer='counts')`."
    )
    raise ValueError(msg)


def _fingerprint(manager: AnnDataManager) -> Fingerprint:
    fields = {
        key: _checksum(manager.get_from_registry(key))
        for key in manager.data_registry
        if key in (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY, *_COVARIATES)
    }
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    rows = _compared_rows(counts)
    weighted = None if rows is None else _weighted_sums(counts, rows)
    return Fingerprint(manager.adata.obs_names, rows, weighted, fields)


def _checksum(values: Any) -> int:
    array = np.asarray(values)
    return crc32(np.ascontiguousarray(array.astype(np.float64) if array.dtype == object else array).view(np.uint8))


_COVARIATES = (REGISTRY_KEYS.CAT_COVS_KEY, REGISTRY_KEYS.CONT_COVS_KEY, REGISTRY_KEYS.SIZE_FACTOR_KEY)


def _compared_rows(counts: Any) -> np.ndarray | None:
    n_cells, n_genes = counts.shape
    if isinstance(counts, (np.ndarray, pd.DataFrame)) or sparse.issparse(counts):
        n_values = counts.nnz if sparse.issparse(counts) else n_cells * n_genes
        most = n_cells if n_values <= _MOST_VALUES else _SAMPLE_IN_MEMORY
    elif getattr(counts, "file", None) is not None or hasattr(counts, "backend"):
        most = _SAMPLE_ON_DISK
    else:
        return None
    step = max(1, -(-n_cells // most))
    return np.arange(0, n_cells, step)


def _weighted_sums(counts: Any, rows: np.ndarray) -> np.ndarray:
    # Weights between 1 and 2, which no permutation of genes leaves as they are.
    weight_g = 1 + np.modf(np.arange(1, counts.shape[1] + 1) * np.sqrt(2))[0]
    if isinstance(counts, pd.DataFrame):
        counts = counts.to_numpy()
    if len(rows) < counts.shape[0]:
        counts = counts[rows]
    out = np.zeros(len(rows))
    by_gene = sparse.issparse(counts) and counts.format == "csc"
    n_lines, length = (counts.shape[1], counts.shape[0]) if by_gene else counts.shape
    stored = counts.nnz / max(1, n_lines) if sparse.issparse(counts) else length
    step = int(max(1, _CHUNK_VALUES / max(1, stored)))
    for start in range(0, n_lines, step):
        lines = slice(start, start + step)
        if by_gene:
            out += counts[:, lines].astype(np.float64) @ weight_g[lines]
        elif sparse.issparse(counts):
            out[lines] = counts[lines].astype(np.float64) @ weight_g
        else:
            out[lines] = np.asarray(counts[lines], dtype=np.float64) @ weight_g
    return out
