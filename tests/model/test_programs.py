"""Additive programs of decoded expression. Whether they replicate is measured by benchmarks/programs.py."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from ldvae_ext import datasets, get, tl
from ldvae_ext.core.matching import STABLE
from ldvae_ext.core.programs import fit_programs
from ldvae_ext.model import LDVAE, fit_ensemble
from ldvae_ext.model.programs import _chosen, additive_programs, decoded_expression
from tests.helpers import counts, untrained

# An untrained decoder need not be additive.
pytestmark = pytest.mark.filterwarnings("ignore:.*additive programs reproduce:UserWarning")


@pytest.fixture(scope="module")
def model():
    return untrained(counts(n_batches=2), use_observed_lib_size=True)


@pytest.fixture(scope="module")
def pbmc_programs(pbmc_trained):
    return pbmc_trained.get_programs(6, groupby="bulk_labels")


def test_programs_are_those_of_the_decoded_expression_in_an_average_batch(model):
    decoder, z = model.get_decoder(), model.get_latent_representation()
    logits = z.astype(np.float64) @ decoder.weight_gk.T + decoder.intercept_bg.mean(axis=0)
    expression = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    x = model.adata.X.toarray()
    expected = fit_programs(expression, (x / x.sum(axis=1, keepdims=True)).std(axis=0), 3)
    found = model.get_programs(3)
    usage = expected.usages(expression)
    order = np.argsort(-usage.usage_nk.mean(axis=0))
    np.testing.assert_allclose(found.usages, usage.usage_nk[:, order], atol=1e-4)
    np.testing.assert_allclose(found.profiles, expected.profile_gk[:, order], atol=1e-4)
    np.testing.assert_allclose(found.residual, usage.residual_n, atol=1e-4)
    assert found.explained == pytest.approx(expected.explained, abs=1e-4)


def test_programs_of_an_ensemble_are_those_of_the_mean_expression():
    adata = counts()
    models = [untrained(adata, seed=seed) for seed in range(3)]
    expression = np.mean(
        [m.get_normalized_expression(use_posterior_mean=True, return_numpy=True) for m in models],
        axis=0,
        dtype=np.float64,
    )
    x = adata.X.toarray()
    expected = fit_programs(expression, (x / x.sum(axis=1, keepdims=True)).std(axis=0), 3)
    found = additive_programs(models, 3)
    np.testing.assert_allclose(
        np.sort(found.usages.to_numpy(), axis=1), np.sort(expected.usages(expression).usage_nk, axis=1), atol=1e-3
    )
    assert found.compared == "runs"
    assert found.explained == pytest.approx(expected.explained, abs=1e-3)


def test_scores_are_correlations_of_expression_and_usage(model):
    found = model.get_programs(3)
    x = model.adata.X.toarray()
    expression = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    for g in (0, 7):
        for k in range(3):
            r = np.corrcoef(expression[:, g], found.usages.to_numpy()[:, k])[0, 1]
            assert found.scores.iloc[g, k] == pytest.approx(r, abs=1e-6)
            assert found.errors.iloc[g, k] == pytest.approx(np.sqrt((1 - r**2) / 58), abs=1e-6)


@pytest.mark.parametrize("batch_size", [7, 60])
def test_results_do_not_depend_on_the_batch_size(model, batch_size):
    np.testing.assert_allclose(
        model.get_programs(3, batch_size=batch_size).usages, model.get_programs(3).usages, atol=1e-4
    )


def test_other_cells_and_some_of_them_have_usages(model):
    other = counts(n_cells=30, n_batches=2, seed=5)
    found = model.get_programs(3, adata=other, indices=[4, 2, 9, 11, 20, 21, 22])
    assert found.usages.index.tolist() == ["cell4", "cell2", "cell9", "cell11", "cell20", "cell21", "cell22"]
    np.testing.assert_allclose(found.usages.sum(axis=1), 1)


def test_fits_to_a_sample_describe_all_cells(model):
    found = model.get_programs(2, max_cells=30, seed=1)
    assert len(found.usages) == 60
    np.testing.assert_array_equal(found.usages, model.get_programs(2, max_cells=30, seed=1).usages)
    assert not np.allclose(found.usages, model.get_programs(2, max_cells=30, seed=2).usages, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"latent_distribution": "ln"},
        {"gene_likelihood": "zinb"},
        {"gene_likelihood": "poisson"},
        {"setup": {"size_factor_key": "size"}},
        {"dispersion": "gene-batch"},
        {"setup": {"categorical_covariate_keys": ["batch"], "continuous_covariate_keys": ["size"], "batch_key": None}},
    ],
    ids=str,
)
def test_every_kind_of_model_has_programs(options):
    adata = counts(n_batches=2)
    adata.obs["size"], adata.obs["one"] = np.linspace(0.5, 2, 60), "a"
    options = {**options, "setup": {"batch_key": "one", **options.get("setup", {})}}
    model = untrained(adata, **options)
    decoded = np.concatenate([e for _, _, e in decoded_expression([model], None, np.arange(60), None)])
    expected = model.get_normalized_expression(use_posterior_mean=True, return_numpy=True, library_size=1).astype(float)
    np.testing.assert_allclose(decoded, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)
    found = model.get_programs(2)
    np.testing.assert_allclose(found.usages.sum(axis=1), 1)
    np.testing.assert_allclose(found.profiles.sum(), 1)


def test_programs_of_blood_cells_are_their_types(pbmc_programs, pbmc_trained):
    assert pbmc_programs.is_additive
    by_type = pbmc_programs.usages.groupby(pbmc_trained.adata.obs["bulk_labels"], observed=True).mean()
    for gene, label in (("CD79A", "CD19+ B"), ("NKG7", "CD56+ NK"), ("LYZ", "CD14+ Monocyte")):
        program = next(name for name in pbmc_programs.names if gene in pbmc_programs.scores[name].nlargest(12).index)
        assert label in by_type[program].nlargest(3).index
    assert repr(pbmc_programs).startswith("Programs: 6 of 700 cells")


def test_relations_name_each_program_in_each_group(pbmc_programs, pbmc_trained):
    relations = pbmc_programs.relations
    groups = pbmc_trained.adata.obs["bulk_labels"].cat.categories
    assert len(relations) == 6 * len(groups)
    assert relations["angle"].between(0, 90).all()
    assert relations["factor"].isin(pbmc_trained.factor_names).all()
    assert relations["cosine"].abs().max() > 0.3


def test_the_fewest_stable_programs_with_a_small_error_are_chosen():
    import pandas as pd

    curve = pd.DataFrame(
        {"n_programs": [2, 4, 6, 8], "stability": [0.9, 0.95, 0.9, 0.6], "error": [0.3, 0.09, 0.05, 0.01]}
    )
    assert _chosen(curve) == 4
    assert _chosen(curve.assign(error=0.2)) == 6
    assert _chosen(curve.assign(stability=[0.5, 0.7, 0.6, 0.2])) == 4


def test_several_numbers_make_a_curve(model):
    found = model.get_programs([4, 2, 3])
    assert found.curve["n_programs"].tolist() == [2, 3, 4]
    assert (np.diff(found.curve["error"]) < 0).all()
    assert len(found.names) in (2, 3, 4)
    assert len(model.get_programs().curve) >= 4


def test_a_poor_additive_description_warns():
    adata, _decoder = datasets.simulate(n_cells=300, n_genes=60, n_latent=6, seed=1)
    model = untrained(adata, n_latent=6)
    with pytest.warns(UserWarning, match=r"additive programs reproduce .* less than 85%.*Read factors"):
        found = model.get_programs(2)
    assert not found.is_additive
    assert "fits badly" in repr(found)


def test_export_writes_by_name_and_refuses_what_is_not_its_own(model, tmp_path):
    found = model.get_programs(3, groupby="batch")
    adata = counts(n_batches=2)[::-1].copy()
    adata.var_names = [*adata.var_names[:-1], "another"]
    found.export_to_anndata(adata)
    np.testing.assert_allclose(adata.obsm["X_ldvae_programs"], found.usages.to_numpy()[::-1], atol=1e-6)
    assert np.isnan(adata.varm["ldvae_programs"][-1]).all()
    np.testing.assert_allclose(adata.varm["ldvae_programs_scores"][:-1], found.scores.to_numpy()[:-1], atol=1e-6)
    found.export_to_anndata(adata)
    adata.write_h5ad(tmp_path / "x.h5ad")
    read = ad.read_h5ad(tmp_path / "x.h5ad").uns["ldvae_programs"]
    assert read["names"].tolist() == ["P_0", "P_1", "P_2"]
    assert read["relations"]["group"].tolist()[0] == "CD4+/CD25 T"
    adata.uns["mine"] = {"a": 1}
    with pytest.raises(ValueError, match="mine"):
        found.export_to_anndata(adata, key_added="mine")
    found.export_to_anndata(adata, key_added="mine", overwrite=True)
    found.export_to_anndata(adata, key_added="twice")
    adata.var_names = [*adata.var_names[:-1], "gene0"]
    with pytest.raises(ValueError, match="genes of `adata` must be unique; 'gene0'"):
        found.export_to_anndata(adata)
    with pytest.raises(ValueError, match="none of the 20 genes"):
        found.export_to_anndata(ad.AnnData(np.ones((2, 2))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_programs": 1}, "`n_programs`"),
        ({"n_programs": []}, "got none"),
        ({"n_programs": 2.5}, "`n_programs`"),
        ({"n_programs": "many"}, "`n_programs`"),
        ({"n_programs": 40}, "need at least 80 cells; got 60"),
        ({"n_programs": 2, "max_cells": 0}, "`max_cells`"),
        ({"n_programs": 2, "indices": [0]}, "need at least 4 cells; got 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.get_programs(**arguments)
    with pytest.raises(KeyError, match="nothing"):
        model.get_programs(2, groupby="nothing")


@pytest.mark.slow
def test_an_ensemble_recovers_additive_programs():
    rng = np.random.default_rng(0)
    profile = rng.gamma(0.3, 1.0, (150, 4)) * np.exp(rng.normal(0, 1, (150, 1)))
    profile /= profile.sum(axis=0)
    usage = rng.dirichlet(np.full(4, 0.3), 600)
    adata = ad.AnnData(rng.poisson(1000 * usage @ profile.T).astype(np.float32))
    LDVAE.setup_anndata(adata)
    runs = fit_ensemble(adata, 3, n_latent=6, max_epochs=150, silent=True, train_kwargs={"accelerator": "cpu"})
    found = runs.programs(4)
    r = np.abs(np.corrcoef(usage.T, found.usages.to_numpy().T)[:4, 4:])
    assert (r.max(axis=1) > 0.95).all()
    assert (found.stats["stability"] >= STABLE).all()
    assert found.relations["factor"].str.startswith("F_").all()


def test_get_programs_reads_an_export_back(model, tmp_path):
    found = model.get_programs(3)
    obs, var = ["other", *model.adata.obs_names[::-1]], [*model.adata.var_names[::-1], "foreign"]
    adata = ad.AnnData(obs=pd.DataFrame(index=obs), var=pd.DataFrame(index=var))
    found.export_to_anndata(adata, "mine")
    adata.write_h5ad(tmp_path / "programs.h5ad")
    back = ad.read_h5ad(tmp_path / "programs.h5ad")
    for what in ("scores", "errors", "profiles", "usages"):
        got = get.programs(back, what, key="mine")
        expected = getattr(found, what)
        assert set(got.index) == set(expected.index)
        np.testing.assert_allclose(got.loc[expected.index], expected, rtol=1e-6)
        assert got.columns.tolist() == found.names
    np.testing.assert_allclose(get.programs(back, "stats", key="mine"), found.stats)
    match = tl.match_factors(back, found, by="gene_scores", key="mine")
    np.testing.assert_allclose(match.pairs["cosine"], 1, atol=1e-6)
    with pytest.raises(KeyError, match="No programs 'ldvae_programs'"):
        get.programs(back)
    with pytest.raises(ValueError, match="`what` must be one of"):
        get.programs(back, "loadings", key="mine")
