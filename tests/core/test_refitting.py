"""Decoders from tables of loadings, against the decoder that the counts were drawn from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.special import softmax

from ldvae_ext.core import LinearDecoder, posterior_of
from ldvae_ext.core.refitting import refit
from tests.core.decoders import full_decoder


def drawn(likelihood="nb", n_cells=700, n_genes=150, n_factors=3, seed=0):
    """A decoder, latents, and counts drawn from it."""
    rng = np.random.default_rng(seed)
    decoder = LinearDecoder(
        weight_gk=rng.normal(scale=0.6, size=(n_genes, n_factors)),
        intercept_bg=rng.normal(size=(1, n_genes)),
        genes=[f"g{i}" for i in range(n_genes)],
        batches=["b"],
        factors=[f"Z_{k}" for k in range(n_factors)],
        likelihood=likelihood,
        theta_bg=rng.gamma(4, 0.5, (1, n_genes)) + 0.2 if likelihood == "nb" else None,
    )
    z = rng.normal(size=(n_cells, n_factors))
    mu = decoder.rate(z, library=rng.uniform(2000, 5000, n_cells))
    x = rng.poisson(mu if likelihood == "poisson" else rng.gamma(decoder.theta_bg, mu / decoder.theta_bg))
    return decoder, z, x.astype(float)


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_intercepts_dispersions_and_scales_of_the_truth_are_found(likelihood):
    truth, z, x = drawn(likelihood)
    table = pd.DataFrame(truth.weight_gk * [0.01, 1.0, 100.0], index=truth.genes, columns=["a/b", "c", "d"])
    found = LinearDecoder.from_loadings(table, counts=sparse.csr_matrix(x), likelihood=likelihood)
    np.testing.assert_allclose(found.weight_gk / truth.weight_gk, np.ones_like(truth.weight_gk), rtol=0.1)
    np.testing.assert_allclose(found.centered().intercept_bg, truth.centered().intercept_bg, atol=0.3)
    if likelihood == "nb":
        ratio = np.log(found.theta_bg / truth.theta_bg)
        assert abs(ratio.mean()) < 0.1
        assert ratio.std() < 0.3
    assert found.factors.tolist() == ["a/b", "c", "d"]
    mean = posterior_of(found, x).mean_nk
    assert np.diag(np.corrcoef(mean, z, rowvar=False)[:3, 3:]).min() > 0.97


def test_a_given_intercept_and_scale_are_kept():
    truth, _, x = drawn()
    found = LinearDecoder.from_loadings(
        truth.weight_gk, truth.intercept_bg[0], counts=x, genes=truth.genes, rescale=False
    )
    np.testing.assert_array_equal(found.weight_gk, truth.weight_gk)
    np.testing.assert_array_equal(found.intercept_bg, truth.intercept_bg)
    bare = LinearDecoder.from_loadings(truth.weight_gk, truth.intercept_bg[0], genes=truth.genes)
    assert bare.likelihood == "poisson"
    np.testing.assert_array_equal(bare.scale(np.zeros((1, 3))), softmax(truth.intercept_bg, axis=1))


def test_the_fit_is_a_maximum():
    """No intercept and no dispersion can be changed for the better, given the latents."""
    truth, _, x = drawn(n_cells=300, n_genes=40)
    found = LinearDecoder.from_loadings(truth.weight_gk, counts=x, genes=truth.genes, rescale=False)
    z = posterior_of(found, x).mean_nk
    library = x.sum(axis=1)

    def value(decoder):
        from ldvae_ext.core import log_likelihood

        mu = decoder.rate(z, library=library)
        prior = 0.5 * (np.square(decoder.intercept_bg - start) / 100).sum()
        prior += 0.5 * np.square(np.log(decoder.theta_bg) / 2).sum()
        return log_likelihood("nb", x, mu, decoder.theta_bg).sum() - prior

    start = np.log((x.sum(axis=0) + 0.5) / (x.sum() + 20))[None]
    best = value(found)
    for g in (0, 7, 20):
        for step in (-0.1, 0.1):
            intercept, theta = found.intercept_bg.copy(), found.theta_bg.copy()
            intercept[0, g] += step
            theta[0, g] *= np.exp(step)
            assert value(found._with(intercept_bg=intercept)) < best
            assert value(found._with(theta_bg=theta)) < best + 1e-3


@pytest.mark.parametrize("link", ["softmax", "softplus"])
def test_a_strong_prior_keeps_the_intercepts_of_each_batch(link):
    decoder = full_decoder(0, n_genes=30, n_factors=2, likelihood="nb", dispersion="gene", link=link, covariates=())
    rng = np.random.default_rng(0)
    batch = decoder.batches[rng.integers(0, len(decoder.batches), 100)]
    x = rng.poisson(decoder.rate(rng.normal(size=(100, 2)), batch, library=50.0) * np.exp(rng.normal(size=30))).astype(
        float
    )
    library = x.sum(axis=1) + 1 if link == "softmax" else 50.0
    kept = refit(decoder, x, batch, library=library, offset_sd=1e-4)
    np.testing.assert_allclose(kept.intercept_bg, decoder.intercept_bg, atol=1e-3)
    free = refit(decoder, x, batch, library=library)
    assert np.abs(free.intercept_bg - decoder.intercept_bg).max() > 0.5
    assert posterior_of(free, x, batch, library=library).log_evidence_n.sum() > (
        posterior_of(decoder, x, batch, library=library).log_evidence_n.sum()
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"genes": None}, "`genes` must name the rows"),
        ({"counts": None}, "`counts` is needed to fit the intercept"),
        ({"counts": None, "intercept": np.zeros(150), "likelihood": "nb"}, "`counts` is needed to fit the intercept"),
        ({"intercept": np.zeros(3)}, "`intercept` must have the 150 genes of `loadings`; got 3"),
        ({"counts": np.ones((4, 3))}, r"`counts` must be cells x the 150 genes of `loadings`; got shape \(4, 3\)"),
        ({"counts": np.ones((0, 150))}, r"`counts` must be cells x the 150 genes of `loadings`; got shape \(0, 150\)"),
        ({"counts": np.full((4, 150), np.nan)}, "`counts` holds values that are negative or not finite"),
        ({"likelihood": "zinb"}, "`likelihood` must be one of 'nb', 'poisson'"),
        ({"loadings": np.full((150, 2), np.nan)}, "`loadings` must be genes x factors, finite"),
        ({"loadings": np.ones((150, 2))}, "`loadings` must differ between genes; those of factor 0 do not"),
        ({"factors": ["a"]}, "`factors` must hold 3 names; got 1"),
        ({"counts": np.full((4, 150), -1.0)}, "`counts` holds values that are negative or not finite"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_named(arguments, match):
    truth, _, x = drawn(n_cells=20)
    given = {"loadings": truth.weight_gk, "counts": x, "genes": truth.genes, **arguments}
    with pytest.raises(ValueError, match=match):
        LinearDecoder.from_loadings(**given)


def test_counts_that_are_none_are_named():
    truth, _, x = drawn(n_cells=20)
    with pytest.warns(UserWarning, match="`counts` holds values that are not integers"):
        LinearDecoder.from_loadings(truth.weight_gk, truth.intercept_bg[0], counts=np.log1p(x), genes=truth.genes)
    with pytest.raises(TypeError, match="`counts` must be a matrix, such as"):
        LinearDecoder.from_loadings(truth.weight_gk, counts=AnnData(x), genes=truth.genes)


def test_what_cannot_be_fitted_is_refused():
    decoder = full_decoder(0, n_genes=30, n_factors=2, likelihood="nb", dispersion="gene-batch", covariates=())
    x, batch = np.ones((4, 30)), decoder.batches[:1].repeat(4)
    with pytest.raises(
        ValueError, match="`with_dispersion` is for negative binomials with one dispersion for each gene"
    ):
        refit(decoder, x, batch, with_dispersion=True)
    with pytest.raises(ValueError, match="`offset_sd` must be a finite number of at least 1e-06; got 0"):
        refit(decoder, x, batch, offset_sd=0)
    logistic = full_decoder(0, n_genes=30, n_factors=2, latent_distribution="ln", dispersion="gene", covariates=())
    with pytest.raises(ValueError, match="`with_scale` is not for a logistic-normal latent"):
        refit(logistic, x, batch, with_scale=True)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8])
def test_totals_are_summed_in_float64(dtype):
    truth, _, x = drawn(n_cells=60, n_genes=150)
    x = np.minimum(x, 250).astype(dtype)
    found = LinearDecoder.from_loadings(truth.weight_gk, counts=x, genes=truth.genes)
    expected = LinearDecoder.from_loadings(truth.weight_gk, counts=x.astype(float), genes=truth.genes)
    np.testing.assert_allclose(found.intercept_bg, expected.intercept_bg, atol=1e-6)
    np.testing.assert_allclose(posterior_of(found, x).mean_nk, posterior_of(found, x.astype(float)).mean_nk, atol=1e-6)
