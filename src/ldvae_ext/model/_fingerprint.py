"""Comparison of registered data with the data at their set-up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import pandas as pd
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from ldvae_ext._validate import listed, warn
from ldvae_ext.core.rows import RowReader

# Counts with more stored values are compared in a sample of the cells, so that the comparison takes about 0.1 s.
_MOST_VALUES = 2 * 10**7
_SAMPLE_IN_MEMORY, _SAMPLE_ON_DISK = 1024, 32
_CHUNK_VALUES = 2**15
# Registered fields other than the counts that a model reads.
_FIELDS = (
    REGISTRY_KEYS.BATCH_KEY,
    REGISTRY_KEYS.LABELS_KEY,
    REGISTRY_KEYS.CAT_COVS_KEY,
    REGISTRY_KEYS.CONT_COVS_KEY,
    REGISTRY_KEYS.SIZE_FACTOR_KEY,
    REGISTRY_KEYS.LATENT_QZM_KEY,
    REGISTRY_KEYS.LATENT_QZV_KEY,
    REGISTRY_KEYS.OBSERVED_LIB_SIZE,
)


class Fingerprint(NamedTuple):
    """Summary of registered data by which a change can be seen."""

    cells: pd.Index
    """Names of the cells, shape (cells,)."""
    rows: np.ndarray | None
    """Positions of the cells whose counts are compared; None if counts cannot be read by cell, or not fast."""
    counts: np.ndarray
    """Sum of the counts of each of these cells, with a weight for each gene, float64; NaN if a count is NaN."""
    fields: dict[str, np.ndarray]
    """Sum of the values of each cell in each other field, with a weight for each column, float64."""


_at_set_up: WeakKeyDictionary[AnnDataManager, Fingerprint] = WeakKeyDictionary()
_renamed: WeakSet[AnnDataManager] = WeakSet()


def check_unchanged(manager: AnnDataManager) -> None:
    """Raise if registered data are no longer those of the set-up; the first call remembers them.

    Compared are the names of genes, the counts (of all cells, or of a sample if there are very many), and the registered
    fields: codes of batches, labels and covariates, size factors, latents of minified data. They are copies, so that a later
    change of a column of obs has no effect until the AnnData is registered again. Cells may be removed, renamed or reordered.

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
    problems: list[str | None] = []
    for pairs in _pairings(before, now):
        problems.append(_first_change(manager, before, now, *pairs))
        if problems[-1] is None:
            if now.fields.keys() - before.fields.keys():  # registered since, such as the latents of minified data
                _at_set_up[manager] = now
            return
    if problems:
        raise ValueError(problems[0])


def note_change(manager: AnnDataManager) -> None:
    """Remember registered data that the package itself has changed.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    """
    _at_set_up[manager] = _fingerprint(manager)


def digests(manager: AnnDataManager) -> dict[str, float]:
    """One number for the counts and for each other registered field, which another order of the cells changes, too.

    Counts that cannot be read by cell, or not fast, have none.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    """
    print_ = _fingerprint(manager)
    sums = {"counts": print_.counts} if print_.rows is not None else {}
    return {name: float(_weights(len(values)) @ values) for name, values in (sums | print_.fields).items()}


