"""Standard errors of loadings against finite differences, and shrinkage against numerical integration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm

from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.shrinkage import LoadingInformation, _grid, shrink
from tests.core.decoders import full_decoder
from tests.pairwise import examples

SEEDS = st.integers(0, 10_000)


def some_cells(decoder, n_cells=40, seed=0):
    rng = np.random.default_rng(seed)
    n_factors = len(decoder.factors)
    return EncodedCells(
        rng.normal(size=(n_cells, n_factors)),
        np.full((n_cells, n_factors), 0.1),
        rng.uniform(500, 2000, n_cells),
        np.arange(n_cells) % len(decoder.batches),
        np.zeros(n_cells, dtype=np.int64),
        None,
        None,
    )


def expected_negative_hessian(decoder, cells, gene):
    """Of the Poisson log-likelihood of one gene's expected counts, in its loadings and batch intercepts, by differences."""
    base = decoder.logits(cells.mean, decoder.batches[cells.batch])
    # The total of a cell is held: the gene's rate is library * exp(logit - constant).
    constant = np.log(np.exp(base).sum(axis=1))
    design = np.column_stack([cells.mean, np.eye(len(decoder.batches))[cells.batch]])
    start = np.concatenate([decoder.weight_gk[gene], decoder.intercept_bg[:, gene]])
    expected = cells.library * np.exp(design @ start - constant)

    def log_likelihood(parameters):
        eta = design @ parameters - constant + np.log(cells.library)
        return (expected * eta - np.exp(eta)).sum()

    n, step = len(start), 1e-3
    hessian = np.zeros((n, n))
    shifts = step * np.eye(n)
    for i in range(n):
        for j in range(n):
            hessian[i, j] = (
                log_likelihood(start + shifts[i] + shifts[j])
                - log_likelihood(start + shifts[i] - shifts[j])
                - log_likelihood(start - shifts[i] + shifts[j])
                + log_likelihood(start - shifts[i] - shifts[j])
            ) / (4 * step**2)
    return -hessian


@pytest.mark.parametrize("n_batches", [1, 2])
def test_errors_are_those_of_a_poisson_regression_with_batch_intercepts(n_batches):
    decoder = full_decoder(n_genes=6, n_factors=3, likelihood="poisson", covariates=())
    cells = some_cells(decoder)
    if n_batches == 1:
        cells = cells._replace(batch=np.zeros(40, dtype=np.int64))
    information = LoadingInformation(decoder)
    for part in (slice(0, 15), slice(15, 40)):
        information.add(EncodedCells(*(v if v is None else v[part] for v in cells)))
    errors = information.errors()
    for gene in range(6):
        hessian = expected_negative_hessian(decoder, cells, gene)
        used = [*range(3), *(3 + np.unique(cells.batch))]
        covariance = np.linalg.inv(hessian[np.ix_(used, used)])
        np.testing.assert_allclose(errors[gene], np.sqrt(np.diag(covariance))[:3], rtol=1e-3)


def test_a_sample_of_the_cells_stands_for_all():
    decoder = full_decoder(n_genes=6, n_factors=3, covariates=())
    information = LoadingInformation(decoder)
    information.add(some_cells(decoder))
    np.testing.assert_allclose(information.errors(4 * 40), information.errors() / 2, rtol=1e-3)


def test_a_latent_that_no_cell_uses_and_a_gene_without_counts_have_large_errors():
    decoder = full_decoder(n_genes=6, n_factors=3, likelihood="poisson", covariates=())
    intercept = decoder.intercept_bg.copy()
    intercept[:, 2] = -60
    decoder = decoder._with(intercept_bg=intercept)
    cells = some_cells(decoder)
    cells.mean[:, 1] = 0.3
    information = LoadingInformation(decoder)
    information.add(cells)
    errors = information.errors()
    assert np.isfinite(errors).all()
    assert (errors[2] > 10).all()
    assert (errors[:, 1] > 10).all()
    assert (np.delete(np.delete(errors, 2, axis=0), 1, axis=1) < 1).all()


def example(seed, n=60):
    rng = np.random.default_rng(seed)
    theta = np.where(rng.random(n) < 0.7, 0.0, rng.normal(0, 2, n))
    errors = np.exp(rng.uniform(-2, 1, n))
    return theta, theta + errors * rng.normal(size=n), errors


def posterior_by_integration(w, s, prior_weights, sigma, function):
    """Expectation under the posterior: the point mass, and the normal components by quadrature."""
    mass = prior_weights[0] * norm.pdf(w, 0, s)
    reach = 12 * max(s, sigma.max()) + abs(w)

    def density(t):
        return norm.pdf(w, t, s) * (prior_weights[1:] * norm.pdf(t, 0, sigma[1:])).sum()

    points = [0.0, w, *np.concatenate([-sigma[1:], sigma[1:]])]
    total = mass + quad(density, -reach, reach, points=points, limit=500)[0]
    return (
        mass * function(0.0) + quad(lambda t: density(t) * function(t), -reach, reach, points=points, limit=500)[0]
    ) / total


