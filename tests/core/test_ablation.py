from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldvae_ext.core import LinearDecoder, ablation_effects, log_likelihood
from ldvae_ext.kernels.threads import compiled
from tests.core.decoders import cells, full_decoder
from tests.pairwise import examples


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    likelihood, latent = draw(st.sampled_from(["nb", "zinb", "poisson"])), draw(st.sampled_from(["normal", "ln"]))
    n, g, k, b = (draw(st.integers(low, high)) for low, high in ((1, 6), (2, 12), (1, 4), (1, 3)))
    by_batch = draw(st.booleans()) and likelihood != "poisson"
    decoder = LinearDecoder(
        weight_gk=rng.normal(0, 2, (g, k)),
        intercept_bg=rng.normal(0, 2, (b, g)),
        genes=[f"g{i}" for i in range(g)],
        batches=[f"b{i}" for i in range(b)],
        factors=[f"Z_{i}" for i in range(k)],
        likelihood=likelihood,
        dispersion="gene-batch" if by_batch else "gene",
        theta_bg=None if likelihood == "poisson" else np.exp(rng.normal(0, 2, (b if by_batch else 1, g))),
        latent_distribution=latent,
        dropout_weight_gk=rng.normal(size=(g, k)) if likelihood == "zinb" else None,
        dropout_intercept_bg=rng.normal(size=(b, g)) if likelihood == "zinb" else None,
    )
    x = rng.poisson(rng.gamma(0.5, 4, (n, g))) * (rng.random((n, g)) < draw(st.floats(0, 1)))
    return decoder, x, rng.normal(0, 2, (n, k)), rng.gamma(2, 50, n), rng.integers(0, b, n), rng.normal(size=k)


def one_by_one(decoder, x, mean, library, batch, value, factors):
    """The definition: cell by cell, latent by latent, two whole likelihoods subtracted."""

    def z_of(u):
        e = np.exp(u - u.max())
        return e / e.sum() if decoder.latent_distribution == "ln" else u

    out = np.empty((len(x), len(factors)))
    for n in range(len(x)):
        theta = (
            None
            if decoder.theta_bg is None
            else decoder.theta_bg[batch[n] if decoder.dispersion == "gene-batch" else 0]
        )
        z = z_of(mean[n])
        dropout = None
        if decoder.likelihood == "zinb":
            dropout = decoder.dropout_weight_gk @ z + decoder.dropout_intercept_bg[batch[n]]

        def nll(u, n=n, theta=theta, dropout=dropout):
            e = np.exp(decoder.weight_gk @ z_of(u) + decoder.intercept_bg[batch[n]])
            return -log_likelihood(
                decoder.likelihood, x[n].astype(float), library[n] * e / e.sum(), theta, dropout
            ).sum()

        for column, k in enumerate(factors):
            moved = mean[n].copy()
            moved[k] = value[k]
            out[n, column] = nll(moved) - nll(mean[n])
    return out


@given(cases())
@examples(150)
def test_effects_equal_the_definition(case):
    factors = np.arange(case[2].shape[1])
    expected = one_by_one(*case, factors)
    largest = max(1, np.abs(expected).max())
    with compiled(on=False):
        np.testing.assert_allclose(ablation_effects(*case, factors), expected, rtol=1e-9, atol=1e-9 * largest)
    # float32 rounds the share mu / (mu + theta) of a gene with nearly all counts: an error of up to 2^-23 mu.
    atol = 1e-5 * largest + np.finfo(np.float32).eps * case[3].max()
    np.testing.assert_allclose(ablation_effects(*case, factors), expected, rtol=0, atol=atol)


def test_a_gene_that_takes_nearly_all_counts_and_loses_them_is_exact():
    # The mean of e^t over genes is far below the rounding of float32, so that a first estimate of it is wrong.
    decoder = LinearDecoder(
        weight_gk=np.transpose(
            [
                [1.52, -0.32, -0.54, -2.97, -0.07, 0.57, 4.47, -3.66, 0.70, 1.01, -0.19],
                [-0.26, -2.85, 2.49, 3.82, 2.32, 0.27, -4.74, 1.06, 0.07, -1.52, 0.82],
            ]
        ),
        intercept_bg=[[0.94, -1.31, -4.75, 0.78, 2.88, 0.3, -3.12, 1.09, -0.96, -2.84, -0.77]],
        genes=[f"gene_{g}" for g in range(11)],
        batches=["0"],
        factors=["Z_0", "Z_1"],
        likelihood="nb",
        theta_bg=[[2.58, 2.33, 3.85, 0.2, 0.48, 4.38, 1.05, 0.11, 0.89, 0.14, 0.12]],
    )
    n = 2001
    mean = np.column_stack([np.full(n, 2.26), np.linspace(-4, -3, n)])
    case = (decoder, np.zeros((n, 11)), mean, np.full(n, 22.0), np.zeros(n, dtype=int), np.array([0, 0.3]), [1])
    with compiled(on=False):
        expected = ablation_effects(*case)
    np.testing.assert_allclose(ablation_effects(*case), expected, rtol=1e-5)


