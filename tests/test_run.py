"""The main job as a function: what it trains, what it writes, and what it says of the factors."""

from __future__ import annotations

import collections
import logging
import warnings

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import ldvae_ext
from ldvae_ext import _run, datasets, get
from ldvae_ext._annotation import best_gene_sets, marked_populations, read_gmt
from ldvae_ext.cli import app
from ldvae_ext.core.matching import cosines, match_columns
from tests.helpers import counts


def cells(n_cells=150):
    adata = counts(n_cells=n_cells, n_genes=40, n_batches=3)
    adata.obs["type"] = pd.Categorical(np.resize(["T/NK", "B"], n_cells))
    adata.obs["age"] = np.linspace(-1.7, 1.7, n_cells)
    adata.obs["lane"] = np.resize(["one", "two"], n_cells)
    return adata


def logged(adata):
    """As scanpy's `normalize_total` and `log1p` leave it."""
    adata.X = np.log1p(adata.X)
    return adata


QUICK = {"n_latent": 3, "max_epochs": 3, "silent": True, "umap": False}


def test_several_runs_are_trained_and_their_consensus_is_exported():
    adata = cells()
    result = ldvae_ext.run(adata, n_runs=2, groupby="type", seed=4, **QUICK)
    assert result.ensemble.seeds == [4, 5]
    stats = result.ensemble.stats
    table = get.factors(adata)
    np.testing.assert_allclose(table["reproducibility"], stats["reproducibility"])
    assert table["flag"].tolist() == stats["flag"].tolist()
    assert "explained_deviance" in table
    np.testing.assert_allclose(get.stability(adata)["reproducibility"], stats["reproducibility"])
    assert result.model.rotation.method == "consensus"
    assert result.ablation.shape == (150, 3)
    assert repr(result) == f"Run of 150 cells: 3 factors, {(stats['flag'] == 'stable').sum()} stable"
    assert "X_umap" not in adata.obsm


def test_one_run_is_quick_and_says_nothing_of_others():
    adata = cells()
    result = ldvae_ext.run(adata, n_runs=1, **{**QUICK, "umap": True})
    assert result.ensemble is None
    assert "flag" not in get.factors(adata)
    assert adata.obsm["X_umap"].shape == (150, 2)
    again = cells()
    again.obsm["X_umap"] = np.zeros((150, 2))
    ldvae_ext.run(again, n_runs=1, **{**QUICK, "umap": True})
    assert not again.obsm["X_umap"].any(), "an embedding of the user stays"


@pytest.mark.parametrize("rotation", ["promax", "none"])
def test_reproducibility_on_other_axes_is_that_of_the_same_axes_of_other_runs(rotation):
    adata = cells()
    result = ldvae_ext.run(adata, n_runs=3, rotation=rotation, **QUICK)

    def loadings(model):
        return model.get_decoder(rotated=model.rotation is not None).centered().weight_gk

    own = loadings(result.model)
    agreement = []
    for model in result.ensemble.models:
        assert model.rotation.method == "varimax", "the runs stay as they were"
        if model.history is result.model.history:
            continue
        model.rotate(rotation)
        agreement.append(match_columns(cosines(own, loadings(model))).cosine)
    expected = pd.Series(np.mean(agreement, axis=0), index=result.model.factor_names)
    assert len(agreement) == 2
    table = get.factors(adata)
    np.testing.assert_allclose(table["reproducibility"], expected[table.index])
    assert table.index[0].startswith("Z_" if rotation == "none" else "F_")


def test_options_reach_the_model():
    adata = cells()
    adata.layers["raw"] = adata.X.copy()
    result = ldvae_ext.run(
        adata, layer="raw", batch_key="batch", covariates=["age", "lane"], n_top_genes=25, n_runs=1, **QUICK
    )
    given = result.model.registry["setup_args"]
    assert given["layer"] == "raw"
    assert given["continuous_covariate_keys"] == ["age"]
    assert given["categorical_covariate_keys"] == ["lane"]
    assert adata.var["ldvae"].sum() == 25
    sized = cells()
    sized.obs["size"] = 1.0
    assert ldvae_ext.run(sized, size_factor_key="size", n_runs=1, **QUICK).model.get_decoder().link == "softplus"


