"""Posteriors from the decoder, and the ELBO that the encoder loses, against scvi-tools' own distributions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import nbinom, norm

from ldvae_ext import get, tl
from ldvae_ext.core import kl_per_dimension, posterior_of
from ldvae_ext.core.draws import POSTERIOR, normal_draws
from tests.helpers import counts, untrained
from tests.network_ablation import counts_distribution, encoded
from tests.reference import covariate_counts, setup_arguments
from tests.rotated import fresh, grouped_model

OPTIONS = [
    ({}, {}),
    ({"gene_likelihood": "zinb", "dispersion": "gene-cell"}, {"covariates": "both"}),
    ({"dispersion": "gene-label"}, {"labels": True, "size_factor": True}),
    ({"latent_distribution": "ln"}, {}),
]


@pytest.fixture
def model():
    trained = grouped_model()
    trained.rotate("none")
    yield trained
    trained.rotate("none")


@pytest.mark.parametrize(("options", "setup"), OPTIONS, ids=str)
def test_posterior_is_that_of_the_exported_decoder_and_libraries(options, setup):
    adata = covariate_counts(n_batches=2)
    model = untrained(adata, setup=setup_arguments(**setup), **options)
    got = model.get_refined_posterior()
    exported = adata.copy()
    model.export_to_anndata(exported, order_by="network")
    decoder, arguments = model.get_decoder(), {"batch": adata.obs["batch"].astype(str).to_numpy()}
    if decoder.covariates:
        arguments["covariates"] = {c.name: adata.obs[c.name].to_numpy() for c in decoder.covariates}
    if decoder.labels is not None:
        arguments["label"] = adata.obs[setup_arguments(**setup)["labels_key"]].astype(str).to_numpy()
    x = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X)
    arguments |= {"library": exported.obs["ldvae_library"].to_numpy(), "start_nk": model.get_latent_representation()}
    if decoder.latent_distribution == "ln":
        arguments["start_nk"] = exported.obsm["X_ldvae_u"]
    expected = posterior_of(decoder, x, **arguments)
    np.testing.assert_allclose(got.mean, expected.mean_nk, atol=1e-4)
    np.testing.assert_allclose(got.covariance, expected.covariance_nkk, atol=1e-4)
    np.testing.assert_allclose(got.variance, expected.variance_nk, atol=1e-4)
    np.testing.assert_allclose(got.log_evidence, expected.log_evidence_n, rtol=1e-5)
    np.testing.assert_array_equal(got.converged, expected.converged_n)
    assert got.converged.mean() > 0.9
    assert got.mean.index.equals(adata.obs_names)
    assert got.mean.columns.tolist() == model.latent_names


@pytest.mark.parametrize("method", ["varimax", "promax"])
def test_a_rotation_turns_means_and_covariances(model, method):
    plain = model.get_refined_posterior()
    model.rotate(method)
    got, axes = model.get_refined_posterior(), model.rotation.matrix_kk
    np.testing.assert_allclose(got.mean, plain.mean.to_numpy() @ axes, atol=1e-9)
    np.testing.assert_allclose(got.covariance, axes.T @ plain.covariance @ axes, atol=1e-9)
    assert got.mean.columns.tolist() == model.factor_names
    assert repr(got).startswith("RefinedPosterior of 120 cells and 4 factors")


def bound_by_the_network(model, mean, root, seed, n_samples):
    """Mean log-likelihood of draws under scvi-tools' distribution."""
    cells = encoded(model, model.adata)
    noise = normal_draws(seed, POSTERIOR, np.arange(model.adata.n_obs), model.n_latent, n_samples)
    total = np.zeros(model.adata.n_obs)
    for eps in noise:
        z = mean + np.einsum("nij,nj->ni", root, eps)
        px = counts_distribution(model, cells, z)
        total += px.log_prob(torch.as_tensor(cells.x)).sum(dim=1).numpy() / n_samples
    return total


def test_gap_is_the_difference_of_two_bounds(model):
    got = model.get_amortization_gap(n_samples=3, seed=5)
    mean, variance = (v.astype(float) for v in model.get_latent_representation(return_dist=True))
    encoder = bound_by_the_network(model, mean, np.sqrt(variance)[:, :, None] * np.eye(4), 5, 3)
    encoder -= kl_per_dimension(mean, variance).sum(axis=1)
    np.testing.assert_allclose(got["encoder"], encoder, rtol=1e-4)
    found = model.get_refined_posterior()
    mode, covariance = found.mean.to_numpy(), found.covariance
    refined = bound_by_the_network(model, mode, np.linalg.cholesky(covariance), 5, 3)
    trace, log_det = np.trace(covariance, axis1=1, axis2=2), np.linalg.slogdet(covariance)[1]
    refined -= 0.5 * (trace + (mode**2).sum(axis=1) - 4 - log_det)
    np.testing.assert_allclose(got["refined"], refined, rtol=1e-4)
    np.testing.assert_allclose(got["gap"], got["refined"] - got["encoder"])
    assert got["gap"].mean() > 0


