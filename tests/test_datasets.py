from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse, stats

from ldvae_ext import datasets


def test_pbmc68k_are_the_counts_behind_the_rounded_logarithms():
    adata = datasets.pbmc68k()
    assert adata.shape == (700, 765)
    counts = adata.X.toarray()
    assert sparse.issparse(adata.X)
    assert counts.dtype == np.float32
    assert (counts == np.rint(counts)).all()
    assert counts.min() == 0
    assert np.asarray(adata.X.sum(1)).min() == 342
    with pytest.warns(match="."):
        raw = sc.datasets.pbmc68k_reduced().raw.to_adata()
    again = np.log1p(counts / adata.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(again, raw.X.toarray(), atol=0.0006)
    assert "CD4+/CD25 T Reg" in adata.obs["bulk_labels"].cat.categories


@pytest.mark.parametrize(
    "spoil", [lambda x: 0.013 * x, lambda x: x + 0.004 * x.sign()], ids=["scaled", "off by a little"]
)
def test_another_version_of_the_data_is_refused(monkeypatch, spoil):
    with pytest.warns(match="."):
        spoilt = sc.datasets.pbmc68k_reduced()
    raw = spoilt.raw.to_adata()
    raw.X = spoil(raw.X)
    spoilt.raw = raw
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: spoilt)
    with pytest.raises(RuntimeError, match="cannot be recovered"):
        datasets.pbmc68k()


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("n_batches", [1, 3])
def test_simulated_counts_follow_the_decoder_that_comes_with_them(likelihood, n_batches):
    adata, decoder = datasets.simulate(4000, 40, 3, likelihood=likelihood, n_batches=n_batches, dropout=0.3)
    assert isinstance(adata, ad.AnnData)
    assert adata.obsm["z_true"].shape == (4000, 3)
    assert decoder.batches.tolist() == adata.obs["batch"].cat.categories.tolist()
    scale = decoder.scale(adata.obsm["z_true"], adata.obs["batch"])
    counts = adata.X.toarray().astype(float)
    share = counts.sum(0) / counts.sum()
    expected = scale.mean(0)
    assert stats.spearmanr(share, expected).statistic > 0.97
    np.testing.assert_allclose(share, expected, rtol=0.35, atol=0.003)
    cells = np.argmax(expected)
    assert stats.spearmanr(counts[:, cells] / counts.sum(1), scale[:, cells]).statistic > 0.3


def test_simulation_repeats():
    first, second = datasets.simulate(50, 30, 2)[0], datasets.simulate(50, 30, 2)[0]
    np.testing.assert_array_equal(first.X.toarray(), second.X.toarray())
    assert (first.X != datasets.simulate(50, 30, 2, seed=1)[0].X).nnz > 0


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="`n_genes` must be an integer of at least 1; got 0"):
        datasets.simulate(10, 0)
    with pytest.raises(ValueError, match="`likelihood` must be one of 'nb', 'zinb', 'poisson'; got 'normal'"):
        datasets.simulate(likelihood="normal")


@pytest.mark.parametrize(
    ("name", "value"), [("theta", 0), ("dropout", 0), ("dropout", 1.0), ("median_library", np.inf)]
)
def test_simulation_says_which_number_is_none(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0"):
        datasets.simulate(likelihood="zinb", **{name: value})
