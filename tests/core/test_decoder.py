from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldvae_ext.core import BatchNorm, LinearDecoder, RawLinear
from tests.core.decoders import full_decoder


def make(seed=0, n_genes=9, n_factors=3, n_batches=2, likelihood="zinb", dispersion="gene-batch", latent="normal"):
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(n_genes, n_factors)), rng.normal(size=(n_batches, n_genes))
    drop = rng.normal(size=(n_genes, n_factors)), rng.normal(size=(n_batches, n_genes))
    raw = RawLinear(
        weight=rng.normal(size=(n_genes, n_factors + n_batches)),
        bias=rng.normal(size=n_genes),
        batch_norm=BatchNorm(
            running_mean=rng.normal(size=n_genes),
            running_var=rng.gamma(1, 1, n_genes),
            gamma=rng.normal(size=n_genes),
            beta=rng.normal(size=n_genes),
            eps=1e-3,
        ),
    )
    return LinearDecoder(
        weight_gk=head[0],
        intercept_bg=head[1],
        genes=[f"g{i}" for i in range(n_genes)],
        batches=["CD4+/CD25 T", "other", "third"][:n_batches],
        factors=[f"Z_{k}" for k in range(n_factors)],
        likelihood=likelihood,
        dispersion=dispersion if likelihood != "poisson" else "gene",
        theta_bg=None
        if likelihood == "poisson"
        else rng.gamma(1, 1, (n_batches if dispersion == "gene-batch" else 1, n_genes)),
        latent_distribution=latent,
        dropout_weight_gk=drop[0] if likelihood == "zinb" else None,
        dropout_intercept_bg=drop[1] if likelihood == "zinb" else None,
        raw=raw,
        raw_dropout=raw if likelihood == "zinb" else None,
    )


def latents(decoder, n=7, seed=1):
    rng = np.random.default_rng(seed)
    n_factors = len(decoder.factors)
    return (
        rng.dirichlet(np.ones(n_factors), n)
        if decoder.latent_distribution == "ln"
        else rng.normal(0, 2, (n, n_factors))
    )


def test_scale_is_the_softmax_written_out():
    decoder = make()
    z, batch = latents(decoder), np.array([0, 1, 1, 0, 1, 0, 0])
    for i in range(7):
        e = np.exp([decoder.weight_gk[g] @ z[i] + decoder.intercept_bg[batch[i], g] for g in range(9)])
        np.testing.assert_allclose(decoder.scale(z, batch)[i], e / e.sum(), rtol=1e-12)
        np.testing.assert_allclose(
            decoder.rate(z, batch, library=np.arange(7) + 5)[i], (5 + i) * e / e.sum(), rtol=1e-12
        )


def test_batches_go_by_code_or_by_name():
    decoder = make()
    z = latents(decoder)
    by_code = decoder.scale(z, 0)
    np.testing.assert_array_equal(decoder.scale(z, "CD4+/CD25 T"), by_code)
    np.testing.assert_array_equal(decoder.scale(z, ["CD4+/CD25 T"] * 7), by_code)
    mixed = np.array(["other", "CD4+/CD25 T"] * 3 + ["other"])
    np.testing.assert_array_equal(decoder.scale(z, mixed), decoder.scale(z, (mixed == "other").astype(int)))
    assert not np.allclose(decoder.scale(z, "other"), by_code)


def test_integers_that_may_be_names_are_refused_and_categories_are_names():
    decoder = replace(make(), batches=["1", "2"])
    z = latents(decoder)
    with pytest.raises(
        ValueError, match=r"`batch`: 1 may be a code or a name, since batches are named '1', '2'; give names as str"
    ):
        decoder.scale(z, 1)
    np.testing.assert_array_equal(
        decoder.scale(z, pd.Categorical([1, 2, 2, 1, 1, 1, 2])), decoder.scale(z, list("1221112"))
    )
    with pytest.raises(ValueError, match="may be a code or a name"):
        replace(make(), batches=["1.0", "2.0"]).scale(z, 1)
    with pytest.raises(
        ValueError, match=r"columns of `z` must be 'Z_0', 'Z_1', 'Z_2', in this order; got 'Z_2', 'Z_1', 'Z_0'"
    ):
        decoder.scale(pd.DataFrame(z, columns=["Z_2", "Z_1", "Z_0"]), "1")
    plain = replace(make(), batches=["0", "1"])
    np.testing.assert_array_equal(plain.scale(z, 1), plain.scale(z, "1"))


