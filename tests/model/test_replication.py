"""Agreement of models of disjoint halves of the cells, computed a second time by hand."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import datasets, get
from ldvae_ext.core.matching import consensus_loadings, cosines, match_columns, procrustes
from ldvae_ext.core.rotation import promax
from ldvae_ext.model import LDVAE, fit_ensemble, suggest_n_latent
from ldvae_ext.model.programs import additive_programs
from ldvae_ext.model.replication import Readout, agreement, consensus_factors
from tests.helpers import TRAIN

QUICK = {"max_epochs": 20, "silent": True, "train_kwargs": {"plan_kwargs": {"lr": 2e-2}, **TRAIN}}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*additive programs reproduce:UserWarning",
    "ignore:Last batch will have a small size",
)


@pytest.fixture(scope="module")
def halves():
    adata, _ = datasets.simulate(n_cells=160, n_genes=40, n_latent=2, seed=0)
    LDVAE.setup_anndata(adata)
    options = {"use_batch_norm": "encoder", "bias": "auto", "use_observed_lib_size": True}
    return fit_ensemble(adata, 4, n_latent=3, resample="halves", model_kwargs=options, **QUICK)


def correlations(x, usage):
    """Of log-normalised counts with usages, genes x factors."""
    y = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    return np.corrcoef(y.T, usage.T)[: y.shape[1], y.shape[1] :]


def half_by_hand(halves, h):
    """Consensus, mean loadings, usages of all cells and cells of a half."""
    models = halves.models[h::2]
    loadings = [model.get_loadings().to_numpy().astype(float) for model in models]
    loadings = [value - value.mean(axis=0) for value in loadings]
    consensus = consensus_loadings(loadings)
    turns = [procrustes(consensus, value)[0] for value in loadings]
    usage = np.mean([m.get_latent_representation() @ q for m, q in zip(models, turns, strict=True)], axis=0)
    mean = np.mean([value @ q for value, q in zip(loadings, turns, strict=True)], axis=0)
    return consensus, mean, usage, np.sort(models[0].train_indices)


def agreement_by_hand(a, b, usage_a, usage_b, n_top):
    cosine = cosines(a, b)
    pairs = match_columns(cosine)
    rows = []
    for i, j in zip(pairs.first, pairs.second, strict=True):
        sign = np.sign(cosine[i, j])
        tops = [pd.Series(values).nlargest(n_top).index for values in (a[:, i], sign * b[:, j])]
        rows.append(
            [
                abs(cosine[i, j]),
                len(tops[0].intersection(tops[1])) / n_top,
                abs(np.corrcoef(usage_a[:, i], usage_b[:, j])[0, 1]),
            ]
        )
    return np.array(rows)


def test_agreement_is_that_of_matched_columns_whatever_their_order_and_signs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60, 4))
    b = 0.6 * a + b
    u, v = rng.normal(size=(2, 30, 4))
    got = agreement(Readout(a, u), Readout(b, v), 20)
    np.testing.assert_allclose(got, agreement_by_hand(a, b, u, v, 20))
    order, signs = [2, 0, 3, 1], np.array([1, -1, -1, 1])
    again = agreement(Readout(a, u), Readout(b[:, order] * signs, v[:, order] * signs), 20)
    np.testing.assert_allclose(again, got)
    same = agreement(Readout(a, u), Readout(-a, -u))
    np.testing.assert_allclose(same, 1)


def test_usages_that_are_constant_have_no_correlation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 2))
    got = agreement(Readout(a, np.ones((10, 2))), Readout(a, rng.normal(size=(10, 2))))
    assert got["usages"].isna().all()
    np.testing.assert_allclose(got["scores"], 1)


def test_consensus_factors_are_means_on_the_axes_of_the_consensus(halves):
    found = consensus_factors(halves.models[0::2])
    consensus, mean, usage, _ = half_by_hand(halves, 0)
    order = match_columns(cosines(found.loading_gk, consensus))
    np.testing.assert_allclose(order.cosine, 1, atol=1e-6)
    for got, expected in ((found.loading_gk, consensus), (found.mean_gk, mean), (found.usage_nk, usage)):
        np.testing.assert_allclose(got, expected[:, order.second] * order.sign, atol=1e-4)


def test_replication_compares_the_consensus_of_each_half(halves):
    x = halves.models[0].adata.X.toarray()
    sides = []
    for h in (0, 1):
        consensus, _, usage, cells = half_by_hand(halves, h)
        pairs = match_columns(cosines(halves.loadings.to_numpy(), consensus))
        score = correlations(x[cells], usage[cells])
        sides.append((score[:, pairs.second] * pairs.sign, usage[:, pairs.second] * pairs.sign))
    for k, name in enumerate(halves.names):
        (score_a, usage_a), (score_b, usage_b) = (tuple(v[:, k] for v in side) for side in sides)
        expected = score_a @ score_b / np.linalg.norm(score_a) / np.linalg.norm(score_b)
        np.testing.assert_allclose(halves.stats.loc[name, "scores"], expected, rtol=1e-4)
        expected = np.corrcoef(usage_a, usage_b)[0, 1]
        np.testing.assert_allclose(halves.stats.loc[name, "usages"], expected, rtol=1e-4, atol=1e-5)
    is_replicated = (halves.stats["scores"] >= 0.8) & (halves.stats["usages"] >= 0.9)
    np.testing.assert_array_equal(halves.stats["replicates"], is_replicated)
    assert halves.n_replicated == is_replicated.sum()
    assert f"; {halves.n_replicated} replicate between the halves" in repr(halves)


def test_readouts_are_compared_by_their_own_scores_and_usages(halves):
    table = halves.compare_readouts(n_programs=2, n_top=10)
    assert table.index.tolist() == ["factors, loadings", "factors", "promax", "programs"]
    x = halves.models[0].adata.X.toarray()
    expected = {"factors, loadings": [], "factors": [], "promax": []}
    for h in (0, 1):
        consensus, mean, usage, cells = half_by_hand(halves, h)
        oblique = usage @ promax(mean, np.eye(3))
        expected["factors, loadings"].append((consensus, usage))
        expected["factors"].append((correlations(x[cells], usage[cells]), usage))
        expected["promax"].append((correlations(x[cells], oblique[cells]), oblique))
    for name, ((a, u), (b, v)) in expected.items():
        each = agreement_by_hand(a, b, u, v, 10)
        row = [np.median(each[:, 0]), each[:, 1].mean(), np.median(each[:, 2])]
        np.testing.assert_allclose(table.loc[name], row, atol=1e-3)
    sides = []
    for h in (0, 1):
        models, cells = halves.models[h::2], half_by_hand(halves, h)[3]
        found = additive_programs(models, 2, indices=cells)
        expression = np.mean(
            [m.get_normalized_expression(use_posterior_mean=True, return_numpy=True) for m in models], axis=0
        )
        sides.append((found.scores.to_numpy(), found.additive.usages(expression.astype(float)).usage_nk))
    (a, u), (b, v) = sides
    each = agreement_by_hand(a, b, u, v, 10)
    row = [np.median(each[:, 0]), each[:, 1].mean(), np.median(each[:, 2])]
    np.testing.assert_allclose(table.loc["programs"], row, atol=1e-3)


def test_other_ensembles_say_what_replication_needs():
    adata, _ = datasets.simulate(n_cells=60, n_genes=20, n_latent=2, seed=0)
    LDVAE.setup_anndata(adata)
    runs = fit_ensemble(adata, 2, n_latent=2, **QUICK)
    assert runs.replication is None
    assert "replicates" not in runs.stats
    for ask in (lambda: runs.n_replicated, runs.compare_readouts):
        with pytest.raises(ValueError, match="needs `fit_ensemble\\(resample='halves'\\)`"):
            ask()


def test_the_export_brings_it_back(halves, tmp_path):
    adata = ad.AnnData(var=pd.DataFrame(index=halves.genes))
    halves.export_to_anndata(adata)
    adata.write_h5ad(tmp_path / "consensus.h5ad")
    back = ad.read_h5ad(tmp_path / "consensus.h5ad")
    pd.testing.assert_frame_equal(get.stability(back), halves.stats, check_dtype=False)


def test_a_suggestion_counts_what_replicates(halves):
    suggestion = suggest_n_latent(ensemble=halves)
    assert suggestion.n_factors == halves.n_replicated
    assert "replicate between halves of the cells" in suggestion.message
    assert "share their cells" not in suggestion.message
