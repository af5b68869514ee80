from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi

from ldvae_ext.core import LinearDecoder
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts, untrained
from tests.reference import covariate_counts, setup_arguments

INTERFERON = {"ISG15", "IFI6", "IFIT1", "IFIT2", "IFIT3", "ISG20", "MX1", "RSAD2", "LY6E", "TNFSF10", "CXCL10"}


def grouped(**kwargs):
    adata = counts(n_batches=3, **kwargs)
    adata.obs["type"] = pd.Categorical(np.resize(["B", "CD4+/CD25 T", "NK"], adata.n_obs))
    adata.obs.loc["cell3", "type"] = np.nan
    return adata


@pytest.fixture(scope="module")
def model():
    return untrained(grouped())


def log_share(logits_g):
    return logits_g - np.log(np.exp(logits_g).sum())


def test_a_path_splits_the_log_ratio_of_two_populations_over_factors_and_batch(model):
    adata, decoder = model.adata, model.get_decoder()
    z = model.get_latent_representation().astype(float)

    def logits(group):
        inside = (adata.obs["type"] == group).to_numpy()
        batch_share = adata.obs["batch"][inside].value_counts(normalize=True)[decoder.batches].to_numpy()
        return decoder.weight_gk @ z[inside].mean(axis=0) + batch_share @ decoder.intercept_bg

    split = model.get_population_loadings("type", "path", reference="NK")
    assert list(split) == ["B", "CD4+/CD25 T"]
    for group, table in split.items():
        assert table.columns.tolist() == [*model.latent_names, "batch"]
        assert table.index.tolist() == adata.var_names.tolist()
        expected = log_share(logits(group)) - log_share(logits("NK"))
        # As exact as the latents of the getter, which sums in another order, are known in float32.
        np.testing.assert_allclose(table.to_numpy().sum(axis=1), expected, atol=1e-6 * max(1, np.abs(z).max()))


def test_only_the_named_cells_count_and_groups_without_one_are_left_out(model):
    inside = (model.adata.obs["type"] == "B").to_numpy() | (model.adata.obs["type"] == "NK").to_numpy()
    some = model.get_population_loadings("type", "contribution", indices=inside)
    assert list(some) == ["B", "NK"]
    pair = model.get_population_loadings("type", "contribution", reference="NK")
    np.testing.assert_allclose(some["B"], pair["B"], atol=1e-5)
    np.testing.assert_allclose(some["B"], -some["NK"], atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(inside))
    np.testing.assert_allclose(
        model.get_population_loadings("type", "contribution", indices=shuffled)["B"], some["B"], atol=1e-5
    )


@pytest.mark.parametrize("kind", ["gradient", "contribution", "path", "within"])
def test_numbers_do_not_depend_on_the_minibatch_and_the_data_are_not_written_to(model, kind):
    before = model.adata.copy()
    whole, cut = (model.get_population_loadings("type", kind, batch_size=size) for size in (None, 7))
    for group, table in whole.items():
        np.testing.assert_allclose(table, cut[group], atol=1e-4 if kind == "within" else 1e-5)
    assert list(before.uns) == list(model.adata.uns)
    pd.testing.assert_frame_equal(before.obs, model.adata.obs)


def test_directions_name_the_factors_that_they_are_made_of(model):
    table = model.get_population_directions("type")
    assert table.columns.tolist() == ["group", "direction", "factor", "share", "variance", "variance_share"]
    np.testing.assert_allclose(table.groupby(["group", "direction"])["share"].sum(), 1, atol=1e-6)
    first = table.drop_duplicates(["group", "direction"])
    np.testing.assert_allclose(first.groupby("group")["variance_share"].sum(), 1)
    loadings = model.get_population_loadings("type", "within")["NK"]
    np.testing.assert_allclose(
        np.square(loadings.to_numpy()).sum(axis=0), first.loc[first["group"] == "NK", "variance"], rtol=1e-6
    )


def test_covariates_and_size_factors_are_decoded_with():
    adata = covariate_counts(n_batches=2)
    adata.obs["type"] = pd.Categorical(np.resize(["a", "b"], adata.n_obs))
    model = untrained(adata, setup=setup_arguments("both", size_factor=True))
    decoder, z = model.get_decoder(), model.get_latent_representation().astype(float)
    assert decoder.link == "softplus"
    obs = adata.obs
    offset = decoder.logits(np.zeros_like(z), obs["batch"], obs)
    ends = []
    for group in ("a", "b"):
        inside = (obs["type"] == group).to_numpy()
        ends.append(np.log(np.logaddexp(0, decoder.weight_gk @ z[inside].mean(axis=0) + offset[inside].mean(axis=0))))
    split = model.get_population_loadings("type", "path", reference="b")["a"]
    np.testing.assert_allclose(split.to_numpy().sum(axis=1), ends[0] - ends[1], atol=1e-5)
    gradient = model.get_population_loadings("type", "gradient", scale="expression")["a"]
    assert np.isfinite(gradient.to_numpy()).all()


