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


@pytest.mark.parametrize("rank_by", ["information", "loading"])
def test_top_genes_are_the_ends_of_the_scores(exported, rank_by):
    scores, loadings = get.gene_scores(exported, rank_by=rank_by), get.loadings(exported)
    table = get.top_genes(exported, n=3, rank_by=rank_by)
    for factor in scores:
        ranked = scores[factor].sort_values()
        for direction, genes in (("up", ranked.index[:-4:-1]), ("down", ranked.index[:3])):
            rows = table[(table["factor"] == factor) & (table["direction"] == direction)]
            assert rows["gene"].tolist() == genes.tolist()
            assert rows["rank"].tolist() == [1, 2, 3]
            np.testing.assert_array_equal(rows["loading"], loadings.loc[genes, factor])
            if rank_by == "information":
                np.testing.assert_array_equal(rows["information"], ranked[genes])


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
    with pytest.raises(ValueError, match="`rank_by` must be one of 'information', 'loading'; got 'size'"):
        get.top_genes(exported, rank_by="size")
    with pytest.raises(ValueError, match="`factor`: 'Z_9' is no latent"):
        get.top_genes(exported, "Z_9")
    with pytest.raises(ValueError, match="`n` must be an integer of at least 1; got 0"):
        get.top_genes(exported, n=0)
    renamed = exported.copy()
    renamed.var_names = [f"ENSG{i}" for i in range(20)]
    with pytest.raises(ValueError, match="renamed since the export: 'ENSG0'"):
        get.top_genes(renamed)
    assert len(get.top_genes(renamed, n=1, rank_by="loading")) == 8