def test_training_stops_when_held_out_cells_are_no_better():
    adata, _ = datasets.simulate(n_cells=200, n_genes=60, n_latent=2)
    result = ldvae_ext.run(adata, n_runs=1, n_latent=2, silent=True, umap=False)
    n_epochs = len(result.model.history["elbo_train"])
    assert 50 < n_epochs < 400
    assert result.model.final_kl_weight == 1
    assert result.settings["epochs"] == str(n_epochs)
    assert result.notes == []
    gap = result.model.get_amortization_gap(seed=0)["gap"].mean()
    assert result.settings["amortization gap"].startswith(f"{gap:.1f} nats")


def test_no_state_is_left_behind(capsys):
    lightning = logging.getLogger("lightning.pytorch")
    level, threads, seed = lightning.level, torch.get_num_threads(), scvi.settings.seed
    ldvae_ext.run(cells(), n_runs=2, **QUICK)
    assert lightning.level == level
    assert torch.get_num_threads() == threads
    assert scvi.settings.seed == seed
    assert capsys.readouterr().out == ""


def test_the_command_gives_the_same(tmp_path):
    adata = cells()
    adata.write_h5ad(tmp_path / "counts.h5ad")
    ldvae_ext.run(adata, n_runs=2, groupby="type", seed=3, **QUICK)
    arguments = ["--runs", 2, "--labels", "type", "--seed", 3, "--n-latent", 3, "--max-epochs", 3, "--quiet"]
    done = CliRunner().invoke(
        app, ["run", str(tmp_path / "counts.h5ad"), "--out", str(tmp_path / "out"), *map(str, arguments)]
    )
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "out" / "tables" / "factors.csv", index_col=0)
    np.testing.assert_allclose(table["kl"], get.factors(adata)["kl"], rtol=1e-4)
    np.testing.assert_allclose(table["reproducibility"], get.factors(adata)["reproducibility"], rtol=1e-4)
    text = (tmp_path / "out" / "report.html").read_text()
    given = "--groupby type --n-latent 3 --runs 2 --rotation varimax --max-epochs 3 --seed 3"
    assert f"ldvae-ext run {tmp_path / 'counts.h5ad'} {given}" in text


def test_factors_are_annotated_by_populations_and_gene_sets():
    adata = cells()
    sets = {"first": adata.var_names[:6].tolist(), "small": adata.var_names[:2].tolist(), "other": ["nobody"] * 9}
    result = ldvae_ext.run(adata, n_runs=1, groupby="type", gene_sets=sets, **QUICK)
    table, latent = result.factors(), adata.obsm["X_ldvae"]
    scores = get.gene_scores(adata, kind="regression")
    for k, (_, row) in enumerate(table.iterrows()):
        aurocs = {name: roc_auc_score(adata.obs["type"] == name, latent[:, k]) for name in ("T/NK", "B")}
        assert row["population"] == max(aurocs, key=aurocs.get)
        assert row["auroc"] == pytest.approx(max(aurocs.values()))
        assert row["low_auroc"] == pytest.approx(1 - min(aurocs.values()))
        assert (
            row["most_affected"]
            == result.ablation.to_df()[row.name].groupby(adata.obs["type"], observed=True).mean().idxmax()
        )
    found = best_gene_sets(scores, sets)
    for name in scores:
        expected = roc_auc_score(scores.index.isin(sets["first"]), scores[name])
        if expected >= 0.7 and scores[name].nlargest(20).index.isin(sets["first"]).any():
            assert found[name].name == "first"
            assert found[name].auroc == pytest.approx(expected)
        else:
            assert name not in found


def test_cells_without_a_population_mark_nothing():
    latent = np.random.default_rng(0).normal(size=(30, 2))
    code = np.resize([0, 1, -1], 30)
    latent[code == 0, 0] += 9
    latent[code == -1, 0] -= 9
    marks = marked_populations(latent, ["a", "b"], code)
    assert marks[0][:2] == ("a", 1.0)
    assert marks[0].low == "b"
    assert marked_populations(latent, ["a"], np.zeros(30, dtype=int)) == []


