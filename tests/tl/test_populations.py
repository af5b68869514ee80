from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import get, tl
from tests.helpers import counts, untrained
from tests.reference import covariate_counts, setup_arguments

KINDS = [
    {"kind": "gradient"},
    {"kind": "gradient", "scale": "expression"},
    {"kind": "contribution"},
    {"kind": "path"},
    {"kind": "path", "reference": "B"},
    {"kind": "contribution", "reference": "prior"},
    {"kind": "within"},
]
KEY = "ldvae_population_loadings"


def exported(**kwargs):
    adata = counts(n_cells=50, n_batches=3)
    adata.obs["type"] = pd.Categorical(np.resize(["B", "CD4+/CD25 T", "NK"], 50))
    adata.obs.loc["cell3", "type"] = np.nan
    model = untrained(adata, **kwargs)
    model.export_to_anndata()
    return model, adata


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_the_numbers_are_the_models_own_in_the_exported_order_and_signs(latent_distribution, kind):
    model, adata = exported(latent_distribution=latent_distribution)
    expected = model.get_population_loadings("type", **kind)
    assert tl.population_loadings(adata, "type", chunk_size=7, **kind) is None
    table = get.population_loadings_df(adata)
    factors = get.factors(adata)
    names = list(dict.fromkeys(table["factor"]))
    if kind["kind"] != "within":
        assert names[: model.n_latent] == factors.index.tolist()
    assert list(dict.fromkeys(table["group"])) == list(expected)
    for group, loadings in expected.items():
        for name in names:
            got = table[(table["group"] == group) & (table["factor"] == name)].set_index("gene")["value"]
            # Only a slope knows which way a factor points.
            sign = factors["sign"].get(name, 1) if kind["kind"] == "gradient" else 1
            largest = loadings.abs().max().max()
            np.testing.assert_allclose(got, sign * loadings[name], atol=1e-6 * max(1, largest))


def test_what_is_written_goes_through_files_with_a_slash_in_a_group(tmp_path):
    model, adata = exported()
    for kind in ({"kind": "within"}, {"kind": "path"}):
        tl.population_loadings(adata, "type", **kind)
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata.write_zarr(tmp_path / "a.zarr")
        for back in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
            pd.testing.assert_frame_equal(get.population_loadings_df(back), get.population_loadings_df(adata))
            assert back.varm[KEY].shape == (adata.n_vars, len(back.uns[KEY]["names"]), 3)
            assert back.uns[KEY]["n_cells"].sum() == 49
            if kind["kind"] == "within":
                pd.testing.assert_frame_equal(get.population_directions_df(back), get.population_directions_df(adata))
    expected = model.get_population_directions("type")
    tl.population_loadings(adata, "type", "within", key_added="inside")
    got = get.population_directions_df(adata, key="inside")
    index = ["group", "direction", "factor"]
    np.testing.assert_allclose(
        got.set_index(index).sort_index()[["share", "variance", "variance_share"]],
        expected.set_index(index).sort_index()[["share", "variance", "variance_share"]],
        atol=1e-6,
        rtol=1e-6,
    )


def test_genes_that_the_model_does_not_know_are_left_out_and_counts_are_not_needed():
    model, adata = exported()
    more = ad.AnnData(obs=adata.obs, var=pd.DataFrame(index=["new", *adata.var_names[::-1]]))
    with pytest.warns(UserWarning, match="by their names only"):
        model.export_to_anndata(more)
    tl.population_loadings(more, "type", "contribution")
    assert np.isnan(more.varm[KEY][0]).all()
    table = get.population_loadings_df(more, "Z_1", "B").set_index("gene")["value"]
    assert "new" not in table.index
    expected = model.get_population_loadings("type", "contribution")["B"]["Z_1"]
    np.testing.assert_allclose(table[expected.index], expected, atol=1e-5)
    assert "new" not in set(get.top_genes(more, "Z_1", "B", n=30)["gene"])


def test_a_copy_is_written_to_if_asked_for():
    _, adata = exported()
    copy = tl.population_loadings(adata, "type", copy=True)
    assert KEY in copy.varm
    assert KEY not in adata.varm
    assert KEY not in adata.uns


def test_conditions_are_compared_inside_the_named_cells():
    model, adata = exported()
    inside = (adata.obs["batch"] != "b1").to_numpy()
    expected = model.get_population_loadings("type", "path", indices=inside, reference="B")["NK"]
    for indices in (inside, np.random.default_rng(0).permutation(np.flatnonzero(inside))):
        tl.population_loadings(adata, "type", "path", indices=indices, reference="B", chunk_size=7)
        table = get.population_loadings_df(adata, group="NK").drop_duplicates("gene").set_index("gene")
        np.testing.assert_allclose(table["total"], expected.to_numpy().sum(axis=1), atol=1e-5)
        assert adata.uns[KEY]["n_cells"].sum() < inside.sum()


def test_covariates_are_read_from_obs():
    adata = covariate_counts(n_batches=2)
    model = untrained(adata, setup=setup_arguments("both"))
    model.export_to_anndata()
    tl.population_loadings(adata, "type", "path")
    expected = model.get_population_loadings("type", "path")["T/NK"]
    table = get.population_loadings_df(adata, "batch", "T/NK").set_index("gene")["value"]
    np.testing.assert_allclose(table, expected["batch"], atol=1e-6)


