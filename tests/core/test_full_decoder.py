"""Decoders with covariates, the softplus link and every dispersion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from ldvae_ext.core import Covariate, LinearDecoder
from tests.core.decoders import cells, full_decoder
from tests.pairwise import examples

LINKS, LATENTS = ("softmax", "softplus"), ("normal", "ln")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
LIKELIHOODS = ("nb", "zinb", "poisson", "normal")


@st.composite
def decoders(draw):
    return full_decoder(
        draw(st.integers(0, 2**31)),
        draw(st.integers(2, 9)),
        draw(st.integers(1, 4)),
        link=draw(st.sampled_from(LINKS)),
        latent_distribution=draw(st.sampled_from(LATENTS)),
        likelihood=draw(st.sampled_from(LIKELIHOODS)),
        dispersion=draw(st.sampled_from(DISPERSIONS)),
    )


def everything(decoder, given_cells, z=None):
    """All that a decoder says of cells."""
    c = given_cells
    z = c["z"] if z is None else z
    out = [
        decoder.scale(z, c["batch"], c["covariates"]),
        decoder.rate(z, c["batch"], c["covariates"], library=np.arange(len(z)) + 1.0),
    ]
    if decoder.likelihood != "poisson":
        theta = decoder.theta(c["batch"], len(z), label=c["label"], z_nk=z, covariates=c["covariates"])
        out.append(np.broadcast_to(theta, out[0].shape))
    if decoder.likelihood == "zinb":
        out.append(decoder.dropout_logits(z, c["batch"], c["covariates"]))
    return np.stack(out)


def test_everything_written_out_for_one_cell():
    decoder = full_decoder(link="softplus")
    z, age = np.array([0.3, -1.0, 2.0]), 1.5
    for head, call in (
        ("", lambda d, *a: d.logits(*a)),
        ("dropout_", lambda d, *a: d.dropout_logits(*a)),
        ("dispersion_", lambda d, *a: np.log(d.theta(a[1], 1, z_nk=a[0], covariates=a[2]))),
    ):
        weight, intercept, effect = (getattr(decoder, head + n) for n in ("weight_gk", "intercept_bg", "covariate_cg"))
        # age, lane L/1, lane L/2, site
        expected = weight @ z + intercept[1] + age * effect[0] + effect[2] + effect[3]
        got = call(decoder, z[None], "other", {"age": age, "lane": "L/2", "site": None})
        np.testing.assert_allclose(got, expected[None], rtol=1e-12)
    logits = decoder.logits(z[None], 1, {"age": age, "lane": 1, "site": 0})
    scale = decoder.scale(z[None], 1, {"age": age, "lane": 1, "site": 0})
    np.testing.assert_allclose(scale, np.log(1 + np.exp(logits)), rtol=1e-12)
    rate = decoder.rate(z[None], 1, {"age": age, "lane": 1, "site": 0}, library=2.5)
    np.testing.assert_allclose(rate, 2.5 * scale, rtol=1e-12)


def test_softplus_does_not_overflow_or_lose_small_values():
    decoder = full_decoder(link="softplus", likelihood="poisson", covariates=())
    with np.errstate(all="raise", under="ignore"):
        got = decoder.apply_link(np.array([[-800.0, -50.0, 0.0, 30.0, 900.0]]))
    np.testing.assert_allclose(got, [[0, np.exp(-50.0), np.log(2), 30, 900]], rtol=1e-12)


def test_one_unit_or_level_adds_its_effect():
    decoder = full_decoder()
    z = np.zeros((1, 3))

    def logits(**values):
        return decoder.logits(z, 0, {"age": 0.0, "lane": 0, "site": 0, **values})

    np.testing.assert_allclose(logits(age=1) - logits(), decoder.covariate_cg[:1], atol=1e-12)
    np.testing.assert_allclose(logits(lane=1) - logits(), decoder.covariate_cg[[2]] - decoder.covariate_cg[[1]])


@pytest.mark.parametrize(("dispersion", "codes"), [("gene", None), ("gene-batch", "batch"), ("gene-label", "label")])
def test_theta_is_the_row_of_the_batch_or_label(dispersion, codes):
    decoder = full_decoder(dispersion=dispersion)
    c = cells(decoder)
    got = decoder.theta(c["batch"], 7, label=c["label"])
    np.testing.assert_array_equal(got, decoder.theta_bg if codes is None else decoder.theta_bg[c[codes]])
    if codes == "label":
        np.testing.assert_array_equal(decoder.theta(n_cells=7, label=decoder.labels[c["label"]]), got)
        with pytest.raises(
            ValueError, match="`label` is needed, since this decoder has several; allowed are 'T/NK', 'B'"
        ):
            decoder.theta(0, 7)
        with pytest.raises(ValueError, match="`label`: 'C' is no level of 'label'"):
            decoder.theta(0, 7, label="C")


def test_theta_of_each_cell_needs_the_cell():
    decoder = full_decoder()
    c = cells(decoder)
    assert decoder.theta_bg is None
    assert (decoder.theta(c["batch"], z_nk=c["z"], covariates=c["covariates"]) > 0).all()
    with pytest.raises(ValueError, match="`z_nk` is needed, since the dispersion depends on the cell"):
        decoder.theta(c["batch"], 7)
    with pytest.raises(ValueError, match="missing 'age'"):
        decoder.theta(c["batch"], z_nk=c["z"])


@given(decoders(), st.integers(0, 1000))
@examples(80)
def test_the_canonical_gauge_changes_nothing_that_is_decoded(decoder, seed):
    c, centred = cells(decoder, seed=seed), decoder.centered()
    np.testing.assert_allclose(everything(centred, c), everything(decoder, c), rtol=1e-10, atol=1e-12)
    if decoder.link == "softmax":
        for array, axis in ((centred.weight_gk, 0), (centred.intercept_bg, 1), (centred.covariate_cg, 1)):
            np.testing.assert_allclose(array.sum(axis=axis), 0, atol=1e-11)
    elif decoder.latent_distribution == "normal":
        for name in ("weight_gk", "intercept_bg", "covariate_cg"):
            np.testing.assert_array_equal(getattr(centred, name), getattr(decoder, name))
    if decoder.latent_distribution == "ln":
        np.testing.assert_allclose(centred.weight_gk.sum(axis=1), 0, atol=1e-11)


@given(decoders(), st.integers(0, 1000))
@examples(80)
def test_order_and_signs_change_nothing_that_is_decoded(decoder, seed):
    rng, n_factors = np.random.default_rng(seed), len(decoder.factors)
    order = rng.permutation(n_factors)
    signs = np.ones(n_factors) if decoder.latent_distribution == "ln" else rng.choice([-1, 1], n_factors)
    c = cells(decoder, seed=seed)
    turned = decoder.reordered(order, signs)
    expected = everything(decoder, c)
    np.testing.assert_allclose(everything(turned, c, c["z"][:, order] * signs), expected, rtol=1e-10, atol=1e-12)


@given(decoders(), st.integers(0, 1000))
@examples(80)
def test_genes_in_another_order_are_the_same_genes(decoder, seed):
    order = np.random.default_rng(seed).permutation(len(decoder.genes))
    c, moved = cells(decoder, seed=seed), decoder.with_genes_in_order(order)
    assert moved.genes.tolist() == decoder.genes[order].tolist()
    np.testing.assert_allclose(everything(moved, c), everything(decoder, c)[..., order], rtol=1e-12)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("link", LINKS)
def test_gene_information_is_the_fisher_information_at_the_prior_mean(link, latent):
    """By finite differences of the means of Poisson counts (multinomial ones, whose total is given, under softmax)."""
    covariates = (Covariate("age"), Covariate("lane", ["a", "b"]))
    decoder = full_decoder(likelihood="poisson", covariates=covariates, link=link, latent_distribution=latent)
    # A decoder with one batch and without covariates that says the same at their mean.
    plain = LinearDecoder(
        weight_gk=decoder.weight_gk,
        intercept_bg=decoder.intercept_bg[:1] + decoder.covariate_cg[1:].mean(axis=0),
        genes=decoder.genes,
        batches=["one"],
        factors=decoder.factors,
        likelihood="poisson",
        latent_distribution=latent,
        link=link,
    )

    def mean(u):
        z = np.exp(u) / np.exp(u).sum() if latent == "ln" else u
        return plain.scale(z[None])[0]

    step, rho = 1e-5, mean(np.zeros(3))
    got = plain.gene_information()
    for k in range(3):
        up = np.eye(3)[k] * step
        slope = (mean(up) - mean(-up)) / (2 * step)
        terms = slope**2 / rho
        np.testing.assert_allclose(np.abs(got[:, k]), terms / terms.sum(), atol=1e-7)
        np.testing.assert_array_equal(np.sign(got[:, k]), np.sign(slope))
    one_batch = LinearDecoder(
        **{
            **{n: getattr(decoder, n) for n in ("weight_gk", "covariate_cg", "genes", "factors", "covariates")},
            "intercept_bg": decoder.intercept_bg[:1],
            "batches": ["one"],
            "likelihood": "poisson",
            "latent_distribution": latent,
            "link": link,
        }
    )
    np.testing.assert_allclose(one_batch.gene_information(), got, atol=1e-12)


def test_gene_information_averages_expression_over_batches():
    decoder = full_decoder(likelihood="poisson", covariates=(), link="softplus")
    rho = np.logaddexp(0, decoder.intercept_bg).mean(axis=0)
    slope = expit(decoder.intercept_bg).mean(axis=0)[:, None] * decoder.weight_gk
    terms = slope**2 / rho[:, None]
    np.testing.assert_allclose(np.abs(decoder.gene_information()), terms / terms.sum(axis=0), atol=1e-12)


@pytest.mark.grid
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("link", LINKS)
def test_npz_brings_everything_back_without_pickle(tmp_path, likelihood, dispersion, link):
    decoder = full_decoder(likelihood=likelihood, dispersion=dispersion, link=link)
    decoder.save(tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    back, c = LinearDecoder.load(tmp_path / "d.npz"), cells(decoder)
    assert repr(back) == repr(decoder)
    np.testing.assert_array_equal(everything(back, c), everything(decoder, c))
    np.testing.assert_array_equal(back.raw.batch_embedding, decoder.raw.batch_embedding)
    assert [(x.name, x.n_columns) for x in back.covariates] == [(x.name, x.n_columns) for x in decoder.covariates]
    assert (back.labels is None) == (decoder.labels is None)


def test_what_is_said_of_it():
    assert "3 covariates" in repr(full_decoder(link="softplus"))
    assert "link='softplus'" in repr(full_decoder(link="softplus"))
    assert "link" not in repr(full_decoder())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"link": "log"}, "`link` must be one of 'softmax', 'softplus'; got 'log'"),
        (
            {"dispersion": "cell"},
            "`dispersion` must be one of 'gene', 'gene-batch', 'gene-label', 'gene-cell'; got 'cell'",
        ),
        ({"covariate_cg": None}, "`covariate_cg` must be given with .*3 covariates"),
        ({"covariate_cg": np.zeros((3, 9))}, r"`covariate_cg` must have shape \(4, 9\); got \(3, 9\)"),
        ({"dropout_covariate_cg": None}, "`dropout_covariate_cg` must be given with"),
        ({"dispersion_weight_gk": None}, "`dispersion_weight_gk` must be given with .* `dispersion='gene-cell'`"),
        (
            {"theta_bg": np.ones((1, 9))},
            "`theta_bg` must not be given with `likelihood='zinb'`, `dispersion='gene-cell'`",
        ),
        ({"labels": ["a"]}, "`labels` must not be given"),
        ({"dispersion": "gene-label", "labels": ["a", "b"]}, r"`theta_bg` must have shape \(2, 9\); got \(3, 9\)"),
        ({"dispersion": "gene-label", "labels": None}, "`labels` must be given"),
    ],
)
def test_parts_that_do_not_fit_are_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        full_decoder(**changes)
