"""Rotated axes: how they are found, and that nothing but the axes changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import ortho_group
from statsmodels.multivariate.factor_rotation import rotate_factors

from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core._views import axes_of_factors
from ldvae_ext.core.cells import EncodedCells, PosteriorAxes
from ldvae_ext.core.rotation import (
    Rotation,
    independent_components,
    loading_varimax,
    promax,
    score_varimax,
    varimax,
)
from tests.core.decoders import COVARIATES, cells, full_decoder
from tests.pairwise import examples
from tests.rotated import oblique

SEEDS = st.integers(0, 10_000)


def criterion(y: np.ndarray) -> float:
    """Kaiser's, column by column: the variance over rows of the squares."""
    return sum(np.mean(column**4) - np.mean(column**2) ** 2 for column in y.T)


def sparse_loadings(n_genes: int = 120, n_factors: int = 4, seed: int = 0, noise: float = 0.1) -> np.ndarray:
    """Each gene in about one of the factors, with either sign, of different scale."""
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, n_factors, n_genes)
    loading = noise * rng.normal(size=(n_genes, n_factors))
    loading[np.arange(n_genes), owner] += rng.gamma(4.0, 0.5, n_genes) * rng.choice([-1, 1], n_genes)
    return loading * np.linspace(1.5, 0.7, n_factors)


def planar_varimax(y: np.ndarray) -> np.ndarray:
    """Kaiser's own algorithm: each pair of columns turned to the best of its angles, in turn, until none gains."""
    y = y.copy()
    for _ in range(500):
        largest = 0.0
        for i, j in itertools.combinations(range(y.shape[1]), 2):
            u, v = y[:, i] ** 2 - y[:, j] ** 2, 2 * y[:, i] * y[:, j]
            across = 2 * (u @ v) - 2 * u.sum() * v.sum() / len(y)
            along = u @ u - v @ v - (u.sum() ** 2 - v.sum() ** 2) / len(y)
            angle = np.arctan2(across, along) / 4
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            y[:, [i, j]] = y[:, [i, j]] @ turn
            largest = max(largest, abs(angle))
        if largest < 1e-10:
            break
    return y


def random_rotation(n: int, seed: int) -> np.ndarray:
    return ortho_group.rvs(n, random_state=seed)


def assert_same_columns(got: np.ndarray, expected: np.ndarray, atol: float):
    """Up to order and sign."""
    near = np.abs(got.T @ expected)
    rows, columns = linear_sum_assignment(-near)
    signs = np.sign((got[:, rows] * expected[:, columns]).sum(axis=0))
    np.testing.assert_allclose(got[:, rows] * signs, expected[:, columns], rtol=0, atol=atol)


