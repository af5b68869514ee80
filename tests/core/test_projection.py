"""Posteriors from the decoder alone: against optimisers and differences that know nothing of its derivatives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal

from ldvae_ext.core.likelihood import log_likelihood
from ldvae_ext.core.projection import _newton_step, posterior_of
from ldvae_ext.kernels.threads import compiled
from tests.core.decoders import COVARIATES, full_decoder
from tests.pairwise import examples
from tests.rotated import oblique

SEEDS = st.integers(0, 10_000)
KINDS = [
    {"likelihood": likelihood, "dispersion": dispersion, "link": link, "latent_distribution": latent}
    for likelihood in ("nb", "zinb", "poisson", "normal")
    for dispersion in ("gene", "gene-batch", "gene-label", "gene-cell")
    for link in ("softmax", "softplus")
    for latent in ("normal", "ln")
    if likelihood != "poisson" or dispersion == "gene"
]


def problem(kind, seed, n_cells=2, n_factors=2, n_genes=12):
    """A decoder, counts drawn from it, and the arguments of the cells."""
    decoder = full_decoder(seed, n_genes=n_genes, n_factors=n_factors, covariates=COVARIATES, **kind)
    rng = np.random.default_rng(seed)
    arguments = {
        "batch": decoder.batches[rng.integers(0, len(decoder.batches), n_cells)],
        "covariates": {
            c.name: rng.normal(size=n_cells) if c.levels is None else rng.choice(c.levels, n_cells)
            for c in decoder.covariates
        },
        "library": rng.uniform(20, 300, n_cells),
    }
    if decoder.labels is not None:
        arguments["label"] = decoder.labels[rng.integers(0, len(decoder.labels), n_cells)]
    u = rng.normal(size=(n_cells, n_factors))
    x = rng.poisson(rate(decoder, u, arguments)).astype(float)
    return decoder, x, arguments


def rate(decoder, u, arguments):
    z = softmax(u, axis=1) if decoder.latent_distribution == "ln" else u
    return decoder.rate(z, arguments["batch"], arguments["covariates"], library=arguments["library"])


def log_joint(decoder, x, arguments, n, u_sk, covariance=None):
    """``log p(x | u) + log N(u; 0, C)`` of one cell at several points."""
    one = {name: value if name == "covariates" else np.repeat(value[n], len(u_sk)) for name, value in arguments.items()}
    one["covariates"] = {name: np.repeat(value[n], len(u_sk)) for name, value in arguments["covariates"].items()}
    z = softmax(u_sk, axis=1) if decoder.latent_distribution == "ln" else u_sk
    theta = dropout = None
    if decoder.likelihood != "poisson":
        theta = decoder.theta(one["batch"], len(z), label=one.get("label"), z_nk=z, covariates=one["covariates"])
    if decoder.likelihood == "zinb":
        dropout = decoder.dropout_logits(z, one["batch"], one["covariates"])
    value = log_likelihood(decoder.likelihood, x[n], rate(decoder, u_sk, one), theta, dropout).sum(axis=1)
    covariance = np.eye(u_sk.shape[1]) if covariance is None else covariance
    return value + multivariate_normal(np.zeros(u_sk.shape[1]), covariance).logpdf(u_sk)


def hessian_by_differences(function, at, step):
    """Central differences at two steps, extrapolated."""
    k = len(at)

    def at_step(step):
        shift, out = step * np.eye(k), np.zeros((k, k))
        for i in range(k):
            for j in range(k):
                points = [at + a * shift[i] + b * shift[j] for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
                out[i, j] = function(np.array(points)) @ [1, -1, -1, 1] / (4 * step**2)
        return out

    return (4 * at_step(step / 2) - at_step(step)) / 3


def kind_id(kind):
    return "-".join(kind.values())


@pytest.mark.grid
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@examples(3)
@given(seed=SEEDS)
def test_mode_and_covariance_are_those_of_an_optimiser_and_of_differences(kind, seed):
    decoder, x, arguments = problem(kind, seed, n_cells=1)
    got = posterior_of(decoder, x, **arguments)
    assert got.converged_n.all()
    for n in range(len(x)):

        def function(u_sk, n=n):
            return log_joint(decoder, x, arguments, n, np.atleast_2d(u_sk))

        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
        # From near our mode or from the prior mean: another mode that is higher could be found.
        start = got.mean_nk[n] + 0.3 if seed % 2 else np.zeros(2)
        found = minimize(lambda u: -function(u)[0], start, method="Nelder-Mead", options=options)
        if -found.fun < function(got.mean_nk[n])[0] - 1e-6:
            found = minimize(lambda u: -function(u)[0], got.mean_nk[n] + 0.01, method="Nelder-Mead", options=options)
        at_mode = function(got.mean_nk[n])[0]
        if at_mode < -found.fun - 1e-6:
            # Under zero inflation and for the normal distribution there can be two modes.
            assert kind["likelihood"] in ("zinb", "normal") or kind["dispersion"] == "gene-cell"
            continue
        # Function values that differ by rounding alone belong to points that are so far apart.
        rounding = 10 * np.sqrt(np.finfo(float).eps * abs(found.fun) * got.variance_nk[n].max())
        np.testing.assert_allclose(got.mean_nk[n], found.x, atol=1e-6 + rounding)
        step = 0.05 * np.sqrt(np.linalg.eigvalsh(got.covariance_nkk[n])[0])
        hessian = -hessian_by_differences(function, got.mean_nk[n], step)
        np.testing.assert_allclose(
            np.linalg.inv(got.covariance_nkk[n]), hessian, rtol=0, atol=1e-4 * np.abs(hessian).max()
        )
        np.testing.assert_allclose(got.variance_nk[n], np.diag(got.covariance_nkk[n]))
        expected = at_mode + np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(got.covariance_nkk[n])[1]
        np.testing.assert_allclose(got.log_evidence_n[n], expected, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_evidence_is_that_of_importance_sampling(likelihood):
    kind = {"likelihood": likelihood, "dispersion": "gene", "link": "softmax", "latent_distribution": "normal"}
    # Many genes, so that the posterior is near normal.
    decoder, x, arguments = problem(kind, 3, n_cells=4, n_genes=400)
    arguments["library"] *= 20
    got, rng = posterior_of(decoder, x, **arguments), np.random.default_rng(0)
    for n in range(4):
        proposal = multivariate_normal(got.mean_nk[n], 1.5 * got.covariance_nkk[n])
        u = proposal.rvs(100_000, random_state=rng)
        log_weight = log_joint(decoder, x, arguments, n, u) - proposal.logpdf(u)
        np.testing.assert_allclose(got.log_evidence_n[n], logsumexp(log_weight) - np.log(len(u)), atol=0.05)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=kind_id)
def test_oblique_axes_have_the_posterior_of_the_network_axes(kind):
    decoder, x, arguments = problem(kind, 1, n_cells=5, n_factors=3)
    plain, axes = posterior_of(decoder, x, **arguments), oblique(3)
    got = posterior_of(decoder.rotated(axes), x, **arguments, prior_covariance_kk=axes.T @ axes)
    np.testing.assert_allclose(got.mean_nk, plain.mean_nk @ axes, atol=1e-6)
    np.testing.assert_allclose(got.covariance_nkk, axes.T @ plain.covariance_nkk @ axes, atol=1e-6)
    np.testing.assert_allclose(got.log_evidence_n, plain.log_evidence_n, atol=1e-6)


def test_chunks_starts_and_sparse_counts_change_nothing():
    decoder, x, arguments = problem(KINDS[0], 2, n_cells=9, n_factors=3)
    plain = posterior_of(decoder, x, **arguments)
    for other in (
        posterior_of(decoder, sparse.csr_array(x), **arguments, chunk_size=2),
        posterior_of(decoder, x, **arguments, start_nk=plain.mean_nk + 0.5),
    ):
        np.testing.assert_allclose(other.mean_nk, plain.mean_nk, atol=1e-6)
        np.testing.assert_allclose(other.log_evidence_n, plain.log_evidence_n, atol=1e-8)
    only = posterior_of(decoder, x, **arguments, covariance=False)
    assert only.covariance_nkk is None
    np.testing.assert_array_equal(only.variance_nk, plain.variance_nk)


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
@pytest.mark.parametrize("n_factors", [1, 2, 3, 5, 8, 11])
def test_compiled_loops_find_the_modes_of_numpy(likelihood, n_factors):
    dispersion = {1: "gene-batch", 2: "gene-label"}.get(n_factors, "gene") if likelihood == "nb" else "gene"
    kind = {**KINDS[0], "likelihood": likelihood, "dispersion": dispersion}
    # More genes than fit in one block.
    decoder, x, arguments = problem(kind, n_factors, n_cells=120, n_factors=n_factors, n_genes=610)
    arguments["library"] *= 10
    axes = oblique(n_factors) if n_factors > 1 else np.eye(1)
    arguments["prior_covariance_kk"] = axes.T @ axes
    with compiled(on=False):
        expected = posterior_of(decoder, x, **arguments)
    # Near the modes, since there can be several.
    start = expected.mean_nk + np.random.default_rng(0).normal(scale=0.02, size=expected.mean_nk.shape)
    with compiled(on=True, n_threads=2):
        got = posterior_of(decoder, sparse.csr_array(x), **arguments, start_nk=start)
    assert got.converged_n.all()
    assert expected.converged_n.all()
    for name in ("mean_nk", "variance_nk", "covariance_nkk", "log_evidence_n"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_compiled_loops_find_maxima_from_far_away(likelihood):
    decoder, x, arguments = problem({**KINDS[0], "likelihood": likelihood}, 7, n_cells=60, n_factors=4, n_genes=1200)
    start = np.random.default_rng(0).normal(scale=3, size=(60, 4))
    with compiled(on=True, n_threads=1):
        got = posterior_of(decoder, x, **arguments, start_nk=start)
        again = posterior_of(decoder, x, **arguments, start_nk=got.mean_nk)
    assert got.converged_n.all()
    np.testing.assert_allclose(again.mean_nk, got.mean_nk, atol=1e-6)
    for n in range(5):
        points = got.mean_nk[n] + np.random.default_rng(n).normal(scale=1e-2, size=(50, 4))
        assert (
            log_joint(decoder, x, arguments, n, points) < log_joint(decoder, x, arguments, n, got.mean_nk[[n]])
        ).all()


def test_compiled_loops_leave_points_without_a_maximum_to_numpy(monkeypatch):
    from ldvae_ext.kernels import posterior

    def undecided(start, stop, z_nk, *arguments):
        arguments[-1][start:stop] = posterior.INDEFINITE

    decoder, x, arguments = problem(KINDS[0], 5, n_cells=40, n_factors=2, n_genes=2000)
    with compiled(on=True, n_threads=1):
        expected = posterior_of(decoder, x, **arguments)
        monkeypatch.setattr(posterior, "modes", undecided)
        got = posterior_of(decoder, x, **arguments)
    for value, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


def test_iterations_that_do_not_suffice_are_reported():
    decoder, x, arguments = problem(KINDS[0], 5, n_cells=40, n_factors=2, n_genes=2000)
    for on in (False, True):
        with compiled(on=on):
            assert not posterior_of(decoder, x, **arguments, max_iterations=1).converged_n.any()
    start = posterior_of(decoder, x, **arguments).mean_nk + 0.1
    results = []
    for on in (False, True):
        with compiled(on=on):
            results.append(posterior_of(decoder, x, **arguments, start_nk=start, max_iterations=1, tolerance=1e-12))
    assert not results[0].converged_n.any()
    # Variance and evidence are those at the point that was reached.
    for n in range(3):
        u = results[1].mean_nk[n]
        step = 1e-3
        hessian = -hessian_by_differences(lambda p, n=n: log_joint(decoder, x, arguments, n, p), u, step)
        np.testing.assert_allclose(
            np.linalg.inv(results[1].covariance_nkk[n]), hessian, rtol=1e-3, atol=1e-2 * hessian.max()
        )


def test_cells_with_several_modes_do_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    decoder, x, arguments = problem({**KINDS[0], "dispersion": "gene"}, 3, n_cells=300, n_factors=8, n_genes=150)
    weight = rng.normal(scale=1.5, size=decoder.weight_gk.shape)
    decoder = decoder._with(weight_gk=weight)
    ends = rng.normal(size=(2, 300, 8)) * 2
    x = rng.poisson(0.5 * (rate(decoder, ends[0], arguments) + rate(decoder, ends[1], arguments))).astype(float)
    whole = posterior_of(decoder, x, **arguments).mean_nk
    for at in (slice(0, 3), slice(10, 60)):
        some = {
            name: v[at] if name != "covariates" else {c: w[at] for c, w in v.items()} for name, v in arguments.items()
        }
        np.testing.assert_allclose(posterior_of(decoder, x[at], **some, chunk_size=7).mean_nk, whole[at], atol=1e-6)


def test_genes_that_were_not_measured_are_left_out():
    decoder, x, arguments = problem(KINDS[0], 6, n_cells=5, n_genes=30)
    some = [3, 20, 7, 11, 0, 29, 16, 2, 25, 9]
    part = decoder.with_genes(decoder.genes[some])
    z = np.random.default_rng(0).normal(size=(5, 2))
    scale = decoder.scale(z, arguments["batch"], arguments["covariates"])[:, some]
    got = part.scale(z, arguments["batch"], arguments["covariates"])
    np.testing.assert_allclose(got, scale / scale.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(part.theta_bg, decoder.theta_bg[:, some])
    # A loading that the panel does not have leaves its factor at the prior.
    blind = part._with(weight_gk=part.weight_gk * [1, 0])
    found = posterior_of(blind, x[:, some], **arguments)
    np.testing.assert_allclose(found.mean_nk[:, 1], 0, atol=1e-9)
    np.testing.assert_allclose(found.variance_nk[:, 1], 1)
    for wrong in (["g3", "g3"], ["g3", "other"]):
        with pytest.raises(ValueError, match=r"must be different genes of the decoder; got '(g3|other)'"):
            decoder.with_genes(wrong)


def test_a_cell_without_counts_is_nearly_at_the_prior():
    decoder, x, arguments = problem(KINDS[0], 4, n_cells=2, n_genes=40)
    del arguments["library"]
    x[0] = 0
    got = posterior_of(decoder, x, **arguments)
    assert np.abs(got.mean_nk[0]).max() < 0.5
    assert got.variance_nk[0].min() > 0.5
    assert got.converged_n.all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"library": 0}, "`library` must be positive"),
        ({"library": np.nan}, "`library` must be positive"),
        ({"start_nk": np.zeros((2, 3))}, r"`start_nk` must be finite, of shape \(2, 2\)"),
        ({"prior_covariance_kk": np.ones((2, 2))}, "`prior_covariance_kk` must be a symmetric, positive definite"),
        ({"prior_covariance_kk": np.array([[1.0, 0.5], [0.0, 1.0]])}, "must be a symmetric"),
        ({"library": [1.0, 2.0, 3.0]}, "`library` must be one number, or one for each of 2 cells; got 3"),
        ({"x_ng": np.full((2, 12), -1.0)}, "`x_ng` holds values that are not finite, or negative"),
        ({"x_ng": np.full((2, 12), np.nan)}, "`x_ng` holds values that are not finite, or negative"),
        ({"tolerance": -1.0}, "`tolerance` must be positive"),
        ({"max_iterations": 0}, "`max_iterations`"),
        ({"chunk_size": 0}, "`chunk_size`"),
        ({"x_ng": np.zeros((2, 3))}, r"`x_ng` must be cells x the decoder's 12 genes; got shape \(2, 3\)"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, match):
    decoder, x, arguments = problem(KINDS[0], 0)
    with pytest.raises(ValueError, match=match):
        posterior_of(decoder, **{"x_ng": x, **arguments, **change})


def test_a_cell_with_an_indefinite_hessian_does_not_change_the_others():
    step = _newton_step(np.ones((2, 2)), np.array([np.diag([0.01, 2.0]), np.diag([-1.0, 1.0])]))
    np.testing.assert_allclose(step, [[100, 0.5], [1, 1]])


def test_rates_that_vanish_leave_numbers():
    decoder, x, arguments = problem({**KINDS[0], "link": "softplus"}, 0)
    intercept = decoder.intercept_bg.copy()
    intercept[:, 3] = -800
    got = posterior_of(decoder._with(intercept_bg=intercept), x * (np.arange(12) != 3), **arguments)
    assert np.isfinite(got.variance_nk).all()


def test_size_factors_must_be_given():
    decoder, x, arguments = problem({**KINDS[0], "link": "softplus"}, 0)
    del arguments["library"]
    with pytest.raises(ValueError, match="`library` is needed"):
        posterior_of(decoder, x, **arguments)