def test_groups_have_the_means_of_their_cells(model):
    cells = model.get_amortization_gap(n_samples=2)
    got = model.get_amortization_gap(groupby="type", n_samples=2)
    expected = cells.groupby(model.adata.obs["type"].astype(str).where(model.adata.obs["type"].notna())).mean()
    np.testing.assert_allclose(got[["encoder", "refined", "gap"]], expected.loc[got.index.astype(str)])
    assert got["n_cells"].sum() == model.adata.obs["type"].notna().sum()


def test_draws_do_not_depend_on_the_other_cells(model):
    every = model.get_amortization_gap(n_samples=2)
    some = model.get_amortization_gap(indices=[7, 3], n_samples=2)
    np.testing.assert_allclose(some, every.iloc[[7, 3]], rtol=1e-5)
    assert not np.allclose(model.get_amortization_gap(n_samples=2, seed=1)["encoder"], every["encoder"])


def test_other_cells_with_counts_and_no_others(model):
    adata = fresh(model)[:40].copy()
    got = model.get_refined_posterior(adata)
    np.testing.assert_allclose(got.mean, model.get_refined_posterior(indices=np.arange(40)).mean, atol=1e-5)
    with pytest.raises(ValueError, match="There are no cells"):
        model.get_refined_posterior(indices=[])
    with pytest.raises(ValueError, match="There are no cells"):
        model.get_amortization_gap(indices=[])
    with pytest.raises(ValueError, match="`n_samples`"):
        model.get_amortization_gap(n_samples=0)
    minified = untrained(counts(), n_latent=3, use_observed_lib_size=True)
    minified.adata.obsm["qzm"], minified.adata.obsm["qzv"] = minified.get_latent_representation(return_dist=True)
    minified.minify_adata(use_latent_qzm_key="qzm", use_latent_qzv_key="qzv")
    for ask in (minified.get_refined_posterior, minified.get_amortization_gap):
        with pytest.raises(ValueError, match="counts"):
            ask()


def test_refined_modes_explain_the_counts_better(model):
    decoder, batch = model.get_decoder(), model.adata.obs["batch"].astype(str)
    exported = fresh(model)
    model.export_to_anndata(exported, order_by="network")
    library, x = exported.obs["ldvae_library"].to_numpy(), model.adata.X.toarray()

    def log_posterior(z):
        rate = decoder.rate(z, batch, library=library)
        theta = decoder.theta(batch, len(z))
        value = (x * np.log(rate) - (x + theta) * np.log(theta + rate)).sum(axis=1)
        return value - 0.5 * (z**2).sum(axis=1)

    refined = model.get_refined_posterior().mean.to_numpy()
    encoder = model.get_latent_representation().astype(float)
    assert (log_posterior(refined) >= log_posterior(encoder) - 1e-6).all()


@pytest.mark.parametrize("method", ["none", "promax"])
def test_readers_take_refined_posteriors(model, method):
    model.rotate(method)
    refined, adata = model.get_refined_posterior(), model.adata.copy()
    model.export_to_anndata(adata, use_posterior="refined", order_by="network")
    signs = get.factors(adata)["sign"].to_numpy()
    np.testing.assert_allclose(adata.obsm["X_ldvae"], refined.mean * signs, atol=1e-5)
    assert adata.uns["ldvae"]["posterior"] == "refined"
    np.testing.assert_allclose(adata.obsm["X_ldvae_var"], refined.variance, atol=1e-5)
    if method == "none":
        kl = model.get_latent_kl(use_posterior="refined")
        np.testing.assert_allclose(kl, kl_per_dimension(refined.mean, refined.variance))
    # What reads the export knows nothing of posteriors.
    for mode in ({}, {"mode": "mean"}, {"mode": "permute", "seed": 3}):
        of_model = model.ablate(use_posterior="refined", **mode)
        np.testing.assert_allclose(of_model.X, tl.ablate(adata, **mode).X, rtol=1e-4, atol=1e-3)
        assert of_model.uns["ldvae_ablation"]["use_posterior"] == "refined"
        assert np.abs(of_model.X - model.ablate(**mode).X).max() > 0.1
    genes = model.ablate_genes("type", use_posterior="refined")
    np.testing.assert_allclose(genes.X, tl.ablate_genes(adata, "type").X, rtol=1e-4, atol=1e-4)
    tl.population_loadings(adata, "type")
    loadings = model.get_population_loadings("type", use_posterior="refined")
    for group, table in loadings.items():
        long = get.population_loadings_df(adata, group=group)
        ours = long.pivot(index="gene", columns="factor", values="value")
        np.testing.assert_allclose(ours.loc[table.index, table.columns] * signs, table, atol=1e-6)


