from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import logsumexp, xlogy
from scipy.stats import multivariate_normal, norm, ortho_group

from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.ledger import InformationLedger, _JointMixture, _Mixture, information_ledger
from tests.pairwise import examples
from tests.rotated import oblique

PER_FACTOR = ("kl_k", "mutual_information_k", "dimension_wise_kl_k", "total_correlation_k")
JOINT = ("kl", "mutual_information", "total_correlation", "dimension_wise_kl")


def posteriors(n_cells, n_latent, seed=0, n_collapsed=0):
    """Clusters with variances from 0.02 to 1, the last few latents next to the prior."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(6, n_latent))[rng.integers(0, 6, n_cells)] * 1.3 + 0.4 * rng.normal(
        size=(n_cells, n_latent)
    )
    variance = np.exp(rng.uniform(np.log(0.02), 0, (n_cells, n_latent)))
    if n_collapsed:
        mean[:, -n_collapsed:] *= 0.02
        variance[:, -n_collapsed:] = 1 - 0.02 * rng.random((n_cells, n_collapsed))
    return mean, variance


# Axes with an angle of 53 degrees between them.
OBLIQUE = np.array([[1.0, 0.6], [0.0, 0.8]])


def turn(degrees):
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def assert_same(got: InformationLedger, expected: InformationLedger, atol: float, order=slice(None)):
    assert got.n_cells == expected.n_cells
    for name in PER_FACTOR:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name)[order], atol=atol, err_msg=name)
    for name in JOINT:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=atol, err_msg=name)


@pytest.mark.grid(0)
@pytest.mark.parametrize("degrees", [None, 0, 33, 90, "oblique"])
def test_two_factors_have_the_ledger_of_a_grid(degrees):
    mean, variance = posteriors(5, 2, seed=3)
    rotation = OBLIQUE if degrees == "oblique" else None if degrees is None else turn(degrees)
    axes = np.eye(2) if rotation is None else rotation
    x = np.linspace(-9, 9, 721)
    step = x[1] - x[0]
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1)
    q_n = [multivariate_normal(m @ axes, axes.T @ np.diag(v) @ axes).pdf(grid) for m, v in zip(mean, variance)]
    prior, prior_1d = multivariate_normal(np.zeros(2), axes.T @ axes).pdf(grid), norm.pdf(x)

    def kl(q, p):
        held = q > 1e-200
        return (q[held] * np.log(q[held] / p[held])).sum() * step**q.ndim

    q = np.mean(q_n, axis=0)
    margins = [q.sum(axis=1 - k) * step for k in range(2)]
    margins_n = [[q_one.sum(axis=1 - k) * step for q_one in q_n] for k in range(2)]
    dependence = kl(q, np.multiply.outer(*margins))
    expected = InformationLedger(
        kl_k=np.array([np.mean([kl(q_one, prior_1d) for q_one in one]) for one in margins_n]),
        mutual_information_k=np.array(
            [np.mean([kl(q_one, margin) for q_one in one]) for one, margin in zip(margins_n, margins)]
        ),
        dimension_wise_kl_k=np.array([kl(margin, prior_1d) for margin in margins]),
        total_correlation_k=np.full(2, dependence),  # of two factors each shares all with the other
        kl=np.mean([kl(q_one, prior) for q_one in q_n]),
        mutual_information=np.mean([kl(q_one, q) for q_one in q_n]),
        total_correlation=dependence,
        dimension_wise_kl=sum(kl(margin, prior_1d) for margin in margins),
        n_cells=5,
    )
    got = information_ledger(mean, variance, rotation, n_samples=40_000, chunk_size=20_000)
    for name in (*PER_FACTOR[:3], "kl", "dimension_wise_kl"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=1e-5, err_msg=name)
    # Standard errors are about 0.001.
    for name in ("total_correlation_k", "mutual_information", "total_correlation"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=6e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["network", "orthogonal", "oblique"])
def test_log_densities_are_those_of_a_sum_over_full_gaussians(kind):
    mean, variance = posteriors(30, 4)
    variance[:5] = 1e-6
    axes = {
        "network": np.eye(4),
        "orthogonal": ortho_group.rvs(4, random_state=0),
        "oblique": oblique(4),
    }[kind]
    # The last is so far from all that each density underflows.
    z = np.concatenate(
        [mean + 0.1, mean[:5] + 1e-4, np.random.default_rng(1).normal(size=(20, 4)), np.full((1, 4), 60.0)]
    )
    directions = np.linalg.inv(axes).T
    joint, others = _JointMixture(mean + 5, variance, directions).log_density(z + 5)
    log_volume = np.log(np.abs(np.linalg.det(axes)))

    def direct(kept):
        logs = [
            multivariate_normal(m @ axes[:, kept], axes[:, kept].T @ np.diag(v) @ axes[:, kept]).logpdf(
                z @ axes[:, kept]
            )
            for m, v in zip(mean, variance)
        ]
        return logsumexp(logs, axis=0) - np.log(len(mean))

    np.testing.assert_allclose(joint - log_volume, direct([0, 1, 2, 3]), rtol=1e-7)
    for k in range(4):
        np.testing.assert_allclose(others[:, k] - log_volume, direct([i for i in range(4) if i != k]), rtol=1e-7)


@pytest.mark.parametrize("narrowest", [0.3, 0.01, 1e-4])
def test_margins_of_any_scale_are_tabulated_and_integrated(narrowest):
    rng = np.random.default_rng(0)
    mean, sd = rng.normal(size=40) * 2, np.exp(rng.uniform(np.log(narrowest), 0, 40))
    mean[:4], sd[:4] = [-30.0, 0.5, 0.5, 30.0], [narrowest, 0.5, narrowest, 2 * narrowest]

    def density(x):
        return norm.pdf(np.asarray(x)[..., None], mean, sd).mean(axis=-1)

    mixture = _Mixture(mean, sd)
    x = np.concatenate([mean + t * sd for t in (-3.3, -1, -0.1, 0, 0.7, 2.9)])
    np.testing.assert_allclose(mixture.density(x), density(x), rtol=2e-3)
    cuts = np.unique((mean[:, None] + np.array([-9, -4, -2, -1, 0, 1, 2, 4, 9]) * sd[:, None]).ravel())
    node, weight = np.polynomial.legendre.leggauss(12)
    half = np.diff(cuts)[:, None] / 2
    q = density(cuts[:-1, None] + half * (1 + node))
    np.testing.assert_allclose(mixture.negative_entropy(), (half * weight * xlogy(q, q)).sum(), atol=3e-6)


def test_a_margin_reaches_eight_standard_deviations_and_ends_in_a_gap():
    mean, sd = np.array([-60.0, -40.0, 0.0, 20.0]), np.array([0.999, 0.5, 0.999, 0.999])
    mixture = _Mixture(mean, sd)
    for t in (-7.5, 7.5):
        np.testing.assert_allclose(mixture.density(mean + t * sd), norm.pdf(t) / sd / 4, rtol=0.15)
    np.testing.assert_array_equal(mixture.density(np.array([-100.0, -25.0, 11.0, 100.0])), 0)


def test_components_that_share_a_table_are_counted_in_blocks(monkeypatch):
    mean, sd = np.random.default_rng(0).normal(size=(2, 50)) * [[20.0], [0.1]]
    whole = _Mixture(mean, np.abs(sd) + 0.1)
    monkeypatch.setattr("ldvae_ext.core.ledger._BLOCK", 7)
    blocks = _Mixture(mean, np.abs(sd) + 0.1)
    np.testing.assert_allclose(blocks.density(mean), whole.density(mean), rtol=1e-12)
    np.testing.assert_allclose(blocks.negative_entropy(), whole.negative_entropy(), rtol=1e-12)


def test_one_cell_holds_no_information_and_shares_what_its_rotated_posterior_does():
    mean, variance = np.array([[0.4, -1.0, 0.3]]), np.array([[0.05, 0.6, 1.3]])
    rotation = ortho_group.rvs(3, random_state=2)
    covariance = rotation.T @ np.diag(variance[0]) @ rotation
    got = information_ledger(mean, variance, rotation, n_samples=60_000, chunk_size=30_000)
    np.testing.assert_allclose(got.mutual_information, 0, atol=1e-10)
    np.testing.assert_allclose(got.mutual_information_k, 0, atol=1e-8)
    np.testing.assert_allclose(got.dimension_wise_kl_k, got.kl_k, atol=1e-8)
    correlation = 0.5 * (np.log(np.diag(covariance)).sum() - np.log(variance).sum())
    np.testing.assert_allclose(got.total_correlation, correlation, atol=0.02)
    shared = [0.5 * np.log(covariance[k, k] * np.linalg.inv(covariance)[k, k]) for k in range(3)]
    np.testing.assert_allclose(got.total_correlation_k, shared, atol=0.02)
    np.testing.assert_allclose(got.kl, kl_per_dimension(mean, variance).sum())


def test_cells_far_apart_are_told_from_each_other():
    mean, variance = np.array([[-3.0, 0.0], [3.0, 0.0]]), np.array([[0.01, 0.5], [0.01, 0.5]])
    got = information_ledger(mean, variance)
    np.testing.assert_allclose(got.mutual_information, np.log(2), atol=1e-12)
    np.testing.assert_allclose(got.mutual_information_k, [np.log(2), 0], atol=1e-8)
    np.testing.assert_allclose(got.total_correlation_k, 0, atol=1e-4)
    # Turned by 45 degrees both factors tell the cells apart, and each tells all of that to the other.
    turned = information_ledger(mean, np.full((2, 2), 0.01), turn(45))
    np.testing.assert_allclose(turned.mutual_information_k, np.log(2), atol=1e-8)
    np.testing.assert_allclose([turned.total_correlation, *turned.total_correlation_k], np.log(2), atol=1e-4)


def test_one_latent_has_none_to_share_with():
    mean, variance = posteriors(40, 1)
    got = information_ledger(mean, variance, n_samples=500, chunk_size=4096)
    np.testing.assert_allclose([got.total_correlation, *got.total_correlation_k], 0, atol=1e-5)
    np.testing.assert_allclose(got.mutual_information, got.mutual_information_k[0], atol=0.02)
    q = [norm(m, s).pdf for m, s in zip(mean[:, 0], np.sqrt(variance[:, 0]))]

    def integrand(x):
        value = np.mean([pdf(x) for pdf in q])
        return xlogy(value, value) - value * norm.logpdf(x)

    expected = quad(integrand, -8, 8, limit=200, points=[-2, 0, 2])[0]
    np.testing.assert_allclose(got.dimension_wise_kl, expected, atol=1e-5)


def test_cells_at_the_prior_have_an_empty_ledger():
    got = information_ledger(np.zeros((20, 3)), np.ones((20, 3)), ortho_group.rvs(3, random_state=0))
    assert_same(got, InformationLedger(*[np.zeros(3)] * 4, *[0.0] * 4, n_cells=20), atol=1e-3)


def test_a_signed_permutation_permutes_the_factors():
    mean, variance = posteriors(60, 3)
    order, sign = [2, 0, 1], np.array([-1.0, 1.0, -1.0])
    rotation = np.eye(3)[:, order] * sign
    assert_same(
        information_ledger(mean, variance, rotation), information_ledger(mean, variance), atol=1e-9, order=order
    )


def test_a_rotation_leaves_the_joint_information_and_moves_the_rest():
    mean, variance = posteriors(200, 4)
    plain = information_ledger(mean, variance, seed=3)
    turned = information_ledger(mean, variance, ortho_group.rvs(4, random_state=1), seed=3)
    np.testing.assert_allclose(turned.kl, plain.kl, atol=1e-9)
    np.testing.assert_allclose(turned.mutual_information, plain.mutual_information, atol=1e-9)
    assert abs(turned.total_correlation - plain.total_correlation) > 0.02
    assert np.abs(np.sort(turned.kl_k) - np.sort(plain.kl_k)).max() > 0.05
    float32 = information_ledger(
        mean.astype(np.float32), variance.astype(np.float32), np.eye(4, dtype=np.float32), seed=3
    )
    assert_same(float32, plain, atol=1e-4)


def test_chunks_and_blocks_change_nothing(monkeypatch):
    # One more than whole blocks of 16.
    mean, variance = posteriors(49, 3)
    rotation = ortho_group.rvs(3, random_state=1)
    whole = information_ledger(mean, variance, rotation, n_samples=3, chunk_size=1000)
    assert_same(information_ledger(mean, variance, rotation, n_samples=3, chunk_size=1), whole, atol=1e-10)
    monkeypatch.setattr("ldvae_ext.core.ledger._BLOCK", 16)
    assert_same(information_ledger(mean, variance, rotation, n_samples=3, chunk_size=64), whole, atol=1e-10)


def test_the_seed_decides_what_is_drawn_and_nothing_that_is_integrated():
    mean, variance = posteriors(50, 3)
    first, again, other = (information_ledger(mean, variance, seed=seed) for seed in (1, 1, 2))
    assert_same(again, first, atol=0)
    for name in (*PER_FACTOR[:3], "kl", "dimension_wise_kl"):
        np.testing.assert_array_equal(getattr(other, name), getattr(first, name))
    assert other.mutual_information != first.mutual_information
    assert other.total_correlation != first.total_correlation


@pytest.mark.grid(0)
@pytest.mark.parametrize("rotated", [False, True])
def test_the_parts_add_up_to_the_kl_at_five_thousand_cells(rotated):
    mean, variance = posteriors(5000, 10, n_collapsed=3)
    rotation = ortho_group.rvs(10, random_state=0) if rotated else None
    got = information_ledger(mean, variance, rotation)
    parts = got.mutual_information + got.total_correlation + got.dimension_wise_kl
    assert abs(parts - got.kl) < 0.01 * got.kl
    assert got.dimension_wise_kl == pytest.approx(got.dimension_wise_kl_k.sum())
    assert 0 < got.mutual_information < np.log(5000)
    if not rotated:
        np.testing.assert_allclose(got.kl_k.sum(), got.kl)
        # A latent that says nothing about its cell shares nothing either.
        assert got.mutual_information_k[-3:].max() < 1e-3
        np.testing.assert_allclose(got.total_correlation_k[-3:], 0, atol=1e-3)
        assert got.total_correlation_k[:-3].min() > 0.1


def test_no_array_of_cells_by_cells_is_made():
    mean, variance = posteriors(4000, 2)
    tracemalloc.start()
    # In one octave, so that all cells share a table.
    information_ledger(mean, variance.clip(0.26, 0.9), chunk_size=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.08 * 4000**2 * 8


@given(st.integers(0, 2**31), st.integers(1, 30), st.floats(-12, 2), st.floats(-3, 2))
@examples(60)
def test_a_factor_tells_no_more_than_its_kl_and_no_more_than_there_are_cells(seed, n_cells, log_variance, log_mean):
    rng = np.random.default_rng(seed)
    mean = np.exp(log_mean) * rng.normal(size=(n_cells, 3))
    variance = np.exp(log_variance * rng.random((n_cells, 3)))
    got = information_ledger(mean, variance, ortho_group.rvs(3, random_state=seed % 1000))
    tolerance = 1e-5
    assert (got.mutual_information_k >= -tolerance).all()
    assert (got.mutual_information_k <= np.minimum(got.kl_k, np.log(n_cells)) + tolerance).all()
    assert (got.dimension_wise_kl_k >= -tolerance).all()
    assert got.mutual_information <= np.log(n_cells) + tolerance


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mean_nk": np.zeros((0, 2)), "variance_nk": np.ones((0, 2))}, r"at least one cell .*\(0, 2\)"),
        ({"mean_nk": np.zeros((3, 0)), "variance_nk": np.ones((3, 0))}, "one latent"),
        ({"mean_nk": np.zeros(3)}, r"`mean_nk` must have shape"),
        ({"variance_nk": np.ones((2, 2))}, r"`variance_nk` must have shape \(3, 2\); got \(2, 2\)"),
        ({"variance_nk": np.zeros((3, 2))}, "`variance_nk` must be above"),
        (
            {"mean_nk": np.full((3, 2), 10.0), "variance_nk": np.full((3, 2), 9e-11)},
            "above 1e-10, 1e-12 of the largest",
        ),
        ({"variance_nk": np.full((3, 2), np.nan)}, "must be finite"),
        ({"rotation_kk": np.eye(3)}, r"`rotation_kk` must have shape \(2, 2\)"),
        ({"rotation_kk": np.eye(2) * 1.001}, "must have unit length; .* differ from 1 by 0.002"),
        ({"rotation_kk": np.array([[1.0, 1.0], [0.0, 0.0]])}, "must be independent"),
        ({"n_samples": 0}, "`n_samples`"),
        ({"chunk_size": 0}, "`chunk_size`"),
        ({"seed": -1}, "`seed` must be a non-negative integer below 2\\*\\*64; got -1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(change, match):
    arguments = {"mean_nk": np.zeros((3, 2)), "variance_nk": np.ones((3, 2)), **change}
    with pytest.raises(ValueError, match=match):
        information_ledger(**arguments)
