"""Ranking of factors that distinguish groups of cells."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import rankdata

from ldvae_ext._formats import RANKING
from ldvae_ext._groups import groups_of
from ldvae_ext._keys import DEFAULT_KEY, GROUPS_INFO
from ldvae_ext._validate import check_one_of, given_names, listed
from ldvae_ext.core._arrays import strings
from ldvae_ext.core.cells import indicator
from ldvae_ext.get._export import check_no_export, export_mark, export_of, latents_of

METHODS = ("wilcoxon", "t-test", "t-test_overestim_var", "logreg")
CORRECTIONS = ("benjamini-hochberg", "bonferroni")
REST = "rest"
# Fields of the entry, with scanpy's types for the fields that scanpy writes, too.
FIELDS = {
    "names": "O",
    "scores": "f4",
    "logfoldchanges": "f4",
    "auroc": "f8",
    "pvals": "f8",
    "pvals_adj": "f8",
}


def rank_factors_groups(
    adata: AnnData,
    groupby: str,
    *,
    method: Literal["wilcoxon", "t-test", "t-test_overestim_var", "logreg"] = "wilcoxon",
    groups: Literal["all"] | Iterable[Any] = "all",
    reference: Any = REST,
    corr_method: Literal["benjamini-hochberg", "bonferroni"] = "benjamini-hochberg",
    rankby_abs: bool = True,
    key: str = DEFAULT_KEY,
    key_added: str = GROUPS_INFO,
    copy: bool = False,
) -> AnnData | None:
    """Rank the factors that distinguish groups of cells, by the tests of :func:`scanpy.tl.rank_genes_groups`.

    The posterior means of each factor in the cells of a group are compared with those in all other cells, or in a
    reference group. The tests are scanpy's, applied to latents instead of expression. The difference of means replaces
    scanpy's logarithm of a ratio, which does not exist for negative latents.

    Cells are not independent observations of a group, and groups are often computed from the same latents. P-values
    therefore carry little information about other samples. The AUROC does not grow with the number of cells, and is the
    better guide.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.LDVAE.export_to_anndata` wrote to.
    groupby
        Column of ``obs`` with the groups. Cells without a value and groups without cells are left out. Groups are named by
        their labels as strings.
    method
        ``"wilcoxon"``: rank-sum test, z-score. ``"t-test"``: Welch's. ``"t-test_overestim_var"``: the same, with the
        variance of the mean of the other cells computed as if there were only as many of them as cells of the group.
        ``"logreg"``: coefficients of a logistic regression of the groups on all factors, per unit of latent, without
        p-values.
    groups
        Groups to rank factors for, in this order; ``"all"`` for all groups, in the order of the categories. Cells of other
        groups are part of the rest, except under ``"logreg"``, which compares only the given groups.
    reference
        Cells that each group is compared with: ``"rest"`` (all other cells that have a group) or the label of a group.
    corr_method
        Correction of p-values, over the factors of a group. Not used by ``"logreg"``, which has no p-values.
    rankby_abs
        True to rank by the absolute score, since the sign of a factor is arbitrary; False to rank by the score. Scores
        keep their sign in both cases.
    key
        ``key_added`` of the export.
    key_added
        Key of ``uns`` to write to.
    copy
        True to return a copy of ``adata`` with the result and leave ``adata`` unchanged.

    Returns
    -------
    The copy if ``copy``, else None.

    Raises
    ------
    KeyError
        If there is no such export or column.
    ValueError
        If a group or the reference does not exist, if one of them, or the rest of a group, has fewer than two cells, if
        ``"logreg"`` is given a reference, or if labels are empty or equal as strings. Nothing is written.

    Notes
    -----
    Writes ``uns["rank_factors_groups"]``, which :func:`scanpy.get.rank_genes_groups_df` and
    :func:`scanpy.pl.rank_genes_groups` read with ``key="rank_factors_groups"``. The first six are record arrays with a
    field for each group and a row for each factor, best first:

    * ``names``: names of the factors (``"Z_3"``);
    * ``scores``: z-score, t-statistic or coefficient, float32; positive: higher in the group;
    * ``logfoldchanges``: mean in the group minus mean in the compared cells, float32, in units of the latent;
    * ``auroc``: area under the ROC curve of the factor, float64 in [0, 1]: share of pairs of a cell in the group and a
      compared cell in which the cell in the group has the higher latent; ties count half;
    * ``pvals``, ``pvals_adj``: two-sided p-values, and corrected p-values, float64; not with ``"logreg"``;
    * ``factors``: names of all factors in the exported order;
    * ``params``: ``groupby``, ``reference``, ``method``, ``corr_method``, ``key`` and ``use_raw`` (False; scanpy's readers
      need it).

    Examples
    --------
    >>> ldvae_ext.tl.rank_factors_groups(adata, "bulk_labels")
    >>> table = ldvae_ext.get.rank_factors_groups_df(adata, "CD14+ Monocyte")
    >>> table["score"].abs().is_monotonic_decreasing
    True
    """
    keys, info = export_of(adata, key)
    check_one_of("method", method, METHODS)
    check_one_of("corr_method", corr_method, CORRECTIONS)
    check_no_export(adata, key_added)
    reference = str(reference)
    if method == "logreg" and reference != REST:
        msg = f"`reference` must be 'rest' for `method='logreg'`, which compares `groups` with each other; got {reference!r}."
        raise ValueError(msg)
    names, code_n = groups_of(adata.obs, groupby)
    label_n = pd.Categorical.from_codes(code_n, pd.Index(names, dtype=object))
    chosen = _chosen(groups, reference, label_n.categories.tolist(), groupby)
    used_n = np.asarray(label_n.isin(chosen) if method == "logreg" else label_n.notna())
    label_n = label_n[used_n]
    _check_enough_cells(label_n, chosen, reference)
    # In double precision, so that means of many cells are exact.
    z_nk = latents_of(adata, key)[used_n].astype(np.float64)
    if not np.isfinite(z_nk).all():
        msg = f"{np.count_nonzero(~np.isfinite(z_nk))} of {z_nk.size} values of `adata.obsm[{keys.latent!r}]` are not finite."
        raise ValueError(msg)

    factors = strings(info["names"])
    params = {"groupby": groupby, "method": method, "reference": reference, "corr_method": corr_method}
    ranked = _scanpy_ranking(z_nk, label_n, factors, chosen, rankby_abs=rankby_abs, **params)
    effects = _effects(z_nk, label_n, chosen, reference)
    tables = [_table(ranked, factors, group, *effects[group]) for group in chosen]
    if method == "logreg" and len(chosen) == 2:
        tables = [_with_signs_of_group(table, rankby_abs=rankby_abs) for table in tables]
    adata = adata.copy() if copy else adata
    adata.uns[key_added] = {
        **{
            field: np.rec.fromarrays([table[field] for table in tables], dtype=[(group, kind) for group in chosen])
            for field, kind in FIELDS.items()
            if field in tables[0]
        },
        "factors": factors,
        "params": {"format": RANKING, **params, "use_raw": False, "key": key, "export": export_mark(info)},
    }
    return adata if copy else None


def _chosen(groups: Any, reference: str, known: list[str], groupby: str) -> list[str]:
    """Groups to rank factors for."""
    if reference not in (REST, *known):
        msg = f"`reference` must be 'rest' or a group of {groupby!r}, which has {listed(known, 50)}; got {reference!r}."
        raise ValueError(msg)
    chosen = (
        known if isinstance(groups, str) and groups == "all" else list(dict.fromkeys(given_names("groups", groups)))
    )
    unknown = [group for group in chosen if group not in known]
    if unknown:
        msg = f"`groups`: {listed(unknown)} not among the groups of {groupby!r}, which has {listed(known, 50)}."
        raise ValueError(msg)
    # A group may be called "rest".
    chosen = [group for group in chosen if reference == REST or group != reference]
    if not chosen:
        msg = f"`groups` leaves no group to compare with {reference!r}; got {groups!r}."
        raise ValueError(msg)
    return chosen


def _check_enough_cells(label_n: pd.Categorical, chosen: list[str], reference: str) -> None:
    """Raise unless each side of each comparison has at least two cells, which a variance needs."""
    n_cells = pd.Series(label_n).value_counts()
    for group in chosen if reference == REST else (*chosen, reference):
        if n_cells[group] < 2:
            msg = f"`groupby`: {group!r} has fewer than 2 cells. Choose other `groups`, or set its cells to NaN."
            raise ValueError(msg)
        if reference == REST and len(label_n) - n_cells[group] < 2:
            msg = f"`groupby`: there are fewer than 2 cells to compare {group!r} with."
            raise ValueError(msg)


def _scanpy_ranking(
    z_nk: np.ndarray,
    label_n: pd.Categorical,
    factors: np.ndarray,
    chosen: list[str],
    *,
    groupby: str,
    **options: Any,
) -> dict[str, Any]:
    """Entry that scanpy writes to ``uns``."""
    import scanpy as sc

    obs = pd.DataFrame({groupby: label_n}, index=pd.RangeIndex(len(label_n)).astype(str))
    cells = AnnData(z_nk, obs=obs, var=pd.DataFrame(index=factors))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # scanpy warns about log-ratios, which are replaced here, and about the columns of its table for many groups.
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)
        sc.tl.rank_genes_groups(cells, groupby, groups=chosen, key_added=GROUPS_INFO, **options)
    return cells.uns[GROUPS_INFO]


def _effects(
    z_nk: np.ndarray, label_n: pd.Categorical, chosen: list[str], reference: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Difference of means and AUROC of each group, by factor."""
    code_n = np.asarray(label_n.codes, dtype=np.int64)
    names = label_n.categories.tolist()
    at = np.array([names.index(group) for group in chosen])
    in_pn = indicator(code_n, len(names))
    n_p = np.bincount(code_n[code_n >= 0], minlength=len(names))
    sum_pk = in_pn @ z_nk
    if reference == REST:
        # A group and its rest are always all cells, so ranks are computed once.
        n_other_p = n_p.sum() - n_p
        other_pk, rank_pk = (sum_pk.sum(axis=0) - sum_pk) / n_other_p[:, None], in_pn @ rankdata(z_nk, axis=0)
    else:
        order = np.argsort(code_n, kind="stable")
        cells_of = np.split(order, np.cumsum(np.bincount(code_n + 1, minlength=len(names) + 1)))[1:]
        against = names.index(reference)
        other_ik = z_nk[cells_of[against]]
        n_other_p = np.full(len(names), len(other_ik))
        other_pk, rank_pk = np.tile(other_ik.mean(axis=0), (len(names), 1)), np.zeros_like(sum_pk)
        for p in at:
            both = np.concatenate([z_nk[cells_of[p]], other_ik])
            rank_pk[p] = rankdata(both, axis=0)[: n_p[p]].sum(axis=0)
    with np.errstate(invalid="ignore"):  # groups whose cells are left out, which are not chosen
        difference_pk = sum_pk / n_p[:, None] - other_pk
        # Mann & Whitney's U, as a share of the pairs.
        auroc_pk = (rank_pk - (n_p * (n_p + 1) / 2)[:, None]) / (n_p * n_other_p)[:, None]
    return {group: (difference_pk[p], auroc_pk[p]) for group, p in zip(chosen, at, strict=True)}


def _table(
    ranked: dict[str, Any], factors: np.ndarray, group: str, difference_k: np.ndarray, auroc_k: np.ndarray
) -> dict[str, np.ndarray]:
    """Fields of a group, best factor first."""
    tested = ranked["names"].dtype.names
    # For two groups, scanpy writes their single regression under the first.
    source = group if group in tested else tested[0]
    table = {field: np.asarray(ranked[field][source]) for field in FIELDS if field in ranked}
    order = pd.Index(factors).get_indexer(table["names"])
    return table | {"logfoldchanges": difference_k[order], "auroc": auroc_k[order]}


def _with_signs_of_group(table: dict[str, np.ndarray], *, rankby_abs: bool) -> dict[str, np.ndarray]:
    """Regression between two groups with signs for this group; scanpy may give the signs for the other one.

    The likelihood is concave, and its gradient at coefficients of 0 is proportional to the difference of means. The
    product of this gradient with the coefficients is therefore positive for the group that they belong to.
    """
    if table["scores"] @ table["logfoldchanges"] >= 0:
        return table
    table = table | {"scores": -table["scores"]}
    return table if rankby_abs else {field: values[::-1] for field, values in table.items()}
