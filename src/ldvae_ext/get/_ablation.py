"""Ablations summarised by group."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import issparse
from scipy.stats import false_discovery_control, wilcoxon

from ldvae_ext._formats import ABLATION, check_format
from ldvae_ext._groups import groups_of
from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._validate import check_one_of, factor_indices

ALTERNATIVES = ("two-sided", "greater", "less")


def ablation_df(
    ablation: AnnData,
    groupby: str | None = None,
    *,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    min_effect: float = 0.0,
) -> pd.DataFrame:
    """Effect of each latent in each group of cells, with a test.

    Parameters
    ----------
    ablation
        Cells x latents, from :meth:`ldvae_ext.model.LDVAE.ablate` or :func:`ldvae_ext.tl.ablate`.
    groupby
        Categorical column of its ``obs``; cells without a value and groups without cells are left out. All cells are one
        group, ``"all"``, if None.
    alternative
        Alternative hypothesis: effects are not symmetric around 0 (``"two-sided"``), latents improve the likelihood
        (``"greater"``) or make it worse (``"less"``).
    min_effect
        For one-sided tests: the effect, in nats per cell, that a latent must exceed to matter.

    Returns
    -------
    One row for each group and latent:

    * ``group``, ``factor``, ``n_cells`` (those with an effect);
    * ``mean`` and ``median`` change of the negative log-likelihood, in nats per cell; positive: the latent helps;
    * ``share_helped``: the share of cells where it is positive;
    * ``effect_size``: mean divided by standard deviation over cells (Cohen's d of paired differences);
    * ``p_value``: Wilcoxon's signed-rank test over the cells of the group (:func:`scipy.stats.wilcoxon`);
    * ``q_value``: the same after Benjamini & Hochberg (1995) over all rows of the table.

    The last three are NaN for a group of one cell or of identical values. With hundreds of cells the test finds effects that
    do not matter, such as the hundredth of a nat of a latent that is hardly used: look at the size, or name a
    ``min_effect``. On training cells, the effect of a latent includes fitted noise;
    ``ablate(indices=model.validation_indices)`` measures it on other cells.

    Raises
    ------
    KeyError
        If ``groupby`` is no column.
    ValueError
        If no cell has a group, or the ablation is one of genes.

    Examples
    --------
    >>> table = ldvae_ext.get.ablation_df(ablation, "bulk_labels")
    >>> table.columns.tolist()
    ['group', 'factor', 'n_cells', 'mean', 'median', 'share_helped', 'effect_size', 'p_value', 'q_value']
    >>> len(table)  # ten populations, five latents
    50
    """
    check_one_of("alternative", alternative, ALTERNATIVES)
    if (
        isinstance(min_effect, bool)
        or not isinstance(min_effect, (int, float, np.number))
        or not 0 <= min_effect < np.inf
    ):
        msg = f"`min_effect` must be a finite number of at least 0; got {min_effect!r}."
        raise ValueError(msg)
    if min_effect and alternative == "two-sided":
        msg = "`min_effect` belongs to a one-sided test: `alternative='greater'` or `'less'`."
        raise ValueError(msg)
    shift = -min_effect if alternative == "less" else min_effect
    if not isinstance(ablation, AnnData) or issparse(ablation.X):
        msg = f"`ablation` must be a result of `ablate`, not the data or the model; got {type(ablation).__name__}."
        raise TypeError(msg)
    if _is_of_genes(ablation):
        msg = "`ablation` is one of genes; `get.gene_ablation_df` reads it."
        raise ValueError(msg)
    groups, code_n = (
        (["all"], np.zeros(ablation.n_obs, dtype=np.int64)) if groupby is None else groups_of(ablation.obs, groupby)
    )
    effect_nk = np.asarray(ablation.X, dtype=np.float64)
    tables = []
    for p, group in enumerate(groups):
        cells = effect_nk[code_n == p]
        tables.append(
            pd.DataFrame(
                {
                    "group": group,
                    "factor": ablation.var_names.astype(str),
                    **pd.DataFrame([_paired(column, alternative, shift) for column in cells.T], columns=_COLUMNS),
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    table["n_cells"] = table["n_cells"].astype(np.int64)
    is_tested = table["p_value"].notna()
    table["q_value"] = np.nan
    if is_tested.any():
        table.loc[is_tested, "q_value"] = false_discovery_control(table.loc[is_tested, "p_value"])
    return table


def _is_of_genes(ablation: AnnData) -> bool:
    info = ablation.uns.get(ABLATION_INFO, {})
    check_format(f"`ablation.uns[{ABLATION_INFO!r}]`", info.get("format"), ABLATION)
    return info.get("of") == "genes"


_COLUMNS = ["n_cells", "mean", "median", "share_helped", "effect_size", "p_value"]


def _paired(effect_n: np.ndarray, alternative: str, shift: float) -> tuple[float, ...]:
    """The columns of one group and latent."""
    effect_n = effect_n[~np.isnan(effect_n)]
    n_cells = len(effect_n)
    if n_cells == 0:
        return (0, *[np.nan] * 5)
    size = p_value = np.nan
    varies = effect_n.min() < effect_n.max()
    with np.errstate(invalid="ignore"):  # infinite effects have no deviation, and may have no mean
        mean, median = effect_n.mean(), np.median(effect_n)
        if varies:
            size = mean / effect_n.std(ddof=1)
    if varies:
        with warnings.catch_warnings():
            # With ties and zeros among few cells scipy uses the normal approximation, with a warning.
            warnings.simplefilter("ignore", UserWarning)
            p_value = wilcoxon(effect_n - shift, alternative=alternative).pvalue
    return n_cells, mean, median, (effect_n > 0).mean(), size, p_value


def gene_ablation_df(ablation: AnnData, factor: Any = None) -> pd.DataFrame:
    """Contribution of each gene to the effect of each latent, by group.

    Parameters
    ----------
    ablation
        (Groups x genes) x latents, from :meth:`ldvae_ext.model.LDVAE.ablate_genes` or :func:`ldvae_ext.tl.ablate_genes`.
    factor
        One column or several, by name or position; all of them if None.

    Returns
    -------
    One row for each group, latent and gene: ``group``, ``factor``, ``gene``, ``n_cells``, ``mean`` (change of the negative
    log-likelihood of the gene's counts, nats per cell; positive: the latent improves the fit) and ``share``, its part in
    the whole effect of the latent in the group (NaN if that is 0).

    Raises
    ------
    ValueError
        If the ablation is not one of genes.

    Examples
    --------
    >>> genes = ldvae_ext.tl.ablate_genes(adata, "bulk_labels")
    >>> table = ldvae_ext.get.gene_ablation_df(genes, factor=0)
    >>> table.columns.tolist()
    ['group', 'factor', 'gene', 'n_cells', 'mean', 'share']
    """
    if not isinstance(ablation, AnnData):
        msg = f"`ablation` must be a result of `ablate_genes`; got {type(ablation).__name__}."
        raise TypeError(msg)
    if not _is_of_genes(ablation):
        msg = "`ablation` must come from `ablate_genes`; `get.ablation_df` reads one of cells."
        raise ValueError(msg)
    chosen = factor_indices(factor, ablation.var_names.astype(str).tolist(), argument="factor")
    effect_rk = np.asarray(ablation.X, dtype=np.float64)[:, chosen]
    code_r, groups = pd.factorize(pd.Series(ablation.obs["group"]).astype(str))
    whole_pk = np.stack([np.bincount(code_r, effect_k, len(groups)) for effect_k in effect_rk.T], axis=1)
    share_rk = np.divide(effect_rk, whole_pk[code_r], out=np.full_like(effect_rk, np.nan), where=whole_pk[code_r] != 0)
    # Rows of a group are together, then those of a factor.
    row, column = (at.ravel() for at in np.indices(effect_rk.shape))
    order = np.lexsort((row, column, code_r[row]))
    row, column = row[order], column[order]
    return pd.DataFrame(
        {
            "group": np.asarray(groups, dtype=object)[code_r[row]],
            "factor": ablation.var_names.astype(str).to_numpy()[chosen][column],
            "gene": ablation.obs["gene"].astype(str).to_numpy()[row],
            "n_cells": ablation.obs["n_cells"].to_numpy()[row],
            "mean": effect_rk[row, column],
            "share": share_rk[row, column],
        }
    )
