"""What factors carry, by every measure, side by side."""

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


def rank_table(values: pd.DataFrame) -> pd.DataFrame:
    """Rank of each row in each column, 1 for the largest value; ties share their mean rank, NaN has none."""
    ranks = rankdata(-values.to_numpy(dtype=np.float64), axis=0, nan_policy="omit")
    return pd.DataFrame(ranks, index=values.index, columns=values.columns)


def rank_agreement(values: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation between columns, over rows; NaN where a column is constant or unknown."""
    return values.corr(method="spearman")


@dataclass(frozen=True, eq=False)
class FactorStats:
    """The ledger of a model's factors, from :meth:`ldvae_ext.model.LDVAE.get_factor_stats`."""

    factors: pd.DataFrame
    """One row for each group and factor: ``group``, ``factor``, ``n_cells``, ``kl_bits``, and the measures."""
    totals: pd.DataFrame
    """One row for each group: ``group``, ``n_cells`` (those that the decomposition is of), ``kl`` of the joint posterior,
    ``mutual_information``, ``total_correlation`` and ``dimension_wise_kl``, which add up to it, in nats."""

    def table(self, group: str | None = None) -> pd.DataFrame:
        """Factors x measures of one group, which need not be named if there is only one.

        Parameters
        ----------
        group
            Name of a group.
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
        """The orders by each measure, side by side: rank of each factor, 1 for the largest value; factors x measures.

        Parameters
        ----------
        group
            See :meth:`table`.
        """
        return rank_table(self.table(group))

    def agreement(self, group: str | None = None) -> pd.DataFrame:
        """Spearman's rank correlation between the orders, measures x measures; NaN for a measure that is not known.

        Parameters
        ----------
        group
            See :meth:`table`.
        """
        return rank_agreement(self.table(group))