def test_one_batch_needs_no_batch_and_several_do():
    one = make(n_batches=1)
    np.testing.assert_array_equal(one.scale(latents(one)), one.scale(latents(one), 0))
    with pytest.raises(ValueError, match=r"`batch` is needed.*'CD4\+/CD25 T', 'other'"):
        make().scale(latents(make()))


@pytest.mark.parametrize("batch", ["unseen", 2, -1, ["other", "unseen"] + ["other"] * 5])
def test_unknown_batch_is_an_error_that_says_what_is_known(batch):
    decoder = make()
    with pytest.raises(ValueError, match=r"is no batch of this decoder; allowed are 'CD4\+/CD25 T', 'other' or 0 to 1"):
        decoder.scale(latents(decoder), batch)


@pytest.mark.parametrize("z", [np.zeros((3, 2)), np.zeros(3), np.zeros((3, 4))])
def test_latent_of_the_wrong_width_is_an_error(z):
    with pytest.raises(ValueError, match=r"`z` must have shape \(cells, 3\); got"):
        make().scale(z, 0)


def test_a_decoder_is_frozen():
    decoder = make()
    with pytest.raises(FrozenInstanceError):
        decoder.weight_gk = np.zeros((9, 3))
    with pytest.raises(ValueError, match="read-only"):
        decoder.weight_gk[0, 0] = 1


def test_a_decoder_keeps_its_own_copy():
    weight = np.zeros((2, 1))
    decoder = LinearDecoder(
        weight_gk=weight,
        intercept_bg=np.zeros((1, 2)),
        genes=["a", "b"],
        batches=["0"],
        factors=["Z_0"],
        likelihood="poisson",
    )
    weight[0, 0] = 7
    assert decoder.weight_gk[0, 0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihood": "beta"}, "`likelihood` must be one of 'nb', 'zinb', 'poisson', 'normal'; got 'beta'"),
        ({"genes": ["a", "a"]}, "`genes` must be unique; 'a' occurs more than once"),
        ({"genes": ["a"]}, "`genes` must hold 2 names; got 1"),
        (
            {"theta_bg": np.ones((1, 2))},
            "`theta_bg` must not be given with `likelihood='poisson'`, `dispersion='gene'`",
        ),
        ({"weight_gk": np.full((2, 1), np.nan)}, "`weight_gk` must be finite; 2 of 2 values are not"),
        ({"intercept_bg": np.zeros((1, 3))}, r"`intercept_bg` must have shape \(None, 2\); got \(1, 3\)"),
    ],
)
def test_parts_that_do_not_fit_are_an_error(change, message):
    parts = {
        "weight_gk": np.zeros((2, 1)),
        "intercept_bg": np.zeros((1, 2)),
        "genes": ["a", "b"],
        "batches": ["0"],
        "factors": ["Z_0"],
        "likelihood": "poisson",
    }
    with pytest.raises(ValueError, match=message):
        LinearDecoder(**{**parts, **change})


