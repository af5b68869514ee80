from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
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
    with warnings.catch_warnings():
        # Of anndata or scanpy, depending on their releases.
        warnings.simplefilter("ignore")
        raw = sc.datasets.pbmc68k_reduced().raw.to_adata()
    again = np.log1p(counts / adata.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(again, raw.X.toarray(), atol=0.0006)
    assert "CD4+/CD25 T Reg" in adata.obs["bulk_labels"].cat.categories


@pytest.mark.parametrize(
    "spoil", [lambda x: 0.013 * x, lambda x: x + 0.004 * x.sign()], ids=["scaled", "off by a little"]
)
def test_another_version_of_the_data_is_refused(monkeypatch, spoil):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
def test_a_single_population_is_what_it_was_before_there_were_several(likelihood):
    adata, decoder = datasets.simulate(20, 40, 3, likelihood=likelihood, n_batches=2, seed=4)
    assert adata.obs.columns.tolist() == ["batch"]
    # The draws in the order in which they have always been taken.
    rng = np.random.default_rng(4)
    weight = np.zeros((40, 3))
    for k in range(3):
        genes = rng.choice(40, 4, replace=False)
        weight[genes, k] = rng.gamma(4.0, 0.25, 4) * np.where(rng.random(4) < 0.8, 1, -1)
    intercept = rng.normal(0, 1.5, 40) + rng.normal(0, 0.2, (2, 40))
    z = rng.normal(size=(20, 3))
    rate = decoder.rate(z, np.arange(20) % 2, library=500 * np.exp(rng.normal(0, 0.3, 20)))
    x = rng.poisson(rate if likelihood == "poisson" else rng.gamma(5.0, rate / 5.0))
    if likelihood == "zinb":
        x[rng.random(x.shape) < 0.2] = 0
    np.testing.assert_array_equal(decoder.weight_gk, weight)
    np.testing.assert_array_equal(decoder.intercept_bg, intercept)
    np.testing.assert_array_equal(adata.obsm["z_true"], z)
    np.testing.assert_array_equal(adata.X.toarray(), x)


@pytest.mark.parametrize(("n_cells", "n_populations"), [(3000, 3), (3001, 2), (2, 5)])
def test_populations_are_of_equal_size_and_in_all_batches(n_cells, n_populations):
    adata, _ = datasets.simulate(n_cells, 30, n_batches=2, n_populations=n_populations)
    populations = adata.obs["population"]
    assert populations.cat.categories.tolist() == [f"population_{p}" for p in range(n_populations)]
    assert np.ptp(populations.value_counts()) <= 1
    if n_cells >= 3000:
        shares = pd.crosstab(populations, adata.obs["batch"], normalize="index")
        np.testing.assert_allclose(shares, 0.5, atol=0.05)


def test_populations_differ_in_the_means_of_their_latents():
    adata, _ = datasets.simulate(4000, 20, 400, n_populations=4)
    latents = pd.DataFrame(adata.obsm["z_true"]).groupby(adata.obs["population"].to_numpy())
    np.testing.assert_allclose(latents.std(), 0.5, rtol=0.15)
    means = latents.mean().to_numpy().ravel()
    assert stats.kstest(means, "norm").pvalue > 0.01


def test_populations_are_separable_and_overlap():
    adata, _ = datasets.simulate(2000, 300, n_populations=3, specific_program=True, median_library=1000)
    z, code = adata.obsm["z_true"][:, :-1], adata.obs["population"].cat.codes.to_numpy()
    means = np.stack([z[code == p].mean(axis=0) for p in range(3)])
    nearest = ((z[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == code).mean() > 0.9
    # Along a single latent they are not apart.
    assert (np.abs(z[:, None] - means).argmin(axis=1) == code[:, None]).mean(axis=0).min() < 0.9


def test_a_specific_program_varies_in_the_first_population_alone():
    adata, decoder = datasets.simulate(3000, 200, 4, n_populations=3, specific_program=True, n_batches=2)
    is_first = (adata.obs["population"] == "population_0").to_numpy()
    program = adata.obsm["z_true"][:, -1]
    assert (program[~is_first] == 0).all()
    assert abs(program[is_first].mean()) < 0.1
    np.testing.assert_allclose(program[is_first].std(), 1, rtol=0.1)
    assert (adata.obsm["z_true"][:, :-1] != 0).all()
    loaded = decoder.weight_gk != 0
    assert loaded.sum(axis=0).tolist() == [20] * 4
    assert not (loaded[:, :-1].any(axis=1) & loaded[:, -1]).any()
    # Its genes follow it where it is, and in no other cells.
    share = adata.X.toarray() / np.asarray(adata.X.sum(axis=1)).reshape(-1, 1)
    gene = np.argmax(decoder.weight_gk[:, -1] * np.sqrt(decoder.scale(np.zeros((1, 4)), 0)[0]))
    assert stats.spearmanr(share[is_first, gene], program[is_first]).statistic > 0.5
    assert share[is_first, gene].var() > 2 * share[~is_first, gene].var()


@pytest.mark.parametrize("specific_program", [False, True])
def test_simulation_of_populations_repeats(specific_program):
    options = {"n_populations": 2, "specific_program": specific_program}
    (first, _), (second, _) = (datasets.simulate(50, 30, 2, **options) for _ in range(2))
    np.testing.assert_array_equal(first.X.toarray(), second.X.toarray())
    assert first.obs.equals(second.obs)
    assert not first.obs.equals(datasets.simulate(50, 30, 2, seed=1, **options)[0].obs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_populations": 0}, "`n_populations` must be an integer of at least 1; got 0"),
        ({"specific_program": True}, "`n_populations` must be at least 2 for a program of one population; got 1"),
        (
            {"specific_program": True, "n_populations": 2, "n_latent": 1},
            "`n_latent` must be at least 2 for a program of one population; got 1",
        ),
        (
            {"specific_program": True, "n_populations": 2, "n_genes": 1},
            "needs 1 genes in which the other factors have no loadings; 0 of 1 genes are left with 5 factors",
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_what_populations_need_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        datasets.simulate(**options)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="`n_genes` must be an integer of at least 1; got 0"):
        datasets.simulate(10, 0)
    with pytest.raises(ValueError, match="`likelihood` must be one of 'nb', 'zinb', 'poisson'; got 'normal'"):
        datasets.simulate(likelihood="normal")


@pytest.mark.parametrize(
    ("name", "value"), [("theta", 0), ("dropout", 0), ("dropout", 1.0), ("median_library", np.inf)]
)
def test_simulation_says_which_number_is_none(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be (above 0|a finite number)"):
        datasets.simulate(likelihood="zinb", **{name: value})


@pytest.mark.parametrize("kind", ["additive", "identity-activity"])
def test_additive_counts_are_those_of_usages_and_profiles(kind):
    adata, decoder = datasets.simulate(3000, 60, 5, kind=kind, likelihood="poisson", seed=2)
    usage, profile = adata.obsm["usage_true"], adata.varm["program_true"]
    assert decoder is None
    np.testing.assert_allclose(usage.sum(axis=1), 1)
    np.testing.assert_allclose(profile.sum(axis=0), 1)
    library = np.asarray(adata.X.sum(axis=1)).ravel()
    expected = (usage * library[:, None]) @ profile.T
    deviation = (adata.X.toarray() - expected).sum(axis=0) / np.sqrt(expected.sum(axis=0))
    assert np.abs(deviation).max() < 5
    again = datasets.simulate(3000, 60, 5, kind=kind, likelihood="poisson", seed=2)[0]
    assert (again.X != adata.X).nnz == 0


def test_an_activity_is_used_by_some_cells_of_some_types():
    usage = datasets.simulate(2000, 40, 6, kind="identity-activity")[0].obsm["usage_true"]
    active = usage[:, -1] > 0
    assert 0.15 < active.mean() < 0.35
    assert usage[active, -1].min() >= 0.1
    assert usage[active, -1].max() <= 0.7
    assert set(np.argmax(usage[active][:, :-1], axis=1)) == {0, 1, 2}
    assert ((usage[:, :-1] > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    "arguments",
    [{"kind": "other"}, {"kind": "additive", "n_batches": 2}, {"kind": "identity-activity", "n_latent": 1}],
    ids=str,
)
def test_kinds_that_do_not_fit_are_errors(arguments):
    with pytest.raises(ValueError, match=r"kind"):
        datasets.simulate(**arguments)
