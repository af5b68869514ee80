from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from ldvae_ext import get, tl
from tests.tl.helpers import GROUPS, latents

COLUMNS = ["group", "factor", "score", "mean_difference", "auroc", "sign", "p_value", "q_value"]


@pytest.fixture
def ranked():
    adata = latents()
    tl.rank_factors_groups(adata, "population")
    return adata


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop")  # in scanpy's reader
@pytest.mark.parametrize("form", ["memory", "h5ad", "zarr"])
def test_the_table_is_that_of_scanpy_with_names_that_say_what_is_in_it(ranked, tmp_path, form):
    if form == "h5ad":
        ranked.write_h5ad(tmp_path / "a.h5ad")
        ranked = ad.read_h5ad(tmp_path / "a.h5ad")
    if form == "zarr":
        ranked.write_zarr(tmp_path / "a.zarr")
        ranked = ad.read_zarr(tmp_path / "a.zarr")
    table = get.rank_factors_groups_df(ranked)
    assert table.columns.tolist() == COLUMNS
    assert table["group"].tolist() == np.repeat(GROUPS, 5).tolist()
    for group in GROUPS:
        rows = table[table["group"] == group].reset_index(drop=True)
        own = sc.get.rank_genes_groups_df(ranked, group, key="rank_factors_groups")
        for ours, theirs in zip(
            ["factor", "score", "mean_difference", "p_value", "q_value"],
            ["names", "scores", "logfoldchanges", "pvals", "pvals_adj"],
            strict=True,
        ):
            assert rows[ours].tolist() == own[theirs].tolist()
        z_nk, in_n = ranked.obsm["X_ldvae"].astype(float), (ranked.obs["population"] == group).to_numpy()
        names = ranked.uns["ldvae"]["names"].tolist()
        for _, row in rows.iterrows():
            x, y = (z_nk[cells, names.index(row["factor"])] for cells in (in_n, ~in_n))
            assert row["sign"] == (1 if x.mean() > y.mean() else -1)
            assert row["auroc"] == pytest.approx((x[:, None] > y).mean())


def test_groups_are_given_in_the_order_asked_for(ranked):
    whole = get.rank_factors_groups_df(ranked)
    one = get.rank_factors_groups_df(ranked, GROUPS[0])
    pd.testing.assert_frame_equal(one, whole[whole["group"] == GROUPS[0]])
    two = get.rank_factors_groups_df(ranked, ["B", GROUPS[0]])
    assert two["group"].tolist() == ["B"] * 5 + [GROUPS[0]] * 5


def test_a_regression_has_no_p_values(ranked):
    tl.rank_factors_groups(ranked, "population", method="logreg", key_added="regression")
    table = get.rank_factors_groups_df(ranked, key="regression")
    assert table.columns.tolist() == COLUMNS
    assert table[["p_value", "q_value"]].isna().all(axis=None)
    assert table.drop(columns=["p_value", "q_value"]).notna().all(axis=None)
    assert len(table) == 15


def test_nothing_is_written(ranked):
    before = ranked.copy()
    table = get.rank_factors_groups_df(ranked, GROUPS[0])
    table.loc[:, ["score", "auroc"]] = 0
    for field in ("names", "scores", "auroc"):
        entry, expected = (each.uns["rank_factors_groups"][field] for each in (ranked, before))
        assert entry.tolist() == expected.tolist()


def test_bad_input_is_named(ranked):
    with pytest.raises(KeyError, match=r"No ranking 'other' in `adata.uns`, which has 'ldvae', 'rank_factors_groups'"):
        get.rank_factors_groups_df(ranked, key="other")
    genes = ad.AnnData(np.abs(ranked.obsm["X_ldvae"]), obs=ranked.obs)
    sc.tl.rank_genes_groups(genes, "population", method="wilcoxon")
    with pytest.raises(KeyError, match=r"'rank_genes_groups'.* not written by `tl.rank_factors_groups`"):
        get.rank_factors_groups_df(genes, key="rank_genes_groups")
    with pytest.raises(ValueError, match=r"`group`: 'T' .* has 'CD4\+/CD25 T Reg', 'B'"):
        get.rank_factors_groups_df(ranked, ["B", "T"])
    with pytest.raises(ValueError, match="`group` must name at least one"):
        get.rank_factors_groups_df(ranked, [])