class TestVarimax:
    @pytest.mark.grid(1)
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("n_factors", [2, 4, 7])
    def test_is_as_high_as_that_of_other_algorithms_and_the_same_where_the_maximum_is_clear(self, seed, n_factors):
        loading = sparse_loadings(n_factors=n_factors, seed=seed) @ random_rotation(n_factors, seed)
        got, kaiser = loading @ varimax(loading), planar_varimax(loading)
        assert criterion(got) >= criterion(kaiser) - 1e-9
        assert_same_columns(got, kaiser, 1e-5)
        if seed == 0:
            theirs, _ = rotate_factors(loading, "varimax")
            assert criterion(got) >= criterion(theirs) - 1e-9
            assert_same_columns(got, theirs, 1e-3)

    @pytest.mark.grid(0)
    @pytest.mark.parametrize("seed", range(8))
    def test_is_as_high_as_that_of_another_algorithm_where_there_are_many_maxima(self, seed):
        noise = np.random.default_rng(seed).standard_t(4, size=(40, 5))
        assert criterion(noise @ varimax(noise)) >= criterion(planar_varimax(noise)) - 1e-9

    @pytest.mark.grid(0)
    @pytest.mark.parametrize("seed", range(5))
    def test_two_columns_end_on_the_best_of_all_angles(self, seed):
        values = np.random.default_rng(seed).standard_t(3, size=(50, 2))
        angles = np.linspace(0, np.pi / 2, 5_001)  # a quarter turn brings back the same axes
        turned = [values @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles]
        heights = np.array([criterion(y) for y in turned])
        got = values @ varimax(values)
        best = heights.max()
        np.testing.assert_allclose(criterion(got), best, rtol=1e-5)
        assert criterion(got) >= best - 1e-12 * abs(best)
        assert_same_columns(got, turned[int(heights.argmax())], 2e-3 * np.abs(values).max())

    @examples(25)
    @given(SEEDS, st.integers(2, 6))
    def test_does_not_depend_on_the_axes_signs_and_order_that_it_is_given(self, seed, n_factors):
        rng = np.random.default_rng(seed)
        loading = sparse_loadings(60, n_factors, seed, noise=0.3)
        expected = loading @ varimax(loading)
        flips, order = rng.choice([-1, 1], n_factors), rng.permutation(n_factors)
        for given_ in (loading @ random_rotation(n_factors, seed), loading * flips, loading[:, order]):
            assert_same_columns(given_ @ varimax(given_), expected, 1e-5)

    @examples(40)
    @given(SEEDS, st.integers(1, 7), st.integers(1, 40), st.sampled_from([1e-8, 1.0, 1e8]))
    def test_is_orthogonal_whatever_it_is_given(self, seed, n_columns, n_rows, scale):
        values = scale * np.random.default_rng(seed).normal(size=(n_rows, n_columns))
        rotation = varimax(values)
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(n_columns), atol=1e-12)

    def test_the_scale_of_the_values_does_not_matter(self):
        loading = sparse_loadings()
        for scale in (1e-6, 1e6):
            assert_same_columns(loading @ varimax(scale * loading), loading @ varimax(loading), 1e-5)

    def test_one_column_and_zeros_have_nothing_to_rotate(self):
        np.testing.assert_allclose(np.abs(varimax(np.random.default_rng(0).normal(size=(9, 1)))), [[1.0]])
        for shape in ((9, 1), (9, 3)):
            rotation = varimax(np.zeros(shape))
            np.testing.assert_allclose(rotation.T @ rotation, np.eye(shape[1]), atol=1e-15)

    def test_values_of_lower_rank_have_the_factors_of_their_subspace(self):
        loading = sparse_loadings(n_factors=3)
        wide = np.column_stack([loading, np.zeros((len(loading), 2))]) @ random_rotation(5, 0)
        rotation = varimax(wide)
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(5), atol=1e-12)
        got = wide @ rotation
        order = np.argsort(-np.linalg.norm(got, axis=0))
        np.testing.assert_allclose(got[:, order[3:]], 0, atol=0.05)
        assert criterion(got) >= criterion(loading @ varimax(loading)) - 1e-9

    @pytest.mark.grid(0)
    @pytest.mark.parametrize("seed", range(3))
    def test_planted_sparse_factors_are_found_behind_any_rotation(self, seed):
        planted = sparse_loadings(300, 6, seed, noise=0.05)
        given_ = planted @ random_rotation(6, seed)
        got = given_ @ varimax(given_)
        unit = [value / np.linalg.norm(value, axis=0) for value in (got, planted, given_)]
        best = np.abs(unit[0].T @ unit[1])
        assert sorted(best.argmax(axis=0)) == list(range(6))
        assert best.max(axis=0).min() > 0.99
        assert np.abs(unit[2].T @ unit[1]).max(axis=0).min() < 0.9

    def test_two_calls_and_other_global_seeds_give_the_same_to_the_bit(self):
        loading = sparse_loadings()
        first = varimax(loading)
        np.random.seed(5)  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        np.testing.assert_array_equal(varimax(loading), first)
        np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002

    def test_random_starts_help_where_the_principal_axes_end_on_a_lower_maximum(self):
        gains = []
        for seed in (5, 6, 7):
            values = np.random.default_rng(seed).normal(size=(60, 10))
            alone, best = (criterion(values @ varimax(values, **options)) for options in ({"n_starts": 0}, {}))
            gains.append(best / alone - 1)
        assert min(gains) >= -1e-12
        assert max(gains) > 1e-3

    def test_of_loadings_is_that_of_the_centred_ones_and_of_scores_as_well(self):
        decoder = full_decoder(n_genes=80, n_factors=4)
        weight = decoder.weight_gk
        expected = varimax(weight - weight.mean(axis=0))
        np.testing.assert_allclose(loading_varimax(decoder), expected, atol=1e-12)
        shifted = full_decoder(n_genes=80, n_factors=4)._with(weight_gk=weight + [5.0, -3.0, 0.0, 9.0])
        np.testing.assert_allclose(loading_varimax(shifted), expected, atol=1e-6)
        softplus = full_decoder(n_genes=80, n_factors=4, link="softplus")
        np.testing.assert_allclose(loading_varimax(softplus), varimax(weight), atol=1e-12)
        scores = np.random.default_rng(0).gamma(1.0, 1.0, (200, 4)).astype(np.float32)
        expected = varimax(scores - scores.astype(np.float64).mean(axis=0))
        np.testing.assert_allclose(score_varimax(scores), expected, atol=1e-9)


