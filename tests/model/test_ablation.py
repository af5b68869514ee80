"""Ablation against scvi-tools' own network and distributions in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi.model import LinearSCVI

from ldvae_ext import get
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, brute_force_ablation, counts, untrained

CASES = list(
    itertools.product(("nb", "zinb", "poisson"), ("normal", "ln"), (1, 3), (True, False), ("gene", "gene-batch"))
)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("gene_likelihood", "latent_distribution", "n_batches", "use_observed_lib_size", "dispersion"), CASES
)
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_equals_brute_force(gene_likelihood, latent_distribution, n_batches, use_observed_lib_size, dispersion, mode):
    adata = counts(n_batches=n_batches)
    model = untrained(
        adata,
        gene_likelihood=gene_likelihood,
        latent_distribution=latent_distribution,
        use_observed_lib_size=use_observed_lib_size,
        dispersion=dispersion,
    )
    mean, _ = model.get_latent_representation(return_dist=True)
    value = mean.mean(0) if mode == "mean" else np.zeros(model.n_latent)
    expected = brute_force_ablation(model, adata, value)
    got = model.ablate(mode=mode)
    assert np.abs(got.X - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def trained():
    adata = counts(n_cells=200, n_batches=3)
    LDVAE.setup_anndata(adata, batch_key="batch")
    model = LDVAE(adata, n_latent=4)
    model.train(20, kl_warmup="auto", **TRAIN)
    return model


def test_trained_model_equals_brute_force_and_hurts_some_cells(trained, pbmc_trained):
    expected = brute_force_ablation(trained, trained.adata, np.zeros(4))
    np.testing.assert_allclose(trained.ablate().X, expected, atol=1e-5 * np.abs(expected).max())
    adata = pbmc_trained.adata.copy()
    adata.obs["batch"] = "0"
    expected = brute_force_ablation(pbmc_trained, adata, np.zeros(10))
    got = pbmc_trained.ablate()
    np.testing.assert_allclose(got.X, expected, atol=1e-5 * np.abs(expected).max())
    assert got.X.mean() > 0, "latents help on the whole"
    assert (got.X < 0).any(), "and hurt single cells, which is not clipped"


def test_result_is_labelled_and_repeatable(trained):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = trained.ablate(), trained.ablate(batch_size=17)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(first.X, second.X, atol=1e-4)
    np.testing.assert_array_equal(first.X, trained.ablate().X)
    assert first.X.dtype == np.float64
    assert first.var_names.tolist() == ["Z_0", "Z_1", "Z_2", "Z_3"]
    pd.testing.assert_frame_equal(first.obs, trained.adata.obs)
    assert first.uns["ldvae_ablation"] == {
        "format": 2,
        "mode": "zero",
        "scheme": "leave_out",
        "use_posterior": "mean",
        "refit_heads": False,
        "unit": "nats",
    }


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_a_cell_gets_the_same_whichever_cells_and_latents_are_asked_for(trained, mode):
    whole = trained.ablate(mode=mode)
    some = trained.ablate(indices=[9, 2], latents=["Z_3", "Z_1"], mode=mode)
    assert some.var_names.tolist() == ["Z_1", "Z_3"]
    assert some.obs_names.tolist() == ["cell9", "cell2"]
    np.testing.assert_allclose(some.X, whole.X[[9, 2]][:, [1, 3]], atol=1e-5)
    np.testing.assert_array_equal(trained.ablate(latents=1, mode=mode).X, trained.ablate(latents="Z_1", mode=mode).X)


def test_unseen_cells_are_ablated_and_left_as_they_were(trained):
    unseen = counts(n_cells=30, n_batches=3, seed=9)
    unseen.obs_names = [f"new{i}" for i in range(30)]
    shuffled = unseen[:, ::-1].copy()
    before = shuffled.copy()
    got = trained.ablate(shuffled)
    expected = brute_force_ablation(trained, unseen, np.zeros(4))
    np.testing.assert_allclose(got.X, expected, atol=1e-5 * np.abs(expected).max())
    pd.testing.assert_frame_equal(got.obs, before.obs)
    pd.testing.assert_frame_equal(shuffled.obs, before.obs)
    assert list(shuffled.uns) == []
    assert len(trained._per_instance_manager_store[trained.id]) == 1, "scvi-tools keeps no copy of it"


def test_minified_data_keep_their_ablation_with_counts_and_refuse_it_without():
    adata = counts(n_batches=3)
    model = untrained(adata, use_observed_lib_size=True)
    expected, expression = model.ablate().X, model.get_normalized_expression(use_posterior_mean=True)
    adata.obsm["X_latent_qzm"], adata.obsm["X_latent_qzv"] = model.get_latent_representation(return_dist=True)
    kept = untrained(adata.copy(), use_observed_lib_size=True)
    kept.minify_adata("latent_posterior_parameters_with_counts")
    # The posteriors of minified data are scvi-tools' own, whose float32 sums have another order.
    np.testing.assert_allclose(kept.ablate().X, expected, atol=1e-6 * np.abs(expected).max())
    model.minify_adata()
    with pytest.raises(
        ValueError, match=r"needs counts.*`minify_adata\('latent_posterior_parameters_with_counts'\)` keeps them"
    ):
        model.ablate()
    np.testing.assert_allclose(model.get_normalized_expression(use_posterior_mean=True), expression, atol=1e-6)


def test_unseen_sparse_arrays_are_read_and_bad_ones_named_and_numpys_state_is_left_alone(trained):
    unseen = counts(n_cells=30, n_batches=3, seed=9)
    expected = trained.ablate(unseen).X
    unseen.X = sparse.csr_array(unseen.X)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_allclose(trained.ablate(unseen).X, expected, atol=1e-5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert trained.get_latent_representation(unseen).shape == (30, 4)
    bad = counts(n_cells=30, n_batches=3, seed=9)
    bad.X = -bad.X
    with pytest.raises(ValueError, match="holds negative values"):
        trained.ablate(bad)


def test_an_untrained_model_says_so():
    adata = counts()
    LDVAE.setup_anndata(adata)
    with pytest.warns(UserWarning, match="untrained model"):
        LDVAE(adata, n_latent=2).ablate()


def test_minified_cells_of_another_kind_are_refused():
    adata = counts(n_batches=3)
    model = untrained(adata, use_observed_lib_size=True)
    adata.obsm["X_latent_qzm"], adata.obsm["X_latent_qzv"] = model.get_latent_representation(return_dist=True)
    other = untrained(adata.copy(), use_observed_lib_size=True)
    model.minify_adata()
    with pytest.raises(
        ValueError, match="`adata` is minified as 'latent_posterior_parameters', the model's data as None"
    ):
        other.ablate(model.adata)


@pytest.mark.parametrize("cls", [LDVAE, LinearSCVI])
def test_minified_data_stay_minified_after_load(tmp_path, cls):
    model = untrained(counts(n_batches=3), cls=cls, use_observed_lib_size=True)
    adata = model.adata
    latent, variance = model.get_latent_representation(return_dist=True)
    adata.obsm["X_latent_qzm"], adata.obsm["X_latent_qzv"] = latent, variance
    model.minify_adata()
    model.save(tmp_path / "m", save_anndata=True)
    if cls is LinearSCVI:
        again = LDVAE.from_linear_scvi(LinearSCVI.load(tmp_path / "m"))
        np.testing.assert_allclose(again.get_latent_representation(), latent, atol=1e-6)
    back = LDVAE.load(tmp_path / "m")
    np.testing.assert_allclose(back.get_latent_representation(), latent, atol=1e-6)
    np.testing.assert_allclose(back.get_latent_kl(), kl_per_dimension(latent, variance), atol=1e-5)
    with pytest.raises(ValueError, match="needs counts"):
        back.ablate()


def test_no_cells_give_no_rows(trained):
    assert trained.ablate(indices=[]).shape == (0, 4)


@pytest.mark.parametrize("latent_distribution", ["normal", "ln"])
def test_ablated_expression_decodes_without_the_latents(latent_distribution):
    adata = counts(n_batches=3)
    model = untrained(adata, latent_distribution=latent_distribution)
    mean, _ = model.get_latent_representation(return_dist=True)
    for mode, value in (("zero", np.zeros(4)), ("mean", mean.mean(0))):
        moved = mean.astype(np.float64)
        moved[:, [0, 2]] = value[[0, 2]]
        if latent_distribution == "ln":
            moved = np.exp(moved) / np.exp(moved).sum(1, keepdims=True)
        expected = model.decode(moved, batch=adata.obs["batch"])
        got = model.get_ablated_expression(["Z_2", 0], mode)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert got.index.equals(adata.obs_names)
    part = model.get_ablated_expression(
        "Z_1", indices=[3], gene_list=["gene2"], library_size=100.0, transform_batch="b2"
    )
    whole = model.get_ablated_expression("Z_1", transform_batch="b2", return_numpy=True)
    np.testing.assert_allclose(part, 100 * whole[[3]][:, [2]], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"latents": "Z_9"},
            "`latents`: 'Z_9' is no latent of this model; allowed are 'Z_0', 'Z_1', 'Z_2', 'Z_3' or 0 to 3",
        ),
        ({"latents": [0, 4]}, "4 is no latent"),
        ({"latents": [True]}, "True is no latent"),
        ({"latents": []}, "must name at least one latent"),
        ({"mode": "median"}, "`mode` must be one of 'zero', .*'drop'; got 'median'"),
        ({"indices": np.zeros(3, dtype=bool)}, "one value for each of 200 cells"),
    ],
)
def test_bad_input_is_named(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        trained.ablate(**arguments)


def test_fractions_are_named():
    adata = counts(n_batches=3)
    adata.X = adata.X * 0.5
    with pytest.warns(UserWarning, match="values that are not integers"):
        model = untrained(adata)
    with pytest.warns(UserWarning, match="values that are not integers"):
        model.ablate()
    with pytest.warns(UserWarning, match="values that are not integers"):
        model.ablate_genes("batch")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.ablate("batch"),
            TypeError,
            "`adata` must be an AnnData or None, for the model's own; got 'batch'",
        ),
        (
            lambda m: m.ablate_genes(m.adata),
            TypeError,
            "`groupby` must be the name of a column of `obs`; got an AnnData",
        ),
        (lambda m: m.get_explained_deviance("batch", "zero"), TypeError, "`adata` must be an AnnData or None"),
        (lambda m: m.get_population_loadings(m.adata, "batch"), TypeError, "`groupby` must be the name of a column"),
        (lambda m: m.ablate_genes("depth"), ValueError, "'depth' holds numbers such as 0.5, not groups"),
        (lambda m: get.ablation_df(m.adata), TypeError, "`ablation` must be a result of `ablate`"),
        (lambda m: m.ablate(indices=[9999]), ValueError, "`indices` must be positions of 60 cells; got 9999"),
    ],
)
def test_things_that_are_confused_are_told_apart(call, error, message):
    adata = counts()
    adata.obs["depth"] = np.arange(60) + 0.5
    with pytest.raises(error, match=message):
        call(untrained(adata))


def test_a_mapping_of_values_names_the_latents():
    model = untrained(counts())
    got = model.ablate(mode="value", value={"Z_2": 1.0, "Z_0": -1.0})
    assert got.var_names.tolist() == ["Z_0", "Z_2"]
    np.testing.assert_array_equal(got.X, model.ablate(latents=[0, 2], mode="value", value=[-1.0, 0, 1.0, 0]).X)


def test_groups_that_nothing_is_set_to_are_refused():
    model = untrained(counts())
    for call in (model.ablate, lambda **kwargs: model.get_ablated_expression("Z_0", **kwargs)):
        with pytest.raises(ValueError, match="`groupby` belongs to `mode='group_mean'`; got mode 'zero'"):
            call(groupby="batch")
