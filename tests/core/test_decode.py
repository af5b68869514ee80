"""Decoding of many cells against scipy's softmax, compiled or not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from ldvae_ext.core import _decode, population_expression
from ldvae_ext.core._decode import put_scale
from ldvae_ext.kernels.threads import compiled
from tests.core.decoders import cells, full_decoder

both_ways = pytest.mark.parametrize("on", [True, False])


@pytest.fixture(autouse=True)
def _compiled_for_few_cells_too(monkeypatch):
    monkeypatch.setattr(_decode, "_FEW", 0)


def decoder_and_cells(n_cells=300, n_genes=70, spread=1.0, **changes):
    decoder = full_decoder(0, n_genes, **{"likelihood": "nb", "dispersion": "gene", **changes})
    given = cells(decoder, n_cells)
    return decoder, spread * given["z"], given["batch"], given["covariates"]


def expected_scale(decoder, *where):
    return softmax(decoder.logits(*where), axis=1)


@both_ways
@pytest.mark.parametrize("changes", [{}, {"covariates": ()}, {"latent_distribution": "ln"}], ids=str)
@pytest.mark.parametrize("spread", [1.0, 50.0])
def test_scale_and_rate_are_a_softmax_to_1e_12(on, changes, spread):
    decoder, *where = decoder_and_cells(spread=spread, **changes)
    library_n = np.random.default_rng(0).gamma(2.0, 100.0, 300)
    expected = expected_scale(decoder, *where)
    with compiled(on=on):
        np.testing.assert_allclose(decoder.scale(*where), expected, rtol=1e-12 * spread, atol=1e-14)
        got = decoder.rate(*where, library=library_n)
    np.testing.assert_allclose(got, library_n[:, None] * expected, rtol=1e-12 * spread, atol=1e-12)


def test_threads_do_not_matter():
    decoder, *where = decoder_and_cells()
    with compiled(n_threads=1):
        one = decoder.scale(*where)
    with compiled(n_threads=2):
        np.testing.assert_array_equal(decoder.scale(*where), one)


@both_ways
def test_some_genes_are_put_in_float32_and_shares_are_added(on):
    decoder, *where = decoder_and_cells()
    genes, expected = np.array([0, 3, 69]), expected_scale(decoder, *where)
    given = decoder._given(*where, 2.0)
    with compiled(on=on):
        out_ng = np.full((300, 3), 7.0, dtype=np.float32)
        put_scale(decoder, out_ng, *given, genes=genes)
        np.testing.assert_allclose(out_ng, 2 * expected[:, genes], rtol=1e-6)
        for some, n_genes in ((genes, 3), (None, 70)):
            out_ng = np.zeros((300, n_genes), dtype=np.float32)
            for _ in range(4):
                put_scale(decoder, out_ng, *given, genes=some, share=0.25)
            np.testing.assert_allclose(out_ng, 2 * expected[:, genes if n_genes == 3 else slice(None)], rtol=1e-6)


@both_ways
def test_a_cell_without_a_latent_has_no_expression_and_leaves_the_others_alone(on):
    decoder, z_nk, *where = decoder_and_cells()
    expected = expected_scale(decoder, z_nk, *where)
    z_nk[5, 1], z_nk[6, 0] = np.nan, -np.nan
    with compiled(on=on):
        got = decoder.scale(z_nk, *where)
    assert np.isnan(got[5:7]).all()
    np.testing.assert_allclose(np.delete(got, [5, 6], axis=0), np.delete(expected, [5, 6], axis=0), rtol=1e-12)


@both_ways
@pytest.mark.parametrize(
    "changes", [{}, {"link": "softplus"}, {"latent_distribution": "ln", "covariates": ()}], ids=str
)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_expression_of_populations_is_the_mean_over_their_cells(on, changes, n_threads):
    decoder, z_nk, batch_n, covariates = decoder_and_cells(**changes)
    rng = np.random.default_rng(0)
    group_n, library_n = rng.integers(-1, 4, 300), rng.gamma(2.0, 100.0, 300)
    rate_ng = decoder.apply_link(decoder.logits(z_nk, batch_n, covariates)) * library_n[:, None]
    with compiled(on=on, n_threads=n_threads):
        got = population_expression(decoder, z_nk, batch_n, group_n, 5, covariates=covariates, library=library_n)
    for p in range(4):
        np.testing.assert_allclose(got[p], rate_ng[group_n == p].mean(axis=0), rtol=1e-11)
    assert np.isnan(got[4]).all()
    assert got.shape == (5, 70)


def test_a_group_that_is_not_there_is_refused():
    decoder, z_nk, batch_n, covariates = decoder_and_cells()
    for group_n in (np.full(300, 2), np.full(300, -2), np.zeros(299, dtype=int)):
        with pytest.raises(ValueError, match="`group_n` must hold a code of each of 300 cells, 0 to 1 or -1"):
            population_expression(decoder, z_nk, batch_n, group_n, 2, covariates=covariates)