def test_gene_sets_are_read(tmp_path):
    (tmp_path / "sets.gmt").write_text("B cell\thand\tCD79A\tMS4A1\n\nNK\t\tNKG7\tGNLY\t\n")
    assert read_gmt(tmp_path / "sets.gmt") == {"B cell": ["CD79A", "MS4A1"], "NK": ["NKG7", "GNLY"]}
    (tmp_path / "bad.gmt").write_text("B cell\thand\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no gene set"):
        read_gmt(tmp_path / "bad.gmt")
    (tmp_path / "empty.gmt").write_text("")
    with pytest.raises(ValueError, match="has no gene sets"):
        read_gmt(tmp_path / "empty.gmt")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rotation": "oblimin"}, ValueError, "`rotation` must be one of 'varimax', 'promax', 'none'"),
        ({"n_runs": 0}, ValueError, "`n_runs` must be an integer of at least 1"),
        ({"groupby": "cluster"}, KeyError, "`groupby`: 'cluster' is not a column"),
        ({"covariates": ["sex"]}, KeyError, "`covariates`: 'sex' is not a column"),
        ({"batch_key": "lab"}, KeyError, "`batch_key`: 'lab' is not a column"),
        ({"layer": "raw"}, KeyError, "`layer`: 'raw' is not in `adata.layers`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"gene_sets": ["CD3D"]}, TypeError, "`gene_sets` must be a mapping from names to genes, or the path"),
        ({"gene_sets": "nothing.gmt"}, FileNotFoundError, r"nothing\.gmt"),
        ({"n_top_genes": -1}, ValueError, "`n_top_genes`"),
        ({"max_epochs": 0}, ValueError, "`max_epochs`"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(arguments, error, match):
    adata = cells()
    before = adata.copy()
    with pytest.raises(error, match=match):
        ldvae_ext.run(adata, **{**QUICK, **arguments})
    assert adata.obs.equals(before.obs)
    assert not adata.uns
    assert not adata.obsm


def test_values_that_are_no_counts_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr(_run, "train_and_export", lambda *_, **__: pytest.fail("trained"))
    adata = logged(cells())
    first = adata.X.data[adata.X.data % 1 != 0][0]
    match = rf"`adata\.X` must hold counts, but has values that are not integers, such as {first:g}\. No layer .* round them first: `adata\.X = np\.rint"
    with pytest.raises(ValueError, match=match):
        ldvae_ext.run(adata, **QUICK)
    adata.layers["raw"], adata.layers["logged"] = cells().X, adata.X.copy()
    with pytest.raises(ValueError, match=r"Counts are in 'raw': name it with `layer=`\."):
        ldvae_ext.run(adata, **QUICK)
    adata.X = adata.layers["raw"].copy()
    del adata.layers["raw"]
    with pytest.raises(
        ValueError, match=r"`adata\.layers\['logged'\]` must hold .* Counts are in `adata\.X`: leave out `layer=`\."
    ):
        ldvae_ext.run(adata, layer="logged", **QUICK)
    assert not adata.uns
    assert "_scvi_batch" not in adata.obs


def test_counts_in_raw_are_named():
    adata = cells()
    adata.raw = adata.copy()
    with pytest.raises(
        ValueError, match=r"`adata\.layers\['counts'\] = adata\.raw\[:, adata\.var_names\]\.X` makes a layer"
    ):
        ldvae_ext.run(logged(adata), **QUICK)


def test_a_warning_is_given_once():
    adata = cells()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(150) != 3)[:, None])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ldvae_ext.run(adata, n_runs=1, **QUICK)
    assert [str(warning.message)[:33] for warning in caught if "no counts" in str(warning.message)] == [
        "1 of 150 cells have no counts in "
    ]


def test_a_training_that_the_number_of_epochs_stopped_is_named(tmp_path):
    result = ldvae_ext.run(cells(), n_runs=2, **QUICK)
    assert result.notes == [
        "The largest number of epochs, 3, ended 2 of 2 trainings while the ELBO of held-out cells may still have improved; "
        "allow more with `max_epochs` (`--max-epochs`)."
    ]
    assert "The largest number of epochs, 3, ended 2 of 2" in result.report(tmp_path / "report.html").read_text()
    few = ldvae_ext.run(cells(90), n_runs=1, **QUICK)
    assert few.notes == [], "with fewer than 100 cells there is no early stopping"


@pytest.mark.slow
def test_factors_of_the_bundled_example_are_readable():
    adata = datasets.pbmc68k()
    result = ldvae_ext.run(adata, groupby="bulk_labels", silent=True, umap=False)
    table = result.factors()
    stable = table[table["flag"] == "stable"]
    assert len(stable) >= 7
    genes = collections.Counter(gene for names in stable["up"] for gene in names.split(", "))
    assert max(genes.values()) <= 3
    assert stable["auroc"].median() > 0.85
