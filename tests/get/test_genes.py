from __future__ import annotations

import numpy as np
import pytest

from ldvae_ext import get
from tests.helpers import counts, untrained


@pytest.fixture(scope="module")
def exported():
    adata = counts(n_batches=3)
    untrained(adata).export_to_anndata()
    return adata


@pytest.mark.parametrize("rank_by", ["regression", "information", "loading"])
def test_top_genes_are_the_ends_of_the_scores(exported, rank_by):
    scores, loadings = get.gene_scores(exported, kind=rank_by), get.loadings(exported)
    table = get.top_genes(exported, n=3, rank_by=rank_by)
    for factor in scores:
        ranked = scores[factor].sort_values()
        for direction, genes in (("up", ranked.index[:-4:-1]), ("down", ranked.index[:3])):
            rows = table[(table["factor"] == factor) & (table["direction"] == direction)]
            assert rows["gene"].tolist() == genes.tolist()
            assert rows["rank"].tolist() == [1, 2, 3]
            np.testing.assert_array_equal(rows["loading"], loadings.loc[genes, factor])
            if rank_by != "loading":
                np.testing.assert_array_equal(rows[rank_by], ranked[genes])


def test_one_factor_by_name_or_position_and_no_gene_in_both_directions(exported):
    name = get.factors(exported).index[2]
    by_name = get.top_genes(exported, name, n=100)
    assert by_name.equals(get.top_genes(exported, 2, n=100))
    assert set(by_name["factor"]) == {name}
    assert by_name["gene"].is_unique
    assert (by_name["information"][by_name["direction"] == "up"] > 0).all()
    assert (by_name["information"][by_name["direction"] == "down"] < 0).all()


def test_scores_follow_the_genes_that_an_adata_still_has(exported):
    part = exported[:, ["gene7", "gene2", "gene11"]].copy()
    scores = get.gene_scores(part)
    np.testing.assert_array_equal(scores, get.gene_scores(exported).loc[["gene7", "gene2", "gene11"]])


def test_bad_input_is_named(exported):
    with pytest.raises(ValueError, match="`rank_by` must be one of 'regression', 'information', 'loading'; got 'size'"):
        get.top_genes(exported, rank_by="size")
    with pytest.raises(ValueError, match="`factor`: 'Z_9' is no latent"):
        get.top_genes(exported, "Z_9")
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1; got 0"):
        get.top_genes(exported, n=0)
    renamed = exported.copy()
    renamed.var_names = [f"ENSG{i}" for i in range(20)]
    with pytest.raises(ValueError, match="renamed since the export: 'ENSG0'"):
        get.top_genes(renamed, rank_by="information")
    with pytest.raises(ValueError, match="`kind` must be one of"):
        get.gene_scores(exported, kind="size")
    assert len(get.top_genes(renamed, n=1, rank_by="loading")) == 8


def test_scores_are_slopes_of_expression_on_the_exported_latents(exported):
    """With signs and order of the export; written in one pass over the cells."""
    x = exported.X.toarray().astype(float)
    expression = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    scores = get.gene_scores(exported, kind="regression")
    errors = get.gene_scores(exported, kind="regression", statistic="error")
    for k in range(scores.shape[1]):
        latent = exported.obsm["X_ldvae"][:, k].astype(float)
        for g in (0, 3, 11):
            r = np.corrcoef(expression[:, g], latent)[0, 1]
            assert scores.iloc[g, k] == pytest.approx(r, abs=1e-5)
            assert errors.iloc[g, k] == pytest.approx(np.sqrt((1 - r**2) / (len(x) - 2)), abs=1e-5)


def test_data_without_counts_have_no_slopes():
    model = untrained(counts(), use_observed_lib_size=False)
    model.export_to_anndata()
    qzm, qzv = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = qzm, qzv
    model.minify_adata()
    model.export_to_anndata()
    assert "ldvae_scores" not in model.adata.varm


def test_exports_without_slopes_say_so(exported):
    old = exported.copy()
    del old.varm["ldvae_scores"], old.varm["ldvae_scores_error"]
    with pytest.raises(KeyError, match="No 'ldvae_scores' in"):
        get.gene_scores(old, kind="regression")