@given(st.integers(0, 10_000), st.sampled_from(["normal", "ln"]))
def test_the_gauge_changes_nothing_that_is_decoded(seed, latent):
    decoder = make(seed, latent=latent)
    centred, z = decoder.centered(), latents(decoder, seed=seed)
    for batch in (0, 1):
        np.testing.assert_allclose(centred.scale(z, batch), decoder.scale(z, batch), atol=1e-12)
    np.testing.assert_allclose(centred.weight_gk.sum(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(centred.intercept_bg.sum(axis=1), 0, atol=1e-11)
    if latent == "ln":
        np.testing.assert_allclose(centred.weight_gk.sum(axis=1), 0, atol=1e-12)


@given(st.integers(0, 10_000), st.permutations(range(3)), st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3))
def test_order_and_signs_change_nothing_that_is_decoded(seed, order, signs):
    decoder, z = make(seed), latents(make(seed), seed=seed)
    turned = decoder.reordered(order, signs)
    moved = z[:, order] * signs
    np.testing.assert_allclose(turned.scale(moved, 1), decoder.scale(z, 1), atol=1e-12)
    np.testing.assert_allclose(turned.dropout_logits(moved, 1), decoder.dropout_logits(z, 1), atol=1e-12)
    assert turned.factors.tolist() == [f"Z_{k}" for k in order]


@given(st.integers(0, 10_000))
def test_canonical_signs_do_not_depend_on_the_given_signs_or_gauge(seed):
    decoder = make(seed)
    flipped = decoder.reordered([0, 1, 2], [-1, 1, -1])
    np.testing.assert_array_equal(flipped.signs() * [-1, 1, -1], decoder.signs())
    np.testing.assert_array_equal(decoder.centered().signs(), decoder.signs())
    canonical = decoder.reordered([0, 1, 2], decoder.signs()).centered().weight_gk
    assert ((canonical**3).sum(axis=0) > 0).all()


def test_a_point_of_the_simplex_cannot_be_turned():
    decoder = make(latent="ln")
    np.testing.assert_array_equal(decoder.signs(), 1)
    with pytest.raises(ValueError, match="-z is not on the simplex"):
        decoder.reordered([0, 1, 2], [1, -1, 1])


@pytest.mark.parametrize(
    ("order", "signs", "message"),
    [
        ([0, 0, 1], None, "permutation of 0 to 2"),
        ([0, 1], None, "permutation"),
        ([0, 1, 2], [1, 0, 1], r"\+1 or -1 for each"),
    ],
)
def test_orders_that_are_none_are_errors(order, signs, message):
    with pytest.raises(ValueError, match=message):
        make().reordered(order, signs)


@pytest.mark.parametrize("latent", ["normal", "ln"])
def test_gene_information_is_the_fisher_information_of_multinomial_counts(latent):
    decoder = make(n_batches=1, likelihood="poisson", latent=latent)

    def scale(u):
        return decoder.scale(np.exp(u) / np.exp(u).sum(axis=1, keepdims=True) if latent == "ln" else u)[0]

    got = decoder.gene_information()
    step, rho = 1e-5, scale(np.zeros((1, 3)))
    for k in range(3):
        up, down = np.zeros((2, 1, 3))
        up[0, k], down[0, k] = step, -step
        slope = (np.log(scale(up)) - np.log(scale(down))) / (2 * step)
        terms = rho * slope**2
        np.testing.assert_allclose(np.abs(got[:, k]), terms / terms.sum(), atol=1e-7)
        np.testing.assert_array_equal(np.sign(got[:, k]), np.sign(slope))


def test_gene_information_does_not_depend_on_the_gauge_and_vanishes_for_a_factor_without_loadings():
    decoder = make()
    shifted = replace(
        decoder, weight_gk=decoder.weight_gk + [1.0, -3.0, 0.5], intercept_bg=decoder.intercept_bg + [[2.0], [-1.0]]
    )
    np.testing.assert_allclose(shifted.gene_information(), decoder.gene_information(), atol=1e-12)
    flat = replace(decoder, weight_gk=decoder.weight_gk * [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(flat.gene_information()[:, 1], 0)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
@pytest.mark.parametrize("latent", ["normal", "ln"])
def test_npz_brings_everything_back_without_pickle(tmp_path, likelihood, dispersion, latent):
    decoder = make(likelihood=likelihood, dispersion=dispersion, latent=latent)
    path = tmp_path / "decoder.npz"
    decoder.save(path)
    with np.load(path, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    back = LinearDecoder.load(path)
    assert repr(back) == repr(decoder)
    want, got = decoder.to_arrays(), back.to_arrays()
    assert want.keys() == got.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


def test_npz_of_something_else_is_an_error(tmp_path):
    np.savez(tmp_path / "x.npz", a=1)
    with pytest.raises(ValueError, match=r"hold no decoder: .*'weight_gk'"):
        LinearDecoder.load(tmp_path / "x.npz")


def test_only_zinb_has_dropout_and_poisson_no_dispersion():
    poisson = make(likelihood="poisson")
    with pytest.raises(ValueError, match="Only `likelihood='zinb'`"):
        poisson.dropout_logits(latents(poisson), 0)
    with pytest.raises(ValueError, match="no dispersion"):
        poisson.theta()


def test_a_decoders_tables_are_its_own_and_travel_with_no_copy_of_it():
    decoder = full_decoder(0, 12, likelihood="nb", dispersion="gene", covariates=())
    size = len(pickle.dumps(decoder))
    assert decoder._tables is decoder._tables
    assert len(pickle.dumps(decoder)) == size
    copy = pickle.loads(pickle.dumps(decoder))
    np.testing.assert_array_equal(copy._tables.weight_kg, decoder._tables.weight_kg)
    turned = replace(decoder, weight_gk=-decoder.weight_gk)
    np.testing.assert_array_equal(turned._tables.weight_kg, -decoder._tables.weight_kg)
    assert copy != decoder
