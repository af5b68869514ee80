"""Statistics of factors by several measures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

MEASURES = (
    "kl",
    "mutual_information",
    "dimension_wise_kl",
    "total_correlation",
    "active_unit",
    "explained_deviance",
    "ablation_zero",
    "ablation_mean",
    "ablation_permute",
)

# Numbers that an ensemble has for each of its factors; the last three with disjoint halves of the cells.
STABILITY = ("reproducibility", "lowest", "kl", "scores", "top_genes", "usages")
# The least agreement of factors that replicate.
MIN_SCORES, MIN_USAGES = 0.8, 0.9


def replicates(table: pd.DataFrame) -> pd.Series:
    """True for factors whose gene scores and usages agree well enough to be those of the same program.

    On simulated counts the number of them is that of the programs, or off by one; see :func:`ldvae_ext.model.suggest_n_latent`.
    """
    return (table["scores"] >= MIN_SCORES) & (table["usages"] >= MIN_USAGES)


def rank_table(values: pd.DataFrame) -> pd.DataFrame:
    """Rank of each row in each column, 1 for the largest value; ties have their mean rank, NaN stays NaN."""
    ranks = rankdata(-values.to_numpy(dtype=np.float64), axis=0, nan_policy="omit")
    return pd.DataFrame(ranks, index=values.index, columns=values.columns)


def rank_agreement(values: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation between columns, over rows; NaN if a column is constant or missing."""
    return values.corr(method="spearman")


@dataclass(frozen=True, eq=False)
class FactorStats:
    """Statistics of the factors of a model, from :meth:`ldvae_ext.model.LDVAE.get_factor_stats`.

    Examples
    --------
    >>> stats = model.get_factor_stats()
    >>> stats.table().shape  # factors, measures
    (5, 9)
    >>> sorted(stats.ranks()["kl"].astype(int))
    [1, 2, 3, 4, 5]
    >>> stats.agreement().shape
    (9, 9)
    """

    factors: pd.DataFrame
    """One row for each group and factor: ``group``, ``factor``, ``n_cells``, ``kl_bits``, and the measures."""
    totals: pd.DataFrame
    """One row for each group: ``group``, ``n_cells`` (cells in the decomposition), ``kl`` of the joint posterior, and
    ``mutual_information``, ``total_correlation`` and ``dimension_wise_kl``, which add up to ``kl`` on orthogonal axes; all in
    nats."""

    def table(self, group: str | None = None) -> pd.DataFrame:
        """Measures of the factors in one group.

        Parameters
        ----------
        group
            Name of a group; the only group if None.

        Returns
        -------
        Factors x measures.

        Raises
        ------
        ValueError
            If there is no such group, or several and ``group`` is None.

        Examples
        --------
        >>> table = model.get_factor_stats("phase").table("G1")
        >>> table["kl"].idxmax()
        'Z_...'
        """
        known = self.totals["group"].tolist()
        if group is None and len(known) == 1:
            group = known[0]
        if group not in known:
            msg = f"`group` must be one of {known}; got {group!r}."
            raise ValueError(msg)
        rows = self.factors[self.factors["group"] == group]
        return rows.set_index("factor")[list(MEASURES)]

    def ranks(self, group: str | None = None) -> pd.DataFrame:
        """Rank of each factor by each measure, 1 for the largest value; factors x measures.

        Parameters
        ----------
        group
            See :meth:`table`.
        """
        return rank_table(self.table(group))

    def agreement(self, group: str | None = None) -> pd.DataFrame:
        """Spearman's rank correlation between measures, measures x measures; NaN for a measure that was not computed.

        Parameters
        ----------
        group
            See :meth:`table`.
        """
        return rank_agreement(self.table(group))
