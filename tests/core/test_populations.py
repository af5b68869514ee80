from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit, logsumexp
from scipy.stats import rankdata

from ldvae_ext.core import LinearDecoder, group_moments
from ldvae_ext.core.group_moments import GroupMoments
from ldvae_ext.core.populations import (
    PopulationRequest,
    path_attribution,
    population_loadings,
    within_directions,
)
from tests.core.decoders import cells, full_decoder
from tests.pairwise import examples

CASES = [("softmax", "normal"), ("softmax", "ln"), ("softplus", "normal"), ("softplus", "ln")]


def decoder_of(link, latent, **kwargs):
    kwargs = {"likelihood": "nb", "dispersion": "gene", **kwargs}
    return full_decoder(link=link, latent_distribution=latent, **kwargs)


def moments_of(decoder, many, group_n, scale=None, chunk=None):
    moments = GroupMoments(decoder, group_n.max() + 1, scale)
    for start in range(0, len(group_n), chunk or len(group_n)):
        at = slice(start, start + (chunk or len(group_n)))
        values = {
            name: value if np.ndim(value) == 0 else value[at] for name, value in (many["covariates"] or {}).items()
        }
        moments.add(many["z"][at], many["batch"][at], values or None, group_n[at])
    return moments


@pytest.mark.parametrize("scale", ["log", "expression"])
@pytest.mark.parametrize(("link", "latent"), CASES)
def test_gradient_is_the_mean_slope_of_the_decoder(link, latent, scale):
    decoder = decoder_of(link, latent)
    many, step = cells(decoder, 30), 1e-5
    group_n = np.random.default_rng(0).integers(-1, 3, 30)
    got = moments_of(decoder, many, group_n, scale).gradient_loadings()

    def value(u):
        z = np.exp(u) / np.exp(u).sum(axis=1, keepdims=True) if latent == "ln" else u
        scale_ng = decoder.scale(z, decoder.batches[many["batch"]], many["covariates"])
        return np.log(scale_ng) if scale == "log" else scale_ng

    u = np.log(many["z"]) if latent == "ln" else many["z"]
    for k, unit in enumerate(np.eye(3)):
        slope_ng = (value(u + step * unit) - value(u - step * unit)) / (2 * step)
        for p in range(3):
            np.testing.assert_allclose(got[p, :, k], slope_ng[group_n == p].mean(axis=0), atol=1e-7)


def test_on_the_log_scale_every_population_ranks_the_genes_of_a_factor_alike_and_on_that_of_expression_not():
    decoder = decoder_of("softmax", "normal", n_genes=30)
    many = cells(decoder, 40)
    group_n = np.arange(40) % 3
    log = moments_of(decoder, many, group_n, "log").gradient_loadings()
    for k in range(3):
        ranks = [rankdata(log[p, :, k]) for p in range(3)]
        np.testing.assert_array_equal(ranks[0], ranks[1])
        np.testing.assert_array_equal(ranks[0], ranks[2])
    offsets = log - decoder.weight_gk
    np.testing.assert_allclose(np.ptp(offsets, axis=1), 0, atol=1e-12)
    expression = moments_of(decoder, many, group_n, "expression").gradient_loadings()
    assert any((rankdata(expression[0, :, k]) != rankdata(expression[1, :, k])).any() for k in range(3))
    # The counts of a cell add up, whatever a factor does.
    np.testing.assert_allclose(expression.sum(axis=1), 0, atol=1e-12)


