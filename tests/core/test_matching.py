"""Which factors are the same, and what several models agree on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import ortho_group

from ldvae_ext.core.matching import (
    STABLE,
    UNSTABLE,
    Consensus,
    consensus_loadings,
    consensus_of,
    cosines,
    flags,
    match_columns,
    procrustes,
)
from ldvae_ext.core.rotation import varimax
from tests.pairwise import examples

SEEDS = st.integers(0, 10_000)


def centred(value_gk):
    return value_gk - value_gk.mean(axis=0)


def programs(n_genes=150, n_factors=4, seed=0):
    """Sparse factors, each with a longer tail to one side."""
    rng = np.random.default_rng([seed, 99])
    on = rng.random((n_genes, n_factors)) < 0.15
    return centred(on * rng.gamma(4.0, 0.4, (n_genes, n_factors)) + 0.02 * rng.normal(size=(n_genes, n_factors)))


def runs(truth_gk, n_runs=5, noise=0.15, n_surplus=0, seed=0, *, rotated=True):
    """What models with some noise and some factors of their own find of the truth, each rotated by varimax."""
    out = []
    for m in range(n_runs):
        rng = np.random.default_rng([seed, m])
        found = truth_gk + noise * rng.normal(size=truth_gk.shape)
        own = 0.2 * rng.standard_t(3, size=(len(truth_gk), n_surplus))
        found = centred(np.concatenate([found, own], axis=1))
        found = found @ ortho_group.rvs(found.shape[1], random_state=rng)
        out.append(found @ varimax(found) if rotated else found)
    return out


def nearest(found_gk, truth_gk):
    """Absolute cosine of each true factor with its partner, by brute force over all assignments."""
    cosine = np.abs(np.corrcoef(found_gk.T, truth_gk.T)[: found_gk.shape[1], found_gk.shape[1] :])
    best = max(
        itertools.permutations(range(found_gk.shape[1]), truth_gk.shape[1]),
        key=lambda order: sum(cosine[i, k] for k, i in enumerate(order)),
    )
    return np.array([cosine[i, k] for k, i in enumerate(best)])


class TestMatchColumns:
    def test_cosines_are_those_of_the_definition_and_zero_for_zeros(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(9, 3)), rng.normal(size=(9, 4))
        a[:, 1] = 0
        got = cosines(a, b)
        for k, j in itertools.product((0, 2), range(4)):
            expected = a[:, k] @ b[:, j] / np.sqrt((a[:, k] ** 2).sum() * (b[:, j] ** 2).sum())
            np.testing.assert_allclose(got[k, j], expected, rtol=1e-12)
        np.testing.assert_array_equal(got[1], 0)
        np.testing.assert_allclose(cosines(a * 3, b), got)
        np.testing.assert_array_equal(cosines(np.zeros((9, 2)), np.zeros((9, 2))), 0)

    @examples(60)
    @given(SEEDS, st.integers(1, 5), st.integers(1, 5))
    def test_pairs_have_the_largest_sum_of_all_assignments(self, seed, n_first, n_second):
        cosine = np.random.default_rng(seed).uniform(-1, 1, (n_first, n_second))
        match = match_columns(cosine)
        n_pairs = min(n_first, n_second)
        best = max(
            sum(abs(cosine[k, j]) for k, j in zip(first, second))
            for first in itertools.combinations(range(n_first), n_pairs)
            for second in itertools.permutations(range(n_second), n_pairs)
        )
        np.testing.assert_allclose(match.cosine.sum(), best, rtol=1e-12)
        assert len(set(match.first.tolist())) == len(set(match.second.tolist())) == len(match.first) == n_pairs
        assert (np.diff(match.first) > 0).all()
        np.testing.assert_allclose(match.sign * match.cosine, cosine[match.first, match.second])
        assert set(match.sign.tolist()) <= {-1, 1}

    def test_one_to_one_pairs_are_not_each_factors_own_nearest(self):
        match = match_columns(np.array([[0.9, 0.8], [0.85, 0.1]]))
        assert match.second.tolist() == [1, 0]
        np.testing.assert_allclose(match.cosine, [0.8, 0.85])

    def test_signs_and_order_of_the_same_factors_are_found(self):
        truth = programs()
        order, signs = [2, 0, 3, 1], np.array([-1, 1, 1, -1])
        match = match_columns(cosines(truth, truth[:, order] * signs))
        np.testing.assert_allclose(match.cosine, 1)
        np.testing.assert_array_equal(np.array(order)[match.second], [0, 1, 2, 3])
        np.testing.assert_array_equal(match.sign, signs[match.second])

    def test_a_factor_of_zeros_is_matched_to_what_is_left_with_a_positive_sign(self):
        truth = programs(n_factors=3)
        empty = truth.copy()
        empty[:, 1] = 0
        match = match_columns(cosines(empty, truth))
        assert match.second.tolist() == [0, 1, 2]
        assert match.sign.tolist() == [1, 1, 1]
        np.testing.assert_allclose(match.cosine, [1, 0, 1])


class TestProcrustes:
    @examples(40)
    @given(SEEDS, st.integers(2, 5), st.sampled_from([1e-6, 1.0, 1e6]))
    def test_rotated_and_scaled_loadings_are_at_distance_zero(self, seed, n_factors, scale):
        a = np.random.default_rng(seed).normal(size=(12, n_factors))
        rotation = ortho_group.rvs(n_factors, random_state=seed)
        got, distance = procrustes(a, scale * a @ rotation.T)
        np.testing.assert_allclose(distance, 0, atol=1e-12)
        np.testing.assert_allclose(got, rotation, atol=1e-8)

    @examples(40)
    @given(SEEDS, st.integers(2, 5))
    def test_is_scipys(self, seed, n_factors):
        rng = np.random.default_rng(seed)
        a, b = centred(rng.normal(size=(12, n_factors))), centred(rng.normal(size=(12, n_factors)) * 3)
        rotation, distance = procrustes(a, b)
        expected, scale = orthogonal_procrustes(b, a)
        np.testing.assert_allclose(rotation, expected, atol=1e-8)
        np.testing.assert_allclose(
            distance, 1 - (scale / np.linalg.norm(a) / np.linalg.norm(b)) ** 2, rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(distance, scipy_procrustes(a, b)[2], rtol=1e-9, atol=1e-12)

    @examples(40)
    @given(SEEDS, st.integers(1, 5), st.integers(1, 5))
    def test_is_symmetric_within_bounds_and_does_not_depend_on_axes_also_for_unequal_numbers(self, seed, n, m):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(9, n)), rng.normal(size=(9, m))
        rotation, distance = procrustes(a, b)
        back, reverse = procrustes(b, a)
        assert 0 <= distance <= 1
        np.testing.assert_allclose(reverse, distance, atol=1e-12)
        assert rotation.shape == (m, n)
        np.testing.assert_allclose(back, rotation.T, atol=1e-8)
        gram = rotation @ rotation.T if m <= n else rotation.T @ rotation
        np.testing.assert_allclose(gram, np.eye(min(n, m)), atol=1e-10)
        turned = a @ (ortho_group.rvs(n, random_state=seed) if n > 1 else -np.eye(1))
        np.testing.assert_allclose(procrustes(turned, b)[1], distance, atol=1e-10)

    def test_no_other_rotation_is_nearer(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 10, 3))
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        rotation, _ = procrustes(a, b)
        least = np.linalg.norm(a - b @ rotation)
        for seed in range(300):
            assert np.linalg.norm(a - b @ ortho_group.rvs(3, random_state=seed)) > least

    def test_orthogonal_subspaces_and_zeros_are_at_distance_one(self):
        basis = ortho_group.rvs(8, random_state=0)
        np.testing.assert_allclose(procrustes(basis[:, :3], basis[:, 3:6])[1], 1)
        np.testing.assert_allclose(procrustes(basis[:, :3], basis[:, 2:5])[1], 1 - (1 / 3) ** 2)
        for a, b in ((basis[:, :3], np.zeros((8, 3))), (np.zeros((8, 2)), basis[:, :3])):
            rotation, distance = procrustes(a, b)
            assert distance == 1
            assert rotation.shape == (b.shape[1], a.shape[1])
            assert np.isfinite(rotation).all()


class TestConsensusLoadings:
    @examples(15)
    @given(SEEDS)
    def test_does_not_depend_on_the_axes_of_any_run(self, seed):
        loadings = runs(programs(80, 3, seed), 3, seed=seed)
        expected = consensus_loadings(loadings)
        turned = [value @ ortho_group.rvs(3, random_state=seed + m) for m, value in enumerate(loadings)]
        got = consensus_loadings(turned[::-1])
        match = match_columns(cosines(expected, got))
        np.testing.assert_array_equal(match.sign, 1)
        np.testing.assert_allclose(got[:, match.second], expected, atol=1e-5)

    @pytest.mark.grid(0)
    @pytest.mark.parametrize("seed", range(3))
    def test_is_nearer_to_the_truth_than_any_single_run(self, seed):
        truth = programs(seed=seed)
        loadings = runs(truth, 6, noise=0.4, seed=seed)
        single = [nearest(value, truth) for value in loadings]
        consensus = nearest(consensus_loadings(loadings), truth)
        assert (consensus > np.max(single, axis=0)).all()
        assert np.median(consensus) > np.median(single) + 0.04
        assert consensus.min() > 0.9

    def test_has_the_scale_of_one_run_and_points_to_its_longer_tail(self):
        truth = programs()
        loadings = runs(truth, 5, noise=0.05)
        got = consensus_loadings(loadings)
        match = match_columns(cosines(truth, got))
        norms = [np.linalg.norm(value, axis=0) for value in (got[:, match.second], truth)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=0.05)
        assert ((got**3).sum(axis=0) > 0).all()
        np.testing.assert_allclose(consensus_loadings([truth] * 3) @ np.zeros(4), 0)
        same = consensus_loadings([truth] * 3)
        np.testing.assert_allclose(same @ same.T, truth @ truth.T, atol=1e-10)

    def test_what_one_run_finds_alone_shrinks(self):
        truth = programs(n_factors=4)
        loadings = [truth[:, :3]] * 4 + [truth]
        got = consensus_loadings(loadings, 4)
        match = match_columns(cosines(truth, got))
        norm = np.linalg.norm(got[:, match.second], axis=0) / np.linalg.norm(truth, axis=0)
        np.testing.assert_allclose(norm[:3], 1, rtol=0.1)
        np.testing.assert_allclose(norm[3], 1 / np.sqrt(5), rtol=0.2)

    def test_the_number_of_factors_is_the_median_or_as_said(self):
        truth = programs(n_factors=5)
        loadings = [truth[:, :3], truth, truth[:, :4]]
        assert consensus_loadings(loadings).shape == (150, 4)
        assert consensus_loadings(loadings, 2).shape == (150, 2)


def left_out(loadings, kinds, n_factors):
    """Leave-out reproducibility from its definition: run by run, factor by factor, all assignments tried."""

    def unit(value):
        return value / np.linalg.norm(value, axis=0)

    def assigned(cosine):
        return max(
            itertools.permutations(range(cosine.shape[1]), cosine.shape[0]),
            key=lambda order: sum(abs(cosine[k, j]) for k, j in enumerate(order)),
        )

    whole = consensus_loadings(loadings, n_factors)
    cosine_mk, partner_mk, sign_mk = (np.zeros((len(loadings), n_factors)) for _ in range(3))
    for m, own in enumerate(loadings):
        others = [value for value, kind in zip(loadings, kinds) if kind != kinds[m]]
        rest = consensus_loadings(others, n_factors)
        to_rest = unit(whole).T @ unit(rest)
        at = assigned(to_rest)
        to_own = unit(rest).T @ unit(own)
        partner = assigned(to_own)
        for k in range(n_factors):
            j = at[k]
            cosine_mk[m, k] = abs(to_own[j, partner[j]])
            partner_mk[m, k] = partner[j]
            sign_mk[m, k] = np.sign(to_own[j, partner[j]]) * np.sign(to_rest[k, j])
    return cosine_mk, partner_mk, sign_mk


class TestConsensusOf:
    @pytest.mark.grid(1)
    @pytest.mark.parametrize("kinds", [None, [0, 1, 0, 1, 0], [2, 2, 7, 7, 1]])
    @pytest.mark.parametrize("noise", [0.1, 0.7])
    def test_a_run_is_compared_with_those_of_other_kinds_alone(self, kinds, noise):
        loadings = runs(programs(), 5, noise=noise, n_surplus=1)
        got = consensus_of(loadings, kinds)
        cosine_mk, partner_mk, sign_mk = left_out(loadings, kinds or list(range(5)), 5)
        np.testing.assert_allclose(got.loading_gk, consensus_loadings(loadings))
        np.testing.assert_allclose(got.cosine_mk, cosine_mk, atol=1e-12)
        np.testing.assert_array_equal(got.partner_mk, partner_mk)
        np.testing.assert_array_equal(got.sign_mk, sign_mk)
        np.testing.assert_allclose(got.reproducibility_k, cosine_mk.mean(axis=0))
        assert (got.cosine_mk >= 0).all()
        assert (got.cosine_mk <= 1 + 1e-12).all()

    def test_a_factor_that_one_run_alone_has_does_not_come_back(self):
        truth = programs(n_factors=4)
        with_own = truth.copy()
        rng = np.random.default_rng(3)
        loadings = []
        for m in range(4):
            found = truth.copy()
            # A strong factor in the first run; what the others have in its place is next to nothing.
            found[:, 3] = 4 * with_own[:, 3] if m == 0 else 0.02 * centred(rng.normal(size=150))
            found = found + 0.02 * centred(rng.normal(size=found.shape))
            loadings.append(found @ varimax(found))
        got = consensus_of(loadings)
        match = match_columns(cosines(got.loading_gk, truth))
        assert match.cosine.min() > 0.95, "the consensus has it, since it is strong"
        alone = match.first[match.second == 3][0]
        assert got.reproducibility_k[alone] < 0.4
        assert np.delete(got.reproducibility_k, alone).min() > 0.95

    @pytest.mark.grid(0)
    @pytest.mark.parametrize("seed", range(4))
    def test_planted_factors_are_stable_and_random_surplus_is_not(self, seed):
        truth = programs(300, 4, seed)
        got = consensus_of(runs(truth, 5, noise=0.05, n_surplus=3, seed=seed))
        match = match_columns(cosines(got.loading_gk, truth))
        planted = match.first
        assert match.cosine.min() > 0.95
        reproducibility = got.reproducibility_k
        assert reproducibility[planted].min() >= 0.95
        assert np.delete(reproducibility, planted).max() < 0.6
        expected = np.where(np.isin(np.arange(7), planted), "stable", "unstable")
        np.testing.assert_array_equal(flags(reproducibility), expected)

    def test_runs_of_a_kind_that_agree_among_themselves_alone_are_not_stable(self):
        truth, of_kind = programs(n_factors=3), [programs(n_factors=1, seed=s) for s in (11, 12)]
        loadings = []
        for m in range(6):
            found = np.concatenate([truth, of_kind[m % 2]], axis=1)
            found = found + 0.05 * centred(np.random.default_rng(m).normal(size=found.shape))
            loadings.append(found @ varimax(found))
        by_kind, alone = consensus_of(loadings, [0, 1] * 3), consensus_of(loadings)
        shared = match_columns(cosines(by_kind.loading_gk, truth)).first
        (own,) = np.setdiff1d(np.arange(4), shared)
        assert by_kind.reproducibility_k[shared].min() > 0.95
        assert by_kind.reproducibility_k[own] < 0.3
        assert alone.reproducibility_k[own] > by_kind.reproducibility_k[own] + 0.2

    def test_the_spread_is_the_deviation_of_matched_and_turned_factors(self):
        loadings = [
            value * s for value, s in zip(runs(programs(n_factors=3), 4, noise=0.2), ([1, -1, 1], -1, 1, [-1, 1, 1]))
        ]
        got = consensus_of(loadings)
        for k in range(3):
            matched = np.stack([value[:, got.partner_mk[m, k]] * got.sign_mk[m, k] for m, value in enumerate(loadings)])
            np.testing.assert_allclose(got.spread_gk[:, k], np.std(matched, axis=0, ddof=1), atol=1e-12)
            assert (np.corrcoef(matched)[0] > 0.6).all(), "all point the same way"
            assert np.corrcoef(matched.mean(axis=0), got.loading_gk[:, k])[0, 1] > 0.95
        same = consensus_of([programs(n_factors=3)] * 3)
        np.testing.assert_allclose(same.spread_gk, 0, atol=1e-12)
        np.testing.assert_allclose(same.reproducibility_k, 1, atol=1e-2)

    def test_a_run_with_fewer_factors_has_no_partner_for_one(self):
        truth = programs(n_factors=3)
        loadings = runs(truth, 4, noise=0.05)
        small = truth[:, :2]
        got = consensus_of([*loadings, small])
        match = match_columns(cosines(got.loading_gk, truth))
        (without,) = match.first[match.second == 2]
        assert got.partner_mk[4, without] == -1
        assert got.cosine_mk[4, without] == 0
        assert (np.delete(got.partner_mk[4], without) >= 0).all()
        assert (got.partner_mk[:4] >= 0).all()
        np.testing.assert_allclose(got.reproducibility_k[without], got.cosine_mk[:4, without].sum() / 5)

    def test_arranged_moves_all_parts_together(self):
        got = consensus_of(runs(programs(), 3))
        order = np.array([2, 0, 3, 1])
        turned = got.arranged(order)
        assert isinstance(turned, Consensus)
        for name, value in got._asdict().items():
            np.testing.assert_array_equal(getattr(turned, name), value[:, order], err_msg=name)
        np.testing.assert_array_equal(turned.reproducibility_k, got.reproducibility_k[order])

    @pytest.mark.parametrize(("n_runs", "kinds"), [(1, None), (3, [4, 4, 4])])
    def test_what_cannot_be_compared_is_refused(self, n_runs, kinds):
        with pytest.raises(ValueError, match="needs at least two models that can be compared"):
            consensus_of(runs(programs(), n_runs), kinds)


def test_flags_change_at_exactly_0_8_and_0_6():
    values = np.array([1.0, 0.8, np.nextafter(0.8, 0), 0.7, 0.6, np.nextafter(0.6, 0), 0.0])
    expected = ["stable", "stable", "uncertain", "uncertain", "uncertain", "unstable", "unstable"]
    assert flags(values).tolist() == expected
    assert (STABLE, UNSTABLE) == (0.8, 0.6)
    assert flags(np.array([])).shape == (0,)