def _pairings(before: Fingerprint, now: Fingerprint) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of the same cells: by name, and by position if there are as many cells, which may have other names."""
    has_same_names = before.cells is now.cells or before.cells.equals(now.cells)
    if not has_same_names and before.cells.is_unique and now.cells.is_unique:
        position = before.cells.get_indexer(now.cells)
        found = np.flatnonzero(position >= 0)
        if len(found):
            yield position[found], found
    if len(before.cells) == len(now.cells):
        yield np.arange(len(before.cells)), np.arange(len(now.cells))


def _first_change(
    manager: AnnDataManager, before: Fingerprint, now: Fingerprint, at_before: np.ndarray, at_now: np.ndarray
) -> str | None:
    """Description of the first difference between the same cells; None if there is none."""
    if before.rows is not None and now.rows is not None:
        old, new = (np.full(len(print_.cells), -1.0) for print_ in (before, now))
        old[before.rows], new[now.rows] = before.counts, now.counts
        old, new = old[at_before], new[at_now]
        both = np.flatnonzero((old != -1) & (new != -1))
        differ = both[~np.isclose(old[both], new[both], rtol=1e-9, atol=0)]
        if len(differ):
            layer = manager.data_registry[REGISTRY_KEYS.X_KEY].attr_key
            where = "adata.X" if layer in (None, "None") else f"adata.layers[{layer!r}]"
            return (
                f"The counts in `{where}` are no longer those of `setup_anndata`: {len(differ)} of {len(both)} compared cells differ, "
                f"such as {now.cells[at_now[differ[0]]]!r}. If they were normalised in place, put the counts back, or into a layer "
                "before the normalisation: `adata.layers['counts'] = adata.X.copy()` and `setup_anndata(adata, layer='counts')`."
            )
    changed = [
        name
        for name, value in before.fields.items()
        if name not in now.fields
        or not np.allclose(value[at_before], now.fields[name][at_now], rtol=1e-6, equal_nan=True)
    ]
    if changed:
        return (
            f"The registered {listed(changed)} of the cells changed since `setup_anndata`, which the model was built on. Undo the "
            "change of `adata`, or set up a copy of it and train a new model on that."
        )
    return None


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
    at = (
        pd.Index(registered).get_indexer_for(pd.Index(names[names != registered]))
        if len(set(registered)) == len(registered)
        else []
    )
    if (np.asarray(at) >= 0).any():
        msg = (
            "`adata.var_names` are not those of `setup_anndata`, or in another order. `adata.var.sort_index(inplace=True)` moves names but "
            "not counts. Put the names back, or set up the AnnData again and train a new model on it."
        )
        raise ValueError(msg)
    if manager not in _renamed:
        _renamed.add(manager)
        first = np.flatnonzero(names != registered)[0]
        warn(
            f"{np.count_nonzero(names != registered)} genes have other names than at `setup_anndata`, such as {str(names[first])!r} for "
            f"{str(registered[first])!r}; they are taken for the same genes under other names."
        )


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


def _fingerprint(manager: AnnDataManager) -> Fingerprint:
    fields = {key: _weighted(manager.get_from_registry(key)) for key in manager.data_registry if key in _FIELDS}
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    rows = _compared_rows(counts)
    return Fingerprint(
        manager.adata.obs_names, rows, np.empty(0) if rows is None else _weighted_sums(counts, rows), fields
    )


def _weights(length: int) -> np.ndarray:
    """Weights between 1 and 2, which no permutation leaves as they are."""
    return 1 + np.modf(np.arange(1, length + 1) * np.sqrt(2))[0]


def _weighted(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    array = array.reshape(len(array), -1)
    return array @ _weights(array.shape[1])


def _compared_rows(counts: Any) -> np.ndarray | None:
    n_cells, n_genes = counts.shape
    if isinstance(counts, (np.ndarray, pd.DataFrame)) or sparse.issparse(counts):
        n_values = counts.nnz if sparse.issparse(counts) else n_cells * n_genes
        if n_values > _MOST_VALUES and sparse.issparse(counts) and counts.format != "csr":
            return None  # to take some rows of such a matrix all of it is read
        most = n_cells if n_values <= _MOST_VALUES else _SAMPLE_IN_MEMORY
    elif getattr(counts, "file", None) is not None or hasattr(counts, "backend"):
        most = _SAMPLE_ON_DISK
    else:
        return None
    step = max(1, -(-n_cells // most))
    return np.arange(0, n_cells, step)


def _weighted_sums(counts: Any, rows: np.ndarray) -> np.ndarray:
    weight_g = _weights(counts.shape[1])
    if isinstance(counts, pd.DataFrame):
        counts = counts.to_numpy()
    if len(rows) < counts.shape[0]:
        counts = RowReader(counts).take(rows)
    out = np.zeros(len(rows))
    by_gene = sparse.issparse(counts) and counts.format == "csc"
    n_lines, length = (counts.shape[1], counts.shape[0]) if by_gene else counts.shape
    stored = counts.nnz / max(1, n_lines) if sparse.issparse(counts) else length
    # Each chunk of genes adds a vector of all cells.
    step = int(max(1, max(_CHUNK_VALUES, length * by_gene) / max(1, stored)))
    for start in range(0, n_lines, step):
        lines = slice(start, start + step)
        if by_gene:
            out += counts[:, lines].astype(np.float64) @ weight_g[lines]
        elif sparse.issparse(counts):
            out[lines] = counts[lines].astype(np.float64) @ weight_g
        else:
            out[lines] = np.asarray(counts[lines], dtype=np.float64) @ weight_g
    return out