def test_top_genes_of_a_population_are_those_of_its_loadings():
    _, adata = exported()
    tl.population_loadings(adata, "type", scale="expression")
    table = get.population_loadings_df(adata, "Z_2", "NK").set_index("gene")["value"]
    top = get.top_genes(adata, "Z_2", "NK", n=3)
    assert top.columns.tolist() == ["group", "factor", "direction", "rank", "gene", "value"]
    assert top.query("direction == 'up'")["gene"].tolist() == table.nlargest(3).index.tolist()
    assert top.query("direction == 'down'")["gene"].tolist() == table.nsmallest(3).index.tolist()
    np.testing.assert_allclose(top["value"], table[top["gene"]])
    assert set(get.top_genes(adata, group=["B", "NK"])["group"]) == {"B", "NK"}
    tl.population_loadings(adata, "type", "path", key_added="path")
    total = get.population_loadings_df(adata, group="NK", key="path").drop_duplicates("gene").set_index("gene")["total"]
    ranked = get.top_genes(adata, "total", "NK", n=3, key="path")
    assert ranked.query("direction == 'up'")["gene"].tolist() == total.nlargest(3).index.tolist()
    np.testing.assert_allclose(ranked["value"], total[ranked["gene"]], rtol=1e-6)
    tl.population_loadings(adata, "type", "within", key_added="inside")
    assert set(get.top_genes(adata, "D_0", "B", key="inside")["factor"]) == {"D_0"}


def test_bad_input_is_named_and_nothing_is_written():
    _, adata = exported()
    with pytest.raises(KeyError, match=r"No population loadings .* `ldvae_ext.tl.population_loadings` writes them"):
        get.population_loadings_df(adata)
    for arguments, error, message in (
        ({"groupby": "cluster"}, KeyError, "'cluster' is not a column"),
        ({"groupby": "type", "kind": "x"}, ValueError, "`kind` must be one of"),
        ({"groupby": "type", "key": "x"}, KeyError, "No export 'x'"),
        ({"groupby": "type", "key_added": "a/b"}, ValueError, "without '/'"),
        ({"groupby": "type", "chunk_size": 0}, ValueError, "`chunk_size`"),
        ({"groupby": "type", "key_added": "ldvae"}, ValueError, "belongs to the export 'ldvae'"),
        ({"groupby": "type", "key_added": "ldvae_loadings"}, ValueError, "belongs to the export 'ldvae'"),
    ):
        with pytest.raises(error, match=message):
            tl.population_loadings(adata, **arguments)
    assert KEY not in adata.uns
    tl.population_loadings(adata, "type")
    with pytest.raises(ValueError, match="`group` must name at least one"):
        get.population_loadings_df(adata, None, [])
    renamed = adata.copy()
    renamed.var_names = [f"x{name}" for name in adata.var_names]
    with pytest.raises(ValueError, match="has none of its genes"):
        tl.population_loadings(renamed, "type")
    with pytest.raises(ValueError, match="`group` must be one of 'B', 'CD4"):
        get.population_loadings_df(adata, None, "T")
    with pytest.raises(ValueError, match="'D_0' is no latent"):
        get.population_loadings_df(adata, "D_0")
    with pytest.raises(ValueError, match="only kind 'within' has directions"):
        get.population_directions_df(adata)
    with pytest.raises(ValueError, match="`rank_by` ranks by the decoder; with `group`"):
        get.top_genes(adata, "Z_0", "B", rank_by="loading")


def test_results_of_an_earlier_export_warn_when_they_are_read_beside_another(tmp_path):
    model, adata = exported()
    model.rotate("varimax")
    model.export_to_anndata()
    tl.population_loadings(adata, "type")
    tl.rank_factors_groups(adata, "type")
    fewer = adata[:, :8].copy()
    fewer.write_h5ad(tmp_path / "a.h5ad")
    for same in (adata, fewer, ad.read_h5ad(tmp_path / "a.h5ad")):
        get.population_loadings_df(same)
        get.rank_factors_groups_df(same)
    model.rotate("score-varimax")
    model.export_to_anndata()
    # The names are the same, the factors are others.
    with pytest.warns(UserWarning, match="ldvae_population_loadings.*computed from an earlier export 'ldvae'"):
        get.population_loadings_df(adata)
    with pytest.warns(UserWarning, match="rank_factors_groups.*computed from an earlier export 'ldvae'"):
        get.rank_factors_groups_df(adata)
    model.export_to_anndata(key_added="other")
    tl.population_loadings(adata, "type", key="other")
    get.population_loadings_df(adata)


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_expression_of_populations_is_the_models_own(latent_distribution):
    model, adata = exported(latent_distribution=latent_distribution)
    batches, genes = model.adata.obs["batch"].unique().tolist(), adata.var_names[[4, 2]].tolist()
    before = adata.copy()
    for arguments in (
        {},
        {"library_size": "latent", "indices": np.arange(50) % 2 == 0},
        {"transform_batch": [str(batch) for batch in batches[:2]], "gene_list": genes, "library_size": 100.0},
    ):
        got = tl.population_expression(adata, "type", chunk_size=7, **arguments)
        of_model = {**arguments, "transform_batch": batches[:2] if "transform_batch" in arguments else None}
        expected = model.get_population_expression("type", **of_model)
        pd.testing.assert_frame_equal(got, expected, rtol=1e-5, check_names=False)
    assert list(adata.uns) == list(before.uns)
    assert list(adata.varm) == list(before.varm)
    with pytest.raises(ValueError, match="`transform_batch` must name batches of the decoder"):
        tl.population_expression(adata, "type", transform_batch="nothing")