class TestRotation:
    def test_marginal_variances_are_the_diagonal_of_the_covariance(self):
        rng = np.random.default_rng(0)
        rotation = Rotation(matrix_kk=random_rotation(4, 1), method="varimax")
        variance = rng.gamma(1.0, 1.0, (6, 4)).astype(np.float32)
        expected = [np.diag(rotation.matrix_kk.T @ np.diag(v.astype(float)) @ rotation.matrix_kk) for v in variance]
        np.testing.assert_allclose(rotation.variance(variance), expected, rtol=1e-12)
        assert rotation.variance(variance).dtype == np.float64
        assert rotation.names == ["F_0", "F_1", "F_2", "F_3"]

    def test_cells_keep_what_their_covariance_is_made_of(self):
        rng = np.random.default_rng(0)
        rotation = Rotation(matrix_kk=random_rotation(3, 1), method="varimax")
        mean, variance = rng.normal(size=(5, 3)).astype(np.float32), rng.gamma(1.0, 1.0, (5, 3)).astype(np.float32)
        zeros = np.zeros(5, dtype=np.int64)
        given_ = EncodedCells(mean, variance, np.ones(5), zeros, zeros, None, "counts")
        assert given_.axes is None
        np.testing.assert_array_equal(given_.spread.rotation_kk, np.eye(3))
        np.testing.assert_array_equal(given_.spread.variance_nk, variance)
        got = rotation.cells(given_)
        for n in range(5):
            np.testing.assert_allclose(got.mean[n], rotation.matrix_kk.T @ mean[n].astype(float), rtol=1e-12)
            covariance = got.spread.rotation_kk.T @ np.diag(got.spread.variance_nk[n].astype(float))
            np.testing.assert_allclose(np.diag(covariance @ got.spread.rotation_kk), got.variance[n], rtol=1e-12)
        np.testing.assert_array_equal(got.axes.variance_nk, variance)
        np.testing.assert_array_equal(got.axes.rotation_kk, rotation.matrix_kk)
        assert got.mean.dtype == np.float64
        for part in ("library", "batch", "label", "counts"):
            assert getattr(got, part) is getattr(given_, part)

    def test_arranged_permutes_and_turns(self):
        rotation = Rotation(matrix_kk=random_rotation(3, 1), method="score-varimax")
        turned = rotation.arranged([2, 0, 1], np.array([1, -1, 1]))
        z = np.random.default_rng(0).normal(size=(4, 3))
        np.testing.assert_allclose(z @ turned.matrix_kk, (z @ rotation.matrix_kk)[:, [2, 0, 1]] * [1, -1, 1])
        assert turned.method == "score-varimax"

    def test_oblique_factors_have_the_prior_of_their_axes(self):
        rotation = Rotation(matrix_kk=oblique(3), method="promax")
        z = np.random.default_rng(0).normal(size=(200_000, 3))
        f = z @ rotation.matrix_kk
        np.testing.assert_allclose(rotation.correlation_kk, np.cov(f.T), atol=0.02)
        np.testing.assert_allclose(f @ rotation.inverse_kk, z, atol=1e-12)
        assert not rotation.is_orthogonal
        assert Rotation(matrix_kk=random_rotation(3, 0), method="varimax").is_orthogonal

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [
            (np.eye(3) * 1.001, "must have unit length; their squared lengths differ from 1 by 0.002"),
            (np.array([[1.0, 1.0], [0.0, 1e-5]]), "must be independent"),
            (np.full((2, 2), np.nan), "must be finite; 4 of 4 values are not"),
            (np.eye(3)[:, :2], r"must have shape \(3, 3\); got \(3, 2\)"),
            (np.ones(3), r"must have shape \(3, 3\); got \(3,\)"),
        ],
    )
    def test_what_are_no_axes_is_refused(self, matrix, message):
        with pytest.raises(ValueError, match=message):
            Rotation(matrix_kk=matrix, method="varimax")
        decoder = full_decoder(n_factors=len(matrix))
        with pytest.raises(ValueError, match=message):
            decoder.rotated(matrix)

    def test_a_matrix_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"must have shape \(3, 3\); got \(2, 2\)"):
            full_decoder().rotated(np.eye(2))
        assert axes_of_factors(np.eye(2, dtype=np.float32), 2).dtype == np.float64

    def test_a_logistic_normal_latent_is_refused_with_the_reason(self):
        decoder = full_decoder(latent_distribution="ln")
        with pytest.raises(ValueError, match=r"cannot be rotated: z = softmax\(u\) is on the simplex"):
            decoder.rotated(np.eye(3))


