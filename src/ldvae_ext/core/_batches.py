"""Batches given by name or by code."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldvae_ext._validate import listed


def batch_codes(batches: np.ndarray, batch: Any, n_cells: int) -> np.ndarray:
    """See :meth:`ldvae_ext.core.LinearDecoder.batch_codes`."""
    if batch is None:
        if len(batches) > 1:
            msg = f"`batch` is needed, since this decoder has several; allowed are {listed(batches)}."
            raise ValueError(msg)
        return np.zeros(n_cells, dtype=np.int64)
    given = np.asarray(batch).ravel()
    if str(getattr(batch, "dtype", "")) == "category":
        given = given.astype(str)
    if given.size not in (1, n_cells):
        msg = f"`batch` must be one batch or one for each of {n_cells} cells; got {given.size}."
        raise ValueError(msg)
    if np.issubdtype(given.dtype, np.integer):
        own_codes = [str(code) for code in range(len(batches))]
        if any(_is_number(name) for name in batches) and batches.tolist() != own_codes:
            msg = f"`batch`: {given[0]} may be a code or a name, since batches are named {listed(batches)}; give names as str."
            raise ValueError(msg)
        codes = given.astype(np.int64)
        unknown = given[(codes < 0) | (codes >= len(batches))]
    else:
        code_of = {name: i for i, name in enumerate(batches)}
        values, inverse = np.unique(given.astype(str), return_inverse=True)
        codes = np.array([code_of.get(v, -1) for v in values], dtype=np.int64)[inverse.ravel()]
        unknown = given[codes < 0]
    if unknown.size:
        msg = (
            f"`batch`: {unknown.tolist()[0]!r} is no batch of this decoder; allowed are {listed(batches)} "
            f"or 0 to {len(batches) - 1}."
        )
        raise ValueError(msg)
    return np.broadcast_to(codes, (n_cells,))


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