def fitted_weights(estimates, errors, sigma):
    """Maximum of the concave likelihood, by sequential quadratic programming."""
    density = norm.pdf(estimates[:, None], 0, np.sqrt(errors[:, None] ** 2 + sigma**2))
    density = density / density.max(axis=1, keepdims=True)
    found = minimize(
        lambda weights: -(np.log(density @ weights).sum() + 9 * np.log(weights[0])) / len(density),
        np.full(len(sigma), 1 / len(sigma)),
        jac=lambda weights: (
            -((density / (density @ weights)[:, None]).sum(axis=0) + 9 / weights[0] * (np.arange(len(weights)) == 0))
            / len(density)
        ),
        method="SLSQP",
        bounds=[(1e-3, 1), *[(0, 1)] * (len(sigma) - 1)],
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("seed", [0, 1])
def test_the_posterior_is_that_of_an_integral(seed):
    _, estimates, errors = example(seed, n=40)
    sigma = _grid(estimates, errors)
    weights = fitted_weights(estimates, errors, sigma)
    got = shrink(estimates[:, None], errors[:, None])
    for g in range(0, 40, 9):
        mean = posterior_by_integration(estimates[g], errors[g], weights, sigma, lambda t: t)
        square = posterior_by_integration(estimates[g], errors[g], weights, sigma, lambda t: t**2)
        np.testing.assert_allclose(got.mean_gk[g, 0], mean, atol=5e-3)
        np.testing.assert_allclose(got.sd_gk[g, 0], np.sqrt(square - mean**2), atol=5e-3)
        # Up to an end of the interval, and not beyond it, lies the tail: the point mass makes a jump at 0.
        for end, tail in ((got.lower_gk[g, 0], 0.025), (got.upper_gk[g, 0], 0.975)):
            below = posterior_by_integration(estimates[g], errors[g], weights, sigma, lambda t, e=end: t < e - 1e-6)
            up_to = posterior_by_integration(estimates[g], errors[g], weights, sigma, lambda t, e=end: t <= e + 1e-6)
            assert below - 5e-3 <= tail <= up_to + 5e-3
        above = posterior_by_integration(estimates[g], errors[g], weights, sigma, lambda t: t > 0)
        under = posterior_by_integration(estimates[g], errors[g], weights, sigma, lambda t: t < 0)
        np.testing.assert_allclose(got.false_sign_gk[g, 0], min(1 - above, 1 - under), atol=5e-3)


@examples(30)
@given(seed=SEEDS)
def test_shrinkage_moves_towards_zero_and_most_where_errors_are_large(seed):
    _, estimates, errors = example(seed)
    got = shrink(np.column_stack([estimates, -estimates]), np.column_stack([errors, errors]))
    assert (np.abs(got.mean_gk[:, 0]) <= np.abs(estimates) + 1e-12).all()
    assert (got.mean_gk[:, 0] * estimates >= 0).all()
    np.testing.assert_allclose(got.mean_gk[:, 1], -got.mean_gk[:, 0], atol=1e-9)
    np.testing.assert_allclose(got.lower_gk[:, 1], -got.upper_gk[:, 0], atol=1e-5)
    assert (got.lower_gk <= got.upper_gk).all()
    assert ((got.false_sign_gk >= -1e-12) & (got.false_sign_gk <= 1 + 1e-9)).all()
    factor = np.divide(got.mean_gk[:, 0], estimates)
    # The same estimate with a larger error.
    again = shrink(np.append(estimates, [1.5, 1.5])[:, None], np.append(errors, [0.2, 1.2])[:, None]).mean_gk[-2:, 0]
    assert again[0] >= again[1]
    assert (factor <= 1 + 1e-12).all()


def test_intervals_hold_and_errors_fall_on_data_like_the_prior():
    theta, estimates, errors = example(5, n=4000)
    got = shrink(estimates[:, None], errors[:, None])
    inside = (got.lower_gk[:, 0] <= theta) & (theta <= got.upper_gk[:, 0])
    assert 0.94 <= inside.mean() <= 0.985, "a point mass makes intervals a little wide"
    assert np.mean((got.mean_gk[:, 0] - theta) ** 2) < 0.5 * np.mean((estimates - theta) ** 2)
    certain = got.false_sign_gk[:, 0] < 0.05
    wrong = np.sign(got.mean_gk[certain, 0]) != np.sign(theta[certain])
    assert certain.sum() > 300
    assert wrong.mean() < 0.05


def test_estimates_that_are_all_zero_stay_zero():
    got = shrink(np.zeros((10, 1)), np.ones((10, 1)))
    np.testing.assert_array_equal(got.mean_gk, 0)


@pytest.mark.parametrize(
    ("weight", "error", "level", "match"),
    [
        (np.ones((3, 2)), np.ones((3, 1)), 0.95, r"`error_gk` must have shape \(3, 2\); got \(3, 1\)"),
        (np.ones(3), np.ones(3), 0.95, "`weight_gk` must have shape"),
        (np.ones((3, 2)), np.zeros((3, 2)), 0.95, "`error_gk` must be positive; got 0"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), 0.95, "`weight_gk` must be finite"),
        (np.ones((3, 2)), np.ones((3, 2)), 1.5, "`level` must lie between 0 and 1"),
    ],
)
def test_bad_input_is_named(weight, error, level, match):
    with pytest.raises(ValueError, match=match):
        shrink(weight, error, level)
