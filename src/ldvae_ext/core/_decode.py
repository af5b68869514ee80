"""Decoding, row by row: compiled where there is numba, else by numpy in blocks of cells that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ldvae_ext.core._tables import Tables, plain
from ldvae_ext.kernels.threads import is_compiled, over_rows, threads

# Fewer numbers than these are numpy's, since compiled loops take a second to load.
_FEW = 2**16
# Numbers of an array that numpy works on at a time.
_BLOCK = 2**16


class AffineDecoder(Protocol):
    """The parts of a :class:`ldvae_ext.core.LinearDecoder` that decoding reads."""

    @property
    def link(self) -> str: ...
    @property
    def genes(self) -> np.ndarray: ...
    @property
    def weight_gk(self) -> np.ndarray: ...
    @property
    def intercept_bg(self) -> np.ndarray: ...
    @property
    def covariate_cg(self) -> np.ndarray | None: ...
    @property
    def _tables(self) -> Tables: ...
    def apply_link(self, logits_ng: np.ndarray) -> np.ndarray: ...


def put_scale(
    decoder: AffineDecoder,
    out_ng: np.ndarray,
    z_nk: np.ndarray,
    batch_n: np.ndarray,
    design_nc: np.ndarray | None,
    library_n: np.ndarray,
    *,
    genes: np.ndarray | None = None,
    share: float = 1.0,
) -> None:
    """Set an array to ``library * scale``, or add a share of it.

    Parameters
    ----------
    decoder
        The decoder.
    out_ng
        Output, or the array that is added to; float64 or float32. All computations are in float64.
    z_nk, batch_n, design_nc
        Latents, batch codes, and the design of the covariates, if there are any.
    library_n
        Library sizes, shape (cells,).
    genes
        Positions of genes, the columns of the output, ascending; all if None.
    share
        If less than 1, this share is added.
    """
    n_cells = len(z_nk)
    if _is_for_loops(decoder, n_cells) and out_ng.flags.c_contiguous:
        from ldvae_ext.kernels import decoding

        tables = decoder._tables
        over_rows(
            decoding.decode,
            n_cells,
            plain(z_nk, np.float64),
            tables.weight_kg,
            *logit_offsets(decoder, batch_n, design_nc),
            plain(library_n, np.float64),
            np.arange(len(decoder.genes)) if genes is None else plain(genes, np.int64),
            float(share),
            out_ng,
        )
        return
    for at, rate_ng in _rates(decoder, z_nk, batch_n, design_nc, share * library_n):
        some_ng = rate_ng if genes is None else rate_ng[:, genes]
        if share == 1.0:
            out_ng[at] = some_ng
        else:
            out_ng[at] += some_ng


def add_group_scale(
    decoder: AffineDecoder,
    total_pg: np.ndarray,
    z_nk: np.ndarray,
    batch_n: np.ndarray,
    design_nc: np.ndarray | None,
    library_n: np.ndarray,
    group_n: np.ndarray,
) -> None:
    """Add ``library * scale`` of each cell to its group, shape (groups, genes), float64; a group of -1 is none.

    Parameters
    ----------
    decoder, z_nk, batch_n, design_nc, library_n
        See :func:`put_scale`.
    total_pg
        Sums that are added to.
    group_n
        Group codes.
    """
    n_cells = len(z_nk)
    if _is_for_loops(decoder, n_cells):
        from ldvae_ext.kernels import decoding

        n_pieces = max(1, min(threads(), n_cells))
        parts_ipg = np.zeros((n_pieces, *total_pg.shape))
        over_rows(
            decoding.decode_groups,
            n_pieces,
            np.arange(n_pieces + 1) * n_cells // n_pieces,
            plain(z_nk, np.float64),
            decoder._tables.weight_kg,
            *logit_offsets(decoder, batch_n, design_nc),
            plain(library_n, np.float64),
            plain(group_n, np.int64),
            parts_ipg,
        )
        total_pg += parts_ipg.sum(axis=0)
        return
    for at, rate_ng in _rates(decoder, z_nk, batch_n, design_nc, library_n):
        for p in np.unique(group_n[at][group_n[at] >= 0]):
            total_pg[p] += rate_ng[group_n[at] == p].sum(axis=0)


def _is_for_loops(decoder: AffineDecoder, n_cells: int) -> bool:
    """True if compiled loops can decode, and are worth the second that it takes to load them."""
    return is_compiled() and decoder.link == "softmax" and n_cells * len(decoder.genes) >= _FEW


def logit_offsets(
    decoder: AffineDecoder, batch_n: np.ndarray, design_nc: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits at z = 0, and each cell's row of them."""
    intercept_bg = decoder._tables.intercept_bg
    if design_nc is None or decoder.covariate_cg is None:
        return intercept_bg, plain(batch_n, np.int64)
    return plain(intercept_bg[batch_n] + design_nc @ decoder.covariate_cg, np.float64), np.arange(len(batch_n))


def _rates(
    decoder: AffineDecoder, z_nk: np.ndarray, batch_n: np.ndarray, design_nc: np.ndarray | None, library_n: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """``library * scale`` by numpy, for some cells at a time."""
    n_rows = max(1, _BLOCK // len(decoder.genes))
    for start in range(0, len(z_nk), n_rows):
        at = slice(start, start + n_rows)
        logits_ng = z_nk[at] @ decoder.weight_gk.T
        logits_ng += decoder.intercept_bg[batch_n[at]]
        if design_nc is not None and decoder.covariate_cg is not None:
            logits_ng += design_nc[at] @ decoder.covariate_cg
        rate_ng = decoder.apply_link(logits_ng)
        rate_ng *= library_n[at, None]
        yield at, rate_ng