def test_minified_data_will_do():
    adata = grouped()
    model = untrained(adata, use_observed_lib_size=True)
    before = model.get_population_loadings("type", scale="expression")
    adata.obsm["X_latent_qzm"], adata.obsm["X_latent_qzv"] = model.get_latent_representation(return_dist=True)
    model.minify_adata()
    after = model.get_population_loadings("type", scale="expression")
    for group, table in before.items():
        np.testing.assert_allclose(after[group], table, atol=1e-6)


def test_unseen_cells_have_loadings_of_their_own(model):
    unseen = grouped(n_cells=30, seed=4)
    unseen.obs_names = [f"new{i}" for i in range(30)]
    unseen.obs["type"] = pd.Categorical(["x", "y"] * 15)
    decoder: LinearDecoder = model.get_decoder()
    z = model.get_latent_representation(unseen).astype(float)
    got = model.get_population_loadings("type", "contribution", unseen, reference="y")["x"]
    weight_gk = decoder.weight_gk - decoder.weight_gk.mean(axis=0)
    np.testing.assert_allclose(got, weight_gk * (z[::2].mean(axis=0) - z[1::2].mean(axis=0)), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"groupby": "cluster"}, KeyError, "`groupby`: 'cluster' is not a column"),
        ({"groupby": "type", "kind": "slope"}, ValueError, "`kind` must be one of"),
        (
            {"groupby": "type", "kind": "path", "reference": "T"},
            ValueError,
            "`reference` must be one of 'rest', 'prior', 'B'",
        ),
        ({"groupby": "type", "indices": []}, ValueError, "no cell has a value in 'type'"),
    ],
)
def test_bad_input_is_named(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.get_population_loadings(**arguments)


@pytest.fixture(scope="module")
def kang(real_data):
    adata = ad.read_h5ad(real_data / "kang_muscat.h5ad")
    LDVAE.setup_anndata(adata)
    scvi.settings.seed = 0
    model = LDVAE(adata, n_latent=10)
    model.train(100, kl_warmup="auto", **TRAIN)
    return model


@pytest.mark.slow
def test_interferon_genes_come_up_in_every_stimulated_cell_type_by_the_same_factors(kang):
    """Kang et al. 2018, 10.1038/nbt.4042: control against IFN-beta."""
    carriers = []
    for cell_type in kang.adata.obs["cell_type"].cat.categories:
        inside = (kang.adata.obs["cell_type"] == cell_type).to_numpy()
        split = kang.get_population_loadings("condition", "path", indices=inside, reference="ctrl")["stim"]
        total = split.T.sum().sort_values(ascending=False)
        assert len(INTERFERON & set(total.index[:10])) >= 7, cell_type
        assert {"ISG15", "IFIT1", "IFIT3"} <= set(total.index[:15]), cell_type
        assert total.index.get_loc("IFI6") < 25, cell_type
        share = split.loc[total.index[:10]].sum() / total[:10].sum()
        carriers.append(share.nlargest(2).index.tolist())
        assert share.nlargest(3).sum() > 0.5, cell_type
    assert len(set.intersection(*map(set, carriers))) >= 1


@pytest.mark.parametrize("kwargs", [{}, {"latent_distribution": "ln"}], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"library_size": "latent"}, {"library_size": 1e4, "transform_batch": ["b", "a"]}, {"gene_list": ["g3", "g1"]}],
    ids=str,
)
def test_expression_of_populations_is_the_mean_of_their_cells(kwargs, arguments):
    model = untrained(grouped(), **kwargs)
    arguments = {**arguments, **named(model, arguments)}
    whole = model.get_normalized_expression(use_posterior_mean=True, **arguments)
    expected = whole.astype(float).groupby(model.adata.obs["type"], observed=True).mean()
    for batch_size in (None, 7):
        got = model.get_population_expression("type", batch_size=batch_size, **arguments)
        assert got.index.tolist() == ["B", "CD4+/CD25 T", "NK"]
        assert got.columns.tolist() == whole.columns.tolist()
        assert (got.dtypes == np.float64).all()
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def named(model, arguments):
    """The arguments with batches and genes that the model has."""
    batches, genes = model.adata.obs["batch"].unique().tolist(), model.adata.var_names.tolist()
    return {
        **({"transform_batch": batches[:2]} if "transform_batch" in arguments else {}),
        **({"gene_list": [genes[3], genes[1]]} if "gene_list" in arguments else {}),
    }


def test_expression_of_populations_is_that_of_the_named_cells(model):
    inside = (model.adata.obs["type"] == "B").to_numpy()
    some = model.get_population_expression("type", indices=inside)
    assert some.index.tolist() == ["B"]
    np.testing.assert_allclose(some.loc["B"], model.get_population_expression("type").loc["B"], rtol=1e-5)
    with pytest.raises(KeyError, match="'nothing'"):
        model.get_population_expression("nothing")
    with pytest.raises(ValueError, match="`library_size` must be a number or 'latent'"):
        model.get_population_expression("type", library_size="observed")