@st.composite
def points(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    g, k = draw(st.integers(2, 15)), draw(st.integers(1, 5))
    decoder = LinearDecoder(
        weight_gk=rng.normal(0, draw(st.sampled_from([0.3, 3.0])), (g, k)),
        intercept_bg=rng.normal(0, 3, (1, g)),
        genes=[f"g{i}" for i in range(g)],
        batches=["0"],
        factors=[f"Z_{i}" for i in range(k)],
        likelihood="poisson",
        link=draw(st.sampled_from(["softmax", "softplus"])),
    )
    return decoder, rng.normal(0, 3, (2, k)), rng.normal(0, 2, (2, g))


def log_expression(decoder, logits_g):
    if decoder.link == "softmax":
        return logits_g - logsumexp(logits_g)
    return np.log(np.where(logits_g > 20, logits_g, np.logaddexp(0, logits_g)))


@given(points())
@examples(150)
def test_a_path_adds_up_to_the_log_ratio(case):
    decoder, z, offset = case
    split = path_attribution(decoder, z[0], offset[0], z[1], offset[1])
    ends = [log_expression(decoder, decoder.weight_gk @ z[i] + offset[i]) for i in (0, 1)]
    np.testing.assert_allclose(split.sum(axis=1), ends[0] - ends[1], atol=1e-6)


@pytest.mark.parametrize("link", ["softmax", "softplus"])
@pytest.mark.parametrize("length", [30, 300, 1500])
def test_a_long_path_adds_up_too(link, length):
    decoder = decoder_of(link, "normal", n_genes=30)
    rng = np.random.default_rng(0)
    z, offset = rng.normal(size=(2, 3)) * length / 10, np.zeros((2, 30))
    split = path_attribution(decoder, z[0], offset[0], z[1], offset[1])
    logits = z @ decoder.weight_gk.T
    if link == "softmax":
        expected = (logits - logsumexp(logits, axis=1, keepdims=True))[0]
        expected = expected - (logits - logsumexp(logits, axis=1, keepdims=True))[1]
    else:
        log = np.where(logits < -30, logits, np.log(np.where(logits > 20, logits, np.logaddexp(0, logits))))
        expected = log[0] - log[1]
    np.testing.assert_allclose(split.sum(axis=1), expected, atol=1e-6)


@pytest.mark.parametrize("link", ["softmax", "softplus"])
def test_a_path_is_the_integral_of_the_slope_along_it(link):
    decoder = decoder_of(link, "normal")
    rng = np.random.default_rng(3)
    z, offset = rng.normal(0, 2, (2, 3)), rng.normal(0, 1, (2, 9))
    direction_gk = np.column_stack([decoder.weight_gk * (z[0] - z[1]), offset[0] - offset[1]])

    def slope(t, g, k):
        logits = decoder.weight_gk @ z[1] + offset[1] + t * direction_gk.sum(axis=1)
        if link == "softplus":
            return direction_gk[g, k] * expit(logits[g]) / np.logaddexp(0, logits[g])
        return direction_gk[g, k] - np.exp(logits - logsumexp(logits)) @ direction_gk[:, k]

    split = path_attribution(decoder, z[0], offset[0], z[1], offset[1])
    for g in (0, 4, 8):
        for k in range(4):
            np.testing.assert_allclose(split[g, k], quad(slope, 0, 1, args=(g, k), epsabs=1e-12)[0], atol=1e-9)


@pytest.mark.parametrize("reference", ["rest", "prior", 1])
@pytest.mark.parametrize(("link", "latent"), CASES)
def test_populations_are_compared_at_their_mean_latent_and_mean_intercept(link, latent, reference):
    decoder = decoder_of(link, latent)
    many = cells(decoder, 40)
    group_n = np.random.default_rng(0).integers(-1, 3, 40)
    moments = moments_of(decoder, many, group_n)
    offset_ng = decoder.logits(np.zeros((40, 3)), decoder.batches[many["batch"]], many["covariates"])
    path = population_loadings(decoder, moments, "path", reference)
    contribution = population_loadings(decoder, moments, "contribution", reference)
    assert path.groups == [p for p in range(3) if p != reference]
    for at, p in enumerate(path.groups):
        own = group_n == p
        z_k, offset_g = many["z"][own].mean(axis=0), offset_ng[own].mean(axis=0)
        if reference == "prior":
            other_k, other_g = np.full(3, 1 / 3 if latent == "ln" else 0.0), offset_g
        else:
            other = (group_n >= 0) & ~own if reference == "rest" else group_n == reference
            other_k, other_g = many["z"][other].mean(axis=0), offset_ng[other].mean(axis=0)
        ends = [log_expression(decoder, decoder.weight_gk @ z + o) for z, o in ((z_k, offset_g), (other_k, other_g))]
        np.testing.assert_allclose(path.value_pgk[at].sum(axis=1), ends[0] - ends[1], atol=1e-9)
        # The latent's part is the same up to a constant per factor, which the softmax does not see.
        loading = decoder.weight_gk * (z_k - other_k)
        if link == "softmax":
            constants = np.ptp(contribution.value_pgk[at] - path.value_pgk[at][:, :3], axis=0)
            np.testing.assert_allclose(contribution.value_pgk[at].sum(axis=0), 0, atol=1e-12)
            if latent == "normal":
                np.testing.assert_allclose(constants, 0, atol=1e-12)
                np.testing.assert_allclose(contribution.value_pgk[at], loading - loading.mean(axis=0), atol=1e-12)
        elif latent == "normal":
            np.testing.assert_allclose(contribution.value_pgk[at], loading, atol=1e-12)
    assert path.columns == [*decoder.factors, *(["batch"] if reference != "prior" else [])]


def test_a_path_has_a_batch_column_only_where_there_is_something_to_tell_apart():
    decoder = decoder_of("softmax", "normal", n_batches=1, covariates=())
    moments = moments_of(decoder, cells(decoder, 20), np.arange(20) % 2)
    assert population_loadings(decoder, moments, "path", "rest").columns == ["Z_0", "Z_1", "Z_2"]


@pytest.mark.parametrize(("link", "latent"), CASES)
def test_directions_within_a_group_are_the_principal_components_of_its_log_rates(link, latent):
    decoder = decoder_of(link, latent, n_genes=20)
    many = cells(decoder, 50)
    group_n = np.arange(50) % 2
    moments = moments_of(decoder, many, group_n)
    weight_gk = decoder.weight_gk
    if link == "softmax":
        weight_gk = weight_gk - weight_gk.mean(axis=0)
    if latent == "ln":
        weight_gk = weight_gk - weight_gk.mean(axis=1, keepdims=True)
    n_directions = 2 if latent == "ln" else 3
    for p in range(2):
        rates = many["z"][group_n == p] @ weight_gk.T
        covariance = np.cov(rates.T, bias=True)
        values, vectors = np.linalg.eigh(covariance)
        got = within_directions(decoder, moments.covariance_pkk[p])
        np.testing.assert_allclose(got.variance_j, values[::-1][:3], atol=1e-9 * values[-1])
        np.testing.assert_allclose(got.share_jk[:n_directions].sum(axis=1), 1)
        np.testing.assert_allclose((got.loading_gj**2).sum(axis=1), np.diag(covariance), atol=1e-9 * values[-1])
        for j in range(n_directions):
            expected = vectors[:, -1 - j] * np.sqrt(values[-1 - j])
            np.testing.assert_allclose(np.abs(got.loading_gj[:, j]), np.abs(expected), atol=1e-6)
            assert (got.loading_gj[:, j] ** 3).sum() >= 0
            # A factor's share is its covariance with the scores, over their variance.
            unit = got.loading_gj[:, j] / np.linalg.norm(got.loading_gj[:, j])
            terms = weight_gk * unit[:, None]
            z = many["z"][group_n == p]
            scores = rates @ unit
            shares = [np.cov(z[:, k] * terms[:, k].sum(), scores, bias=True)[0, 1] / scores.var() for k in range(3)]
            np.testing.assert_allclose(got.share_jk[j], shares, atol=1e-8)
        assert np.isnan(got.share_jk[n_directions:]).all()


def test_a_group_in_which_nothing_varies_has_directions_without_variance():
    decoder = decoder_of("softmax", "normal")
    got = within_directions(decoder, np.zeros((3, 3)))
    np.testing.assert_array_equal(got.variance_j, 0)
    np.testing.assert_array_equal(got.loading_gj, 0)
    assert np.isnan(got.share_jk).all()


@pytest.mark.parametrize("scale", ["log", "expression"])
def test_the_sums_do_not_depend_on_how_cells_are_cut(scale):
    decoder = decoder_of("softmax", "ln")
    many, group_n = cells(decoder, 30), np.random.default_rng(0).integers(-1, 3, 30)
    whole, cut = (moments_of(decoder, many, group_n, scale, chunk) for chunk in (None, 7))
    for name in ("n_p", "mean_pk", "offset_pg", "covariance_pkk"):
        np.testing.assert_allclose(getattr(whole, name), getattr(cut, name), atol=1e-12)
    np.testing.assert_allclose(whole.gradient_loadings(), cut.gradient_loadings(), atol=1e-12)


@pytest.mark.parametrize("scale", ["log", "expression"])
def test_many_groups_have_the_sums_of_each_alone(monkeypatch, scale):
    # Cells are summed a few chunks at a time, and the cells of a group in parts.
    monkeypatch.setattr(group_moments, "_AT_ONCE", 17)
    monkeypatch.setattr(group_moments, "_DECODED", 3)
    decoder = decoder_of("softmax", "normal")
    many, group_n = cells(decoder, 90), np.random.default_rng(0).permutation(np.arange(90) % 21 - 1)
    moments = moments_of(decoder, many, group_n, scale, chunk=7)
    for p in range(20):
        alone = moments_of(decoder, many, np.where(group_n == p, 0, -1), scale)
        np.testing.assert_allclose(moments.covariance_pkk[p], alone.covariance_pkk[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(moments.gradient_loadings()[p], alone.gradient_loadings()[0], rtol=1e-10, atol=1e-12)


def test_cells_without_a_group_are_left_out_however_many_there_are(monkeypatch):
    monkeypatch.setattr(group_moments, "_AT_ONCE", 8)
    decoder = decoder_of("softmax", "normal")
    many, group_n = cells(decoder, 30), np.where(np.arange(30) < 10, 0, -1)
    moments = moments_of(decoder, many, group_n, "log", chunk=10)
    np.testing.assert_allclose(moments.covariance_pkk[0], np.cov(many["z"][:10].T, bias=True), atol=1e-12)


def test_slopes_must_have_been_summed():
    decoder = decoder_of("softmax", "normal")
    moments = moments_of(decoder, cells(decoder, 10), np.zeros(10, dtype=int))
    with pytest.raises(ValueError, match="derivatives were not summed"):
        moments.gradient_loadings()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "jacobian"}, "`kind` must be one of 'gradient', 'contribution', 'path', 'within'; got 'jacobian'"),
        ({"scale": "counts"}, "`scale` must be one of 'log', 'expression'"),
        ({"kind": "path", "scale": "log"}, "`scale` belongs to `kind='gradient'`"),
        ({"kind": "path", "reference": "c"}, "`reference` must be one of 'rest', 'prior', 'a', 'b'; got 'c'"),
        ({"kind": "within", "reference": "a"}, "`reference` has no effect with `kind='within'`"),
        ({"kind": "path", "groups": ["rest", "b"]}, "may be the group of that name or not"),
        ({"kind": "path", "groups": ["a"]}, "only one group, 'a', and no other to compare it with"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PopulationRequest(**{"groups": ["a", "b"], **arguments})