# What a decoder may be: link, and what depends on it.
LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
KINDS = [
    {"likelihood": likelihood, "dispersion": dispersion, "link": link, "covariates": covariates}
    for (likelihood, dispersion), link, covariates in itertools.product(
        itertools.product(LIKELIHOODS, DISPERSIONS), ("softmax", "softplus"), (COVARIATES, ())
    )
    if likelihood != "poisson" or dispersion == "gene"
]


def kind_id(kind):
    return "-".join([kind["likelihood"], kind["dispersion"], kind["link"], f"{len(kind['covariates'])}"])


def every_kind(test):
    return pytest.mark.grid(pytest.mark.parametrize("kind", KINDS, ids=kind_id)(test))


FEW = examples(5)


def decoded(decoder, z, c):
    """Everything that is decoded from latents; each head by a formula of its own."""
    out = {
        "scale": decoder.scale(z, c["batch"], c["covariates"]),
        "rate": decoder.rate(z, c["batch"], c["covariates"], library=np.arange(len(z)) + 10.0),
    }
    if decoder.likelihood == "zinb":
        out["dropout"] = decoder.dropout_logits(z, c["batch"], c["covariates"])
    if decoder.dispersion == "gene-cell" and decoder.likelihood != "poisson":
        out["theta"] = decoder.theta(c["batch"], len(z), z_nk=z, covariates=c["covariates"])
    return out