def test_a_latent_that_is_there_already_has_no_effect_and_some_effects_are_negative():
    decoder = LinearDecoder(
        weight_gk=[[3.0, 0.0], [-3.0, 0.0]],
        intercept_bg=np.zeros((1, 2)),
        genes=["a", "b"],
        batches=["0"],
        factors=["Z_0", "Z_1"],
        likelihood="poisson",
    )
    x, mean = np.array([[10.0, 0.0], [0.0, 10.0]]), np.array([[1.0, 1.0], [1.0, 1.0]])
    effect = ablation_effects(decoder, x, mean, np.full(2, 10.0), np.zeros(2, dtype=int), np.zeros(2), [0, 1])
    assert effect[0, 0] > 1, "the latent says gene a, and gene a it is"
    assert effect[1, 0] < -1, "a latent that points the wrong way hurts, and is not clipped"
    np.testing.assert_array_equal(effect[:, 1], 0)
    np.testing.assert_array_equal(
        ablation_effects(decoder, x, mean, np.full(2, 10.0), np.zeros(2, dtype=int), np.ones(2), [0]), np.zeros((2, 1))
    )


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_effects_do_not_depend_on_how_cells_are_cut_into_chunks(likelihood):
    rng = np.random.default_rng(0)
    decoder = LinearDecoder(
        weight_gk=rng.normal(size=(50, 3)),
        intercept_bg=rng.normal(size=(2, 50)),
        genes=[f"g{i}" for i in range(50)],
        batches=["a", "b"],
        factors=["Z_0", "Z_1", "Z_2"],
        likelihood=likelihood,
        theta_bg=None if likelihood == "poisson" else np.ones((1, 50)),
    )
    x, mean, library, batch = (
        rng.poisson(2, (64, 50)),
        rng.normal(size=(64, 3)),
        rng.gamma(2, 50, 64),
        rng.integers(0, 2, 64),
    )
    for on in (False, True):
        with compiled(on=on):
            whole = ablation_effects(decoder, x, mean, library, batch, np.zeros(3), [0, 1, 2])
            pieces = [
                ablation_effects(decoder, x[s], mean[s], library[s], batch[s], np.zeros(3), [0, 1, 2])
                for s in (slice(0, 1), slice(1, 40), slice(40, 64))
            ]
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.grid
@pytest.mark.parametrize("link", ["softmax", "softplus"])
@pytest.mark.parametrize("latent", ["normal", "ln"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
def test_effects_with_covariates_labels_and_links_equal_the_definition(link, latent, dispersion, likelihood):
    """Two whole likelihoods subtracted, with the dispersion and dropout of the unablated cell in both."""
    decoder = full_decoder(link=link, latent_distribution=latent, dispersion=dispersion, likelihood=likelihood)
    rng, c = np.random.default_rng(3), cells(decoder)
    mean, library, value = rng.normal(size=(7, 3)), rng.gamma(2.0, 5.0, 7), np.array([0.0, 0.4, -1.0])
    x = rng.poisson(3.0, (7, 9)).astype(float)

    def z_of(u):
        return np.exp(u) / np.exp(u).sum(axis=1, keepdims=True) if latent == "ln" else u

    where = {"batch": c["batch"], "covariates": c["covariates"]}
    theta = dropout = None
    if likelihood != "poisson":
        theta = decoder.theta(**where, n_cells=7, label=c["label"], z_nk=z_of(mean))
    if likelihood == "zinb":
        dropout = decoder.dropout_logits(z_of(mean), **where)

    def nll(u):
        rate = decoder.rate(z_of(u), **where, library=library)
        return -log_likelihood(likelihood, x, rate, theta, dropout).sum(axis=1)

    for on, tolerance in ((False, 1e-8), (True, 1e-5)):
        with compiled(on=on):
            got = ablation_effects(
                decoder, x, mean, library, c["batch"], value, [2, 0], covariates=c["covariates"], label=c["label"]
            )
        for column, k in enumerate([2, 0]):
            moved = mean.copy()
            moved[:, k] = value[k]
            expected = nll(moved) - nll(mean)
            largest = np.abs(expected).max() if on else 1.0
            np.testing.assert_allclose(got[:, column], expected, rtol=tolerance, atol=tolerance * largest)
    with pytest.raises(ValueError, match="missing 'age'"):
        ablation_effects(decoder, x, mean, library, c["batch"], value, [0], label=c["label"])