def test_statistics_of_refined_posteriors_and_the_gap(model):
    refined = model.get_refined_posterior()
    stats = model.get_factor_stats(use_posterior="refined", amortization_gap=True, seed=2)
    table = stats.table()
    np.testing.assert_allclose(table["kl"], kl_per_dimension(refined.mean, refined.variance).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["active_unit"], refined.mean.var(axis=0, ddof=0), rtol=1e-4)
    np.testing.assert_allclose(table["ablation_zero"], model.ablate(use_posterior="refined").X.mean(axis=0), rtol=1e-5)
    assert (table["explained_deviance"] > model.get_factor_stats().table()["explained_deviance"]).mean() > 0.5
    np.testing.assert_allclose(stats.totals["amortization_gap"], model.get_amortization_gap(seed=2)["gap"].mean())
    by_type = model.get_factor_stats("type", amortization_gap=True, seed=2).totals.set_index("group")
    expected = model.get_amortization_gap(groupby="type", seed=2)["gap"]
    np.testing.assert_allclose(by_type["amortization_gap"], expected[by_type.index])
    assert "amortization_gap" not in model.get_factor_stats().totals


@pytest.mark.parametrize("latent", ["normal", "ln"])
def test_the_marginal_likelihood_is_that_of_a_sum_over_a_grid(latent):
    model = untrained(counts(n_cells=5), use_observed_lib_size=True, latent_distribution=latent, n_latent=2)
    axis = np.linspace(-6, 6, 201)
    u = np.stack([side.ravel() for side in np.meshgrid(axis, axis)], axis=1)
    z = softmax(u, axis=1) if latent == "ln" else u
    decoder, x, expected = model.get_decoder(), model.adata.X.toarray(), []
    for cell in x:
        mu = decoder.rate(z, library=cell.sum())
        value = nbinom.logpmf(cell, decoder.theta_bg, decoder.theta_bg / (decoder.theta_bg + mu)).sum(axis=1)
        expected.append(logsumexp(value + norm.logpdf(u).sum(axis=1)) + 2 * np.log(axis[1] - axis[0]))
    got = model.get_marginal_ll(n_mc_samples=2000, use_posterior="refined", return_mean=False).numpy()
    np.testing.assert_allclose(got, expected, atol=0.1)
    np.testing.assert_allclose(model.get_marginal_ll(n_mc_samples=2000, use_posterior="refined"), got.mean())


def test_refined_posteriors_are_refused_where_they_have_no_meaning(model):
    for method in ("get_latent_kl", "ablate", "export_to_anndata", "get_factor_stats", "get_marginal_ll"):
        with pytest.raises(ValueError, match="`use_posterior` must be one of"):
            getattr(model, method)(use_posterior="guessed")
    other = untrained(counts(n_cells=12))
    with pytest.raises(ValueError, match="needs observed library sizes"):
        other.get_marginal_ll(use_posterior="refined")
    with pytest.raises(ValueError, match="takes `adata`, `indices`, `n_mc_samples` and `batch_size` only"):
        model.get_marginal_ll(use_posterior="refined", data_loader_kwargs={"num_workers": 0})
    adata = model.adata.copy()
    model.export_to_anndata(adata)
    with pytest.raises(ValueError, match="`use_posterior` must be one of 'mean', 'samples'"):
        tl.ablate(adata, use_posterior="refined")


def test_a_cell_without_counts_has_a_refined_posterior():
    adata = counts(n_cells=12)
    x = adata.X.toarray()
    x[3] = 0
    adata.X = x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = untrained(adata, use_observed_lib_size=True)
        assert np.isfinite(model.get_refined_posterior().mean).all(axis=None)
        model.export_to_anndata(use_posterior="refined")
    assert np.isfinite(adata.obsm["X_ldvae"]).all()
