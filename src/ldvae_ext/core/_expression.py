"""Mean expression of populations, without an array of cells x genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldvae_ext._validate import check_is_decoder, check_number, check_positive_int, listed
from ldvae_ext.core._decode import add_group_scale
from ldvae_ext.core.decoder import LinearDecoder


class GroupExpression:
    """Mean decoded expression of groups of cells: running sums over cells.

    Parameters
    ----------
    decoder
        The decoder.
    n_groups
        Number of groups.
    """

    def __init__(self, decoder: LinearDecoder, n_groups: int) -> None:
        self._decoder = decoder
        self._total_pg, self.n_p = np.zeros((n_groups, len(decoder.genes))), np.zeros(n_groups, dtype=np.int64)

    def add(
        self,
        z_nk: np.ndarray,
        batch: Any,
        group_n: np.ndarray,
        *,
        covariates: Any = None,
        library: Any = 1.0,
        share: float = 1.0,
    ) -> None:
        """Count some cells in; arguments as of :func:`population_expression`, the expression times ``share``."""
        group_n = np.asarray(group_n)
        z_nk, batch_n, design_nc, library_n = self._decoder._given(z_nk, batch, covariates, library)
        n_groups = len(self.n_p)
        if len(group_n) != len(z_nk) or (group_n.size and not -1 <= group_n.min() <= group_n.max() < n_groups):
            msg = f"`group_n` must hold a code of each of {len(z_nk)} cells, 0 to {n_groups - 1} or -1; got {group_n}."
            raise ValueError(msg)
        add_group_scale(self._decoder, self._total_pg, z_nk, batch_n, design_nc, share * library_n, group_n)

    def count(self, group_n: np.ndarray) -> None:
        """Add cells to the number of cells of each group; once for each cell, even if its expression is added in several parts."""
        self.n_p += np.bincount(group_n[group_n >= 0], minlength=len(self.n_p))

    @property
    def mean_pg(self) -> np.ndarray:
        """Shape (groups, genes), float64; NaN for a group without cells."""
        n_p1 = self.n_p[:, None]
        return np.divide(self._total_pg, n_p1, where=n_p1 > 0, out=np.full_like(self._total_pg, np.nan))


def population_expression(
    decoder: LinearDecoder,
    z_nk: Any,
    batch: Any,
    group_n: Any,
    n_groups: int,
    *,
    covariates: Any = None,
    library: Any = 1.0,
) -> np.ndarray:
    """Mean decoded expression of populations: ``library * scale``, averaged over the cells of each population.

    No array of cells x genes is made. It is not the expression at the mean latent, which differs since the link is not linear.

    Parameters
    ----------
    decoder
        The decoder.
    z_nk, batch, covariates
        Cells, see :meth:`ldvae_ext.core.LinearDecoder.scale`.
    group_n
        Population of each cell as a code from 0, shape (cells,); -1 for none.
    n_groups
        Number of populations.
    library
        Counts to scale to, one number or one for each cell.

    Returns
    -------
    Shape (populations, genes), float64; NaN for a population without cells.

    Raises
    ------
    ValueError
        If a batch, covariate or group does not exist.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, population_expression
    >>> loadings = [[0], [np.log(3)]]
    >>> decoder = LinearDecoder.from_loadings(loadings, [0, 0], genes=["a", "b"])
    >>> population_expression(decoder, [[0], [1], [1]], None, [0, 1, 1], n_groups=2)
    array([[0.5 , 0.5 ],
           [0.25, 0.75]])
    """
    check_is_decoder(decoder)
    check_positive_int("n_groups", n_groups)
    group_n = np.asarray(group_n)
    if group_n.dtype.kind not in "iu":
        msg = f"`group_n` must hold codes of populations, integers; got {listed(group_n.ravel()[:1])} of type {group_n.dtype}."
        raise ValueError(msg)
    sums, group_n = GroupExpression(decoder, n_groups), group_n.astype(np.int64)
    sums.add(z_nk, batch, group_n, covariates=covariates, library=library)
    sums.count(group_n)
    return sums.mean_pg


def check_library_size(library_size: Any) -> None:
    """Raise unless this is a number or ``"latent"``."""
    if not np.isscalar(library_size) or (isinstance(library_size, str) and library_size != "latent"):
        msg = f"`library_size` must be a number or 'latent'; got {library_size!r}."
        raise ValueError(msg)
    if not isinstance(library_size, str):
        check_number("library_size", library_size, least=0, most=float(np.finfo(np.float32).max))


def gene_positions(genes: np.ndarray, gene_list: Sequence[str] | None) -> np.ndarray:
    """Positions of the requested genes, in the model's order."""
    if gene_list is None:
        return np.arange(len(genes))
    gene_list = [gene_list] if isinstance(gene_list, str) else list(gene_list)
    unknown = sorted(set(map(str, gene_list)) - set(genes))
    if unknown:
        msg = f"`gene_list`: {listed(unknown)} not among the {len(genes)} genes of this model."
        raise ValueError(msg)
    return np.flatnonzero(np.isin(genes, [str(gene) for gene in gene_list]))