def assert_decodes_alike(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


def prepared(kind, seed):
    decoder = full_decoder(seed, n_genes=8, n_factors=4, **kind)
    c = cells(decoder, 5, seed)
    return decoder, c, decoded(decoder, c["z"], c)


class TestPromax:
    def test_equals_the_pattern_and_correlations_of_factor_analysis(self):
        value = sparse_loadings(seed=2) @ random_rotation(4, 2)
        rotation = varimax(value)
        axes = promax(value, rotation, 4)
        # As textbooks have it: pattern V U D and correlations D^-1 (U'U)^-1 D^-1, with a unit diagonal.
        v = value @ rotation
        u = np.linalg.inv(v.T @ v) @ v.T @ (np.sign(v) * v**4)
        correlation = np.linalg.inv(u.T @ u)
        d = np.sqrt(np.diag(correlation))
        np.testing.assert_allclose(value @ np.linalg.inv(axes).T, v @ u * d, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(axes.T @ axes, correlation / np.outer(d, d), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_finds_correlated_factors_better_than_varimax(self, seed):
        true = oblique(4, seed)
        value = sparse_loadings(seed=seed, noise=0.02) @ true.T
        orthogonal = varimax(value)
        found = promax(value, orthogonal)

        def worst(axes):
            return np.abs(true.T @ axes).max(axis=1).min()

        assert worst(found) > 0.97
        assert worst(found) > worst(orthogonal)

    def test_depends_on_no_axes_and_no_scale(self):
        value, turn = sparse_loadings(seed=3), random_rotation(4, 5)
        found = promax(value, varimax(value))
        again = promax(7 * value @ turn, varimax(value @ turn))
        np.testing.assert_allclose(np.abs((turn @ again).T @ found).max(axis=0), 1, atol=1e-6)

    def test_a_power_of_one_leaves_the_rotation_and_an_unused_factor_stays(self):
        value = sparse_loadings(seed=4)
        value[:, 2] = 0
        rotation = np.eye(4)
        np.testing.assert_allclose(promax(value, rotation, 1), rotation, atol=1e-12)
        axes = promax(value, rotation)
        np.testing.assert_allclose(axes[:, 2], rotation[:, 2], atol=1e-12)
        np.testing.assert_array_equal(promax(np.zeros((5, 3)), np.eye(3)), np.eye(3))

    def test_a_start_that_is_no_rotation_and_a_power_below_one_are_refused(self):
        value = sparse_loadings()
        with pytest.raises(ValueError, match="`rotation_kk` must be orthogonal"):
            promax(value, oblique(4), 3)
        with pytest.raises(ValueError, match=r"`power` must be a finite number of at least 1; got 0\.5"):
            promax(value, np.eye(4), 0.5)
        with pytest.raises(ValueError, match=r"must have shape \(4, 4\)"):
            promax(value, np.eye(3))


class TestIndependentComponents:
    def test_recovers_independent_sources_and_leaves_unused_latents(self):
        rng = np.random.default_rng(0)
        source = rng.laplace(size=(4000, 3)) * [1.0, 0.5, 0.2]
        mixing = oblique(3, 1)
        mean = np.column_stack([source @ np.linalg.inv(mixing), 1e-4 * rng.normal(size=4000)])
        axes = independent_components(mean)
        np.testing.assert_allclose(np.linalg.norm(axes, axis=0), 1)
        correlation = np.abs(np.corrcoef((mean @ axes).T, source.T)[:4, 4:])
        assert correlation.max(axis=0).min() > 0.99
        np.testing.assert_allclose(np.abs(axes[3]).max(), 1, atol=1e-3)

    def test_cells_that_are_all_alike_have_orthogonal_axes(self):
        axes = independent_components(np.ones((20, 3)))
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)


class TestInvariances:
    @every_kind
    @FEW
    @given(seed=SEEDS)
    def test_rotation(self, kind, seed):
        decoder, c, expected = prepared(kind, seed)
        rotation = random_rotation(4, seed)
        rotated = decoder.rotated(rotation)
        assert_decodes_alike(decoded(rotated, c["z"] @ rotation, c), expected)
        assert rotated.factors.tolist() == ["F_0", "F_1", "F_2", "F_3"]
        assert decoder.rotated(rotation, ["a", "b", "c", "d"]).factors.tolist() == ["a", "b", "c", "d"]
        assert_decodes_alike(decoded(rotated.rotated(rotation.T), c["z"], c), expected)

    @every_kind
    @FEW
    @given(seed=SEEDS)
    def test_oblique_axes(self, kind, seed):
        decoder, c, expected = prepared(kind, seed)
        axes = oblique(4, seed)
        rotated = decoder.rotated(axes)
        assert_decodes_alike(decoded(rotated, c["z"] @ axes, c), expected)

    @every_kind
    @FEW
    @given(
        seed=SEEDS, order=st.permutations(range(4)), signs=st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4)
    )
    def test_permutation_and_sign(self, kind, seed, order, signs):
        decoder, c, expected = prepared(kind, seed)
        moved = c["z"][:, order] * signs
        assert_decodes_alike(decoded(decoder.reordered(order, signs), moved, c), expected)
        # A rotation that does the same.
        matrix = np.eye(4)[:, order] * signs
        assert_decodes_alike(decoded(decoder.rotated(matrix), moved, c), expected)

    @every_kind
    @FEW
    @given(seed=SEEDS)
    def test_gauge(self, kind, seed):
        decoder, c, expected = prepared(kind, seed)
        rng = np.random.default_rng(seed)
        centred = decoder.centered()
        assert_decodes_alike(decoded(centred, c["z"], c), expected)
        if kind["link"] == "softplus":
            np.testing.assert_array_equal(centred.weight_gk, decoder.weight_gk)
            return
        effect = decoder.covariate_cg
        shifted = decoder._with(
            weight_gk=decoder.weight_gk + rng.normal(size=4),
            intercept_bg=decoder.intercept_bg + rng.normal(size=(2, 1)),
            covariate_cg=None if effect is None else effect + rng.normal(size=(len(effect), 1)),
        )
        assert_decodes_alike(decoded(shifted, c["z"], c), expected)
        for part in ("weight_gk", "intercept_bg", "covariate_cg"):
            value = getattr(centred, part)
            if value is not None:
                np.testing.assert_allclose(value.sum(axis=0 if part == "weight_gk" else 1), 0, atol=1e-12)
                np.testing.assert_allclose(getattr(shifted.centered(), part), value, atol=1e-12)

    @every_kind
    @FEW
    @given(seed=SEEDS)
    def test_all_of_them_together(self, kind, seed):
        decoder, c, expected = prepared(kind, seed)
        rotation = random_rotation(4, seed)
        rotated = decoder.rotated(rotation)
        signs = rotated.signs()
        canonical = rotated.reordered([3, 1, 0, 2], signs[[3, 1, 0, 2]]).centered()
        moved = (c["z"] @ rotation * signs)[:, [3, 1, 0, 2]]
        assert_decodes_alike(decoded(canonical, moved, c), expected)
        # The canonical form does not remember the axes that it came from.
        other = random_rotation(4, seed + 1)
        again = decoder.rotated(other).rotated(other.T @ rotation)
        again = again.reordered([3, 1, 0, 2], again.signs()[[3, 1, 0, 2]]).centered()
        np.testing.assert_allclose(again.weight_gk, canonical.weight_gk, atol=1e-10)

    @examples(50)
    @given(SEEDS, st.integers(1, 6))
    def test_the_divergence_of_a_rotated_posterior_with_its_full_covariance(self, seed, n_factors):
        rng = np.random.default_rng(seed)
        mean, variance = rng.normal(size=(4, n_factors)), np.exp(rng.uniform(-4, 1, (4, n_factors)))
        rotation = Rotation(
            matrix_kk=random_rotation(n_factors, seed) if n_factors > 1 else -np.eye(1), method="varimax"
        )
        zeros = np.zeros(4, dtype=np.int64)
        got = rotation.cells(EncodedCells(mean, variance, np.ones(4), zeros, zeros, None, None))
        total = kl_per_dimension(mean, variance).sum(axis=1)
        for n in range(4):
            axes = PosteriorAxes(got.axes.variance_nk[n], got.axes.rotation_kk)
            covariance = axes.rotation_kk.T @ np.diag(axes.variance_nk) @ axes.rotation_kk
            _, log_det = np.linalg.slogdet(covariance)
            kl = 0.5 * (got.mean[n] @ got.mean[n] + np.trace(covariance) - n_factors - log_det)
            np.testing.assert_allclose(kl, total[n], rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(np.trace(covariance), got.variance[n].sum(), rtol=1e-12)
        # Of the margins alone it is smaller: what they have in common is left out.
        assert (kl_per_dimension(got.mean, got.variance).sum(axis=1) <= total + 1e-10).all()
