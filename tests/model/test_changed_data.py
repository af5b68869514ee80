"""Data that changed since the set-up are named by every method, and cells of other AnnData are read by name."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
from scipy import sparse

from ldvae_ext.model import LDVAE, order_latents
from tests.helpers import TRAIN, counts, untrained

# Every public method that reads the cells of a model.
READERS = {
    "get_latent_representation": lambda m, a=None: m.get_latent_representation(a),
    "get_normalized_expression": lambda m, a=None: m.get_normalized_expression(a),
    "get_normalized_expression of means": lambda m, a=None: m.get_normalized_expression(a, use_posterior_mean=True),
    "get_elbo": lambda m, a=None: m.get_elbo(a),
    "get_marginal_ll": lambda m, a=None: m.get_marginal_ll(a, n_mc_samples=2),
    "get_reconstruction_error": lambda m, a=None: m.get_reconstruction_error(a),
    "get_reconstruction_error at means": lambda m, a=None: m.get_reconstruction_error(a, use_posterior_mean=True),
    "get_latent_library_size": lambda m, a=None: m.get_latent_library_size(a),
    "get_aggregated_posterior": lambda m, a=None: m.get_aggregated_posterior(a),
    "get_likelihood_parameters": lambda m, a=None: m.get_likelihood_parameters(a),
    "get_feature_correlation_matrix": lambda m, a=None: m.get_feature_correlation_matrix(a, n_samples=2),
    "posterior_predictive_sample": lambda m, a=None: m.posterior_predictive_sample(a),
    "differential_expression": lambda m, a=None: m.differential_expression(a, groupby="type", silent=True),
    "differential_abundance": lambda m, a=None: m.differential_abundance(a, sample_key="type"),
    "get_latent_kl": lambda m, a=None: m.get_latent_kl(a),
    "ablate": lambda m, a=None: m.ablate(a),
    "ablate_genes": lambda m, a=None: m.ablate_genes("type", a),
    "get_ablated_expression": lambda m, a=None: m.get_ablated_expression(["Z_0"], adata=a),
    "get_explained_deviance": lambda m, a=None: m.get_explained_deviance(adata=a),
    "get_factor_stats": lambda m, a=None: m.get_factor_stats(adata=a),
    "get_population_loadings": lambda m, a=None: m.get_population_loadings("type", adata=a),
    "get_population_directions": lambda m, a=None: m.get_population_directions("type", adata=a),
    "get_population_expression": lambda m, a=None: m.get_population_expression("type", adata=a),
    "export_to_anndata": lambda m, a=None: m.export_to_anndata(a),
    "order_latents": lambda m, a=None: order_latents(m, a),
}
OWN = {
    "train": lambda m: m.train(1, **TRAIN),
    "rotate": lambda m: m.rotate("score-varimax"),
    "minify_adata": lambda m: m.minify_adata(),
    "a new model": lambda m: LDVAE(m.adata),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has not been trained|.*KL weight|Category .* fewer than 3 cells"),
    pytest.mark.filterwarnings(
        "ignore:.*writable|.*Sparse CSR tensor support|Transforming to str index|Training history cannot"
    ),
]


def cells(n_cells=60, **kwargs):
    adata = counts(n_cells, n_batches=2, **kwargs)
    adata.obs["type"] = pd.Categorical(np.resize(["T", "B"], n_cells))
    adata.obs["age"] = np.linspace(-1, 1, n_cells)
    return adata


@pytest.mark.grid(1)
@pytest.mark.parametrize("method", [*READERS, *OWN])
@pytest.mark.parametrize("change", ["normalised", "one count", "NaN", "negative", "other cells"])
def test_counts_that_changed_in_place_are_named(method, change):
    model = untrained(cells(), setup={"labels_key": "type"})
    x = model.adata.X.toarray()
    if change == "normalised":
        x = np.log1p(x)
    elif change == "other cells":
        x = x[::-1].copy()
    else:
        x[7, 3] = {"one count": x[7, 3] + 1, "NaN": np.nan, "negative": -1}[change]
    model.adata.X = sparse.csr_matrix(x)
    before = set(model.adata.obsm), set(model.adata.uns), set(model.adata.obs)
    read = {**READERS, **OWN}[method]
    with pytest.raises(
        ValueError, match=r"The counts in `adata.X` are no longer those of `setup_anndata`: .* cells differ"
    ):
        read(model)
    assert (set(model.adata.obsm), set(model.adata.uns), set(model.adata.obs)) == before


@pytest.mark.parametrize("fmt", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, np.asarray])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_a_change_of_one_count_is_seen_in_any_format(fmt, layer):
    adata = cells()
    x = adata.X.toarray()
    if layer is not None:
        adata.layers[layer] = x
        adata.X = None
    model = untrained(adata, setup={"layer": layer})
    assert model.get_latent_kl().shape == (60, 4)

    def put(values):
        if layer is None:
            adata.X = fmt(values)
        else:
            adata.layers[layer] = fmt(values)

    put(x)
    model.get_latent_kl()
    x[59, 19] += 1
    put(x)
    with pytest.raises(ValueError, match="1 of 60 compared cells differ, such as 'cell59'"):
        model.get_latent_kl()


@pytest.mark.parametrize("method", [*READERS, *OWN])
def test_genes_filtered_in_place_are_named(method):
    model = untrained(cells(), setup={"labels_key": "type"})
    model.adata._inplace_subset_var(np.arange(20) >= 3)
    with pytest.raises((ValueError, RuntimeError), match="`adata` had 20 genes at `setup_anndata` and has 17 now"):
        {**READERS, **OWN}[method](model)


@pytest.mark.parametrize("change", ["genes", "counts"])
def test_a_complete_copy_is_exported_although_the_models_data_changed(change):
    model = untrained(cells())
    expected = model.get_latent_representation()
    if change == "genes":
        model.adata._inplace_subset_var(np.arange(20) >= 3)
    else:
        model.adata.X = model.adata.X * 2
    model.export_to_anndata(copy := cells(), order_by="network")
    np.testing.assert_allclose(np.abs(copy.obsm["X_ldvae"]), np.abs(expected), rtol=1e-5, atol=1e-5)


def test_genes_filtered_before_the_model_are_named():
    adata = cells()
    LDVAE.setup_anndata(adata)
    adata._inplace_subset_var(np.arange(20) >= 3)
    with pytest.raises(ValueError, match="genes were filtered in place"):
        LDVAE(adata)


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_names_of_genes_that_move_without_their_counts_are_named():
    model = untrained(cells())
    loadings = model.get_loadings()
    model.adata.var.sort_index(inplace=True)  # noqa: PD002 - what is tested
    pd.testing.assert_frame_equal(model.get_loadings(), loadings)
    with pytest.raises(ValueError, match=r"`adata.var_names` are not those of `setup_anndata`"):
        model.export_to_anndata()


def test_other_names_of_all_genes_are_allowed_with_a_warning():
    model = untrained(cells())
    expected = model.get_latent_kl()
    model.adata.var_names = [f"symbol{i}" for i in range(20)]
    with pytest.warns(UserWarning, match="20 genes have other names .*'symbol0' for 'gene0'"):
        pd.testing.assert_frame_equal(model.get_latent_kl(), expected)


def test_other_names_and_fewer_cells_are_no_change():
    model = untrained(cells())
    expected = model.get_latent_representation()
    model.adata.obs_names = [f"sample1_{name}" for name in model.adata.obs_names]
    np.testing.assert_array_equal(model.get_latent_representation(), expected)
    model.adata._inplace_subset_obs(np.arange(60) % 3 > 0)
    np.testing.assert_allclose(model.get_latent_representation(), expected[np.arange(60) % 3 > 0], atol=1e-6)


def test_cells_that_were_removed_do_not_hide_a_change_of_others():
    adata = cells()
    model = untrained(adata)
    adata._inplace_subset_obs(np.arange(60) % 3 > 0)
    adata.X = adata.X * 2
    with pytest.raises(ValueError, match="40 of 40 compared cells differ"):
        model.get_latent_kl()


@pytest.mark.parametrize("second", ["type", "three"])
def test_each_model_reads_its_own_registration(second):
    adata = cells(120)
    adata.obs["three"] = np.resize(["x", "y", "z"], 120)
    alone = untrained(adata.copy(), use_observed_lib_size=True)
    first = untrained(adata, use_observed_lib_size=True)
    other = untrained(adata, setup={"batch_key": second}, use_observed_lib_size=True)
    for model in (alone, first):
        scvi.settings.seed = 1
        model.train(2, **TRAIN)
    for ours, expected in zip(first.module.parameters(), alone.module.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach(), expected.detach())
    assert other.get_latent_kl().shape == (120, 4)
    np.testing.assert_array_equal(first.get_latent_kl(), alone.get_latent_kl())


def test_a_covariate_that_changed_is_named_where_it_would_be_read():
    adata = cells()
    model = untrained(adata, setup={"continuous_covariate_keys": ["age"]})
    expected = model.ablate().X
    adata.obs["age"] *= 100
    np.testing.assert_array_equal(model.ablate().X, expected, err_msg="the registered values are a copy")
    untrained(adata, setup={"batch_key": "type"})
    with pytest.raises(ValueError, match="The registered 'extra_continuous_covs' of the cells changed"):
        model.ablate()


def test_batches_that_were_renamed_in_place_are_named_where_they_would_be_read():
    adata = cells()
    model = untrained(adata)
    expected = model.ablate().X
    adata.obs["batch"] = adata.obs["batch"].cat.rename_categories({"CD4+/CD25 T": "z", "b1": "a"})
    np.testing.assert_array_equal(model.ablate().X, expected)
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    untrained(adata, setup={"batch_key": "type"})
    with pytest.raises(ValueError, match="The registered 'batch' of the cells changed"):
        model.ablate()


@pytest.mark.parametrize("method", READERS)
def test_cells_of_another_object_are_read_by_name(method):
    LDVAE.setup_anndata(own := cells(), batch_key="batch", labels_key="type")
    model = LDVAE(own, n_latent=4)
    model.is_trained_ = True
    other = cells(30, seed=3)
    turned = other[:, ::-1].copy()
    turned.obs["batch"] = turned.obs["batch"].astype("string")
    turned.obs["type"] = turned.obs["type"].astype(object)
    columns = list(turned.obs)
    results = []
    for adata in (other, turned):
        scvi.settings.seed = 5
        results.append(READERS[method](model, adata))
    assert [c for c in turned.obs if c not in ("ldvae_library",)] == columns
    assert not any("_scvi" in key for key in (*turned.obs, *turned.uns))
    one, two = results
    if method == "export_to_anndata":
        np.testing.assert_array_equal(other.obsm["X_ldvae"], turned.obsm["X_ldvae"])
        np.testing.assert_array_equal(other.varm["ldvae_loadings"], turned.varm["ldvae_loadings"][::-1])
    elif method == "differential_abundance":
        np.testing.assert_array_equal(other.obsm["da_log_probs"], turned.obsm["da_log_probs"])
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, two)
    elif isinstance(one, ad.AnnData):
        np.testing.assert_array_equal(one.X, two.X)
    elif isinstance(one, dict):
        for key, value in one.items():
            np.testing.assert_array_equal(value, two[key])
    elif method == "get_aggregated_posterior":
        np.testing.assert_array_equal(one.component_distribution.mean, two.component_distribution.mean)
    elif method == "get_factor_stats":
        pd.testing.assert_frame_equal(one.factors, two.factors)
    elif hasattr(one, "todense"):
        np.testing.assert_array_equal(one.todense(), two.todense())
    elif hasattr(one, "to_dataframe") or hasattr(one, "to_frame"):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    else:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("method", READERS)
def test_a_missing_gene_is_named(method):
    model = untrained(cells(), setup={"labels_key": "type"})
    other = cells(30, seed=3)[:, ::-1].copy()
    other.var_names = ["renamed" if name == "gene7" else name for name in other.var_names]
    with pytest.raises(ValueError, match="`adata` lacks 1 of the 20 genes of the model: 'gene7'"):
        READERS[method](model, other)


def test_genes_with_other_names_only_are_read_by_position_with_a_warning():
    model = untrained(cells())
    other = cells(30, seed=3)
    named = other.copy()
    named.var_names = [f"symbol{i}" for i in range(20)]
    for read in (model.get_latent_representation, model.get_latent_kl):
        expected = read(other)
        with pytest.warns(UserWarning, match="same genes under other names"):
            np.testing.assert_array_equal(read(named), expected)


def test_a_saved_model_opens_with_its_genes_in_order_only(tmp_path):
    model = untrained(cells())
    model.save(tmp_path / "model")
    with (
        pytest.warns(UserWarning, match="`var_names` for the loaded `model` does not match"),
        pytest.raises(ValueError, match=r"in another order.*`adata\[:, model.get_var_names\(\)\].copy\(\)`"),
    ):
        LDVAE.load(tmp_path / "model", cells()[:, ::-1].copy(), accelerator="cpu")
    back = LDVAE.load(tmp_path / "model", cells(), accelerator="cpu")
    np.testing.assert_array_equal(back.get_latent_kl(), model.get_latent_kl())


@pytest.mark.parametrize(
    "method", ["get_latent_representation", "get_normalized_expression", "get_latent_kl", "ablate"]
)
@pytest.mark.parametrize("indices", ["mask", "nullable mask", "negative", "list", "empty", "empty mask"])
def test_indices_are_masks_or_positions_everywhere(method, indices):
    model = untrained(cells())
    chosen = np.arange(60) % 7 == 3
    given = {
        "mask": chosen,
        "nullable mask": pd.array(chosen, dtype="boolean"),
        "negative": np.flatnonzero(chosen) - 60,
        "list": np.flatnonzero(chosen).tolist(),
        "empty": [],
        "empty mask": np.zeros(60, dtype=bool),
    }[indices]
    positions = np.array([], dtype=int) if "empty" in indices else np.flatnonzero(chosen)
    scvi.settings.seed = 1
    result = getattr(model, method)(indices=given)
    scvi.settings.seed = 1
    if len(positions):
        expected = getattr(model, method)(indices=positions)
        np.testing.assert_array_equal(*(x.X if hasattr(x, "X") else np.asarray(x) for x in (result, expected)))
    else:
        assert result.shape == (0, 20 if method == "get_normalized_expression" else 4)


@pytest.mark.parametrize(
    "method", ["get_elbo", "get_marginal_ll", "get_reconstruction_error", "posterior_predictive_sample"]
)
def test_no_cells_have_no_likelihood(method):
    model = untrained(cells())
    with pytest.raises(ValueError, match=f"`indices` selects no cells, of which `{method}` has no value"):
        getattr(model, method)(indices=[])
    with pytest.raises(TypeError, match=r"`indices` must be positions \(integers\) or a mask"):
        getattr(model, method)(indices=["cell0"])


class TestGroupsOfAComparison:
    def test_a_category_without_cells_is_left_out(self):
        model = untrained(cells())
        expected = model.differential_expression(groupby="type", silent=True)
        model.adata.obs["merged"] = model.adata.obs["type"].cat.add_categories(["gone"])
        found = model.differential_expression(groupby="merged", silent=True)
        assert sorted(found["group1"].unique()) == sorted(expected["group1"].unique())
        with pytest.raises(ValueError, match="`group1` must be one of 'B', 'T'; got 'gone'"):
            model.differential_expression(groupby="merged", group1="gone", silent=True)

    def test_cells_without_a_group_are_in_the_rest(self):
        model = untrained(cells())
        model.adata.obs["type"] = model.adata.obs["type"].astype(object).where(np.arange(60) > 10)
        assert model.differential_expression(groupby="type", silent=True)["group1"].nunique() == 2
        model.adata.obs["type"] = model.adata.obs["type"].astype("string")
        with pytest.raises(ValueError, match="has no value for 11 of 60 cells"):
            model.differential_expression(groupby="type", silent=True)

    def test_a_single_group_has_nothing_to_be_compared_with(self):
        model = untrained(cells())
        model.adata.obs["one"] = pd.Categorical(["a"] * 60, categories=["a", "gone"])
        with pytest.raises(ValueError, match="has the single group 'a'"):
            model.differential_expression(groupby="one", silent=True)


class TestWhatIsNoChange:
    """Operations that move counts and registered values together."""

    def test_cells_in_another_order(self):
        model = untrained(cells())
        expected, order = model.get_latent_representation(), np.random.default_rng(0).permutation(60)
        model.adata._inplace_subset_obs(order)
        np.testing.assert_allclose(model.get_latent_representation(), expected[order], atol=1e-5)

    def test_names_of_cells_that_overlap_with_the_old_ones(self):
        model = untrained(cells())
        expected = model.get_latent_representation()
        model.adata.obs_names = [f"cell{i + 1}" for i in range(60)]
        np.testing.assert_array_equal(model.get_latent_representation(), expected)

    def test_other_names_of_some_genes(self):
        model = untrained(cells())
        expected = model.get_latent_representation()
        model.adata.var_names = ["symbol" if name == "gene4" else name for name in model.adata.var_names]
        with pytest.warns(UserWarning, match="1 genes have other names .* 'symbol' for 'gene4'"):
            np.testing.assert_array_equal(model.get_latent_representation(), expected)
        model.get_latent_representation()  # warns once

    def test_size_factors_of_another_type(self):
        adata = cells()
        adata.obs["size"] = np.resize([1, 2], 60)
        model = untrained(adata, setup={"size_factor_key": "size"})
        expected = model.get_latent_representation()
        adata.obs["size"] = adata.obs["size"].astype(np.float32)
        np.testing.assert_array_equal(model.get_latent_representation(), expected)


def test_fields_are_compared_also_if_cells_were_removed():
    model = untrained(cells())
    model.adata._inplace_subset_obs(np.arange(50))
    model.adata.obs["_scvi_batch"] = 0
    with pytest.raises(ValueError, match="The registered 'batch' of the cells changed"):
        model.get_latent_kl()


def test_latents_of_minified_data_that_changed_are_named():
    model = untrained(cells(), use_observed_lib_size=True)
    model.minify_adata()
    assert model.get_latent_kl().shape == (60, 4)
    for key in list(model.adata.obsm):
        model.adata.obsm[key] = model.adata.obsm[key] * 3
    with pytest.raises(ValueError, match="The registered 'latent_qzm', 'latent_qzv' of the cells changed"):
        model.get_latent_representation()


@pytest.mark.parametrize("method", ["get_elbo", "ablate"])
def test_columns_of_other_cells_are_read_again_if_they_changed(method):
    model = untrained(cells(), setup={"continuous_covariate_keys": ["age"]})
    other = cells(30, seed=3)
    changed = other.copy()
    changed.obs["age"] = 5.0
    results = []
    for adata in (other, changed):
        model.get_elbo(adata)
    other.obs["age"] = 5.0
    for adata in (other, changed):
        scvi.settings.seed = 1
        result = getattr(model, method)(adata)
        results.append(result.X if method == "ablate" else float(result))
    np.testing.assert_array_equal(*results)
