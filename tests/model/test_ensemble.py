"""Ensembles: which cells a run is trained on, what happens when one fails, what is written. Whether the consensus finds programs
is in test_simulated_programs.py."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from ldvae_ext import datasets, get, tl
from ldvae_ext.core.matching import consensus_of, cosines
from ldvae_ext.core.rotation import varimax
from ldvae_ext.model import LDVAE, _runs, fit_ensemble, n_latent, suggest_n_latent

QUICK = {"max_epochs": 2, "silent": True, "train_kwargs": {"accelerator": "cpu", "check_val_every_n_epoch": None}}


@pytest.fixture(autouse=True)
def _no_word_of_short_training():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Last batch will have a small size")
        yield


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    adata, _ = datasets.simulate(n_cells=150, n_genes=30, n_latent=2, n_batches=2, seed=0)
    adata.var_names = [f"A/{name}" for name in adata.var_names]
    LDVAE.setup_anndata(adata, batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def runs(cells) -> Any:
    return fit_ensemble(cells, 3, n_latent=4, **QUICK)


def test_runs_differ_by_their_seed_and_share_their_cells(runs, cells):
    assert runs.seeds == [0, 1, 2]
    assert all(model.adata is cells for model in runs.models)
    for model in runs.models[1:]:
        np.testing.assert_array_equal(model.train_indices, runs.models[0].train_indices)
        np.testing.assert_array_equal(model.validation_indices, runs.models[0].validation_indices)
        assert not np.allclose(model.get_loadings(), runs.models[0].get_loadings(), atol=1e-3)
    assert len(runs.models[0].train_indices) == 135
    assert len(runs.models[0].validation_indices) == 15


def test_the_same_call_gives_the_same_runs_and_leaves_random_states_and_data_alone(runs, cells):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    counts, columns = cells.X.copy(), list(cells.obs)
    again = fit_ensemble(cells, 2, n_latent=4, **QUICK)
    for model, other in zip(again.models, runs.models, strict=False):
        np.testing.assert_array_equal(model.get_loadings(), other.get_loadings())
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert (counts != cells.X).nnz == 0
    assert list(cells.obs) == columns


def test_another_first_seed_gives_other_runs(runs, cells):
    other = fit_ensemble(cells, 2, n_latent=4, seed=1, **QUICK)
    assert other.seeds == [1, 2]
    # The seed also draws the cells, so that run 1 of the one is not run 1 of the other.
    assert not np.array_equal(np.sort(other.models[0].train_indices), np.sort(runs.models[1].train_indices))


def test_halves_share_no_cell_and_are_compared_with_each_other(cells):
    found = fit_ensemble(cells, 4, n_latent=3, resample="halves", **QUICK)
    trained = [set(model.train_indices.tolist()) for model in found.models]
    assert trained[0] == trained[2]
    assert trained[1] == trained[3]
    assert trained[0] & trained[1] == set()
    assert trained[0] | trained[1] == set(range(150))
    loadings = [model.get_loadings(canonical=True).to_numpy() for model in found.models]
    expected = consensus_of(loadings, [0, 1, 0, 1])
    np.testing.assert_allclose(
        np.sort(found.consensus.reproducibility_k), np.sort(expected.reproducibility_k), atol=1e-10
    )
    assert "two disjoint halves" in repr(found)
    assert found.cells_of_run == [0, 1, 0, 1]
    assert set(found.stats["cells"]) == {"disjoint halves"}


def test_bootstrap_draws_as_many_cells_as_there_are_with_replacement(cells):
    found = fit_ensemble(cells, 2, n_latent=3, resample="bootstrap", **QUICK)
    first, second = (np.asarray(model.train_indices) for model in found.models)
    for drawn in (first, second):
        assert len(drawn) == 150
        assert 70 < len(np.unique(drawn)) < 120  # 1 - 1/e of them are expected
    assert not np.array_equal(first, second)


def test_a_resampled_run_is_not_trained_on_the_other_cells(cells):
    changed = ad.AnnData(cells.X.copy(), obs=cells.obs[["batch"]].copy(), var=cells.var.copy())
    LDVAE.setup_anndata(changed, batch_key="batch")
    reference = fit_ensemble(
        changed, 2, n_latent=3, resample="halves", model_kwargs={"use_observed_lib_size": True}, **QUICK
    )
    others = np.asarray(reference.models[1].train_indices)
    order = np.arange(150)
    order[others] = others[::-1]
    changed.X = changed.X[order]
    LDVAE.setup_anndata(changed, batch_key="batch")
    again = fit_ensemble(
        changed, 2, n_latent=3, resample="halves", model_kwargs={"use_observed_lib_size": True}, **QUICK
    )
    np.testing.assert_array_equal(again.models[0].get_loadings(), reference.models[0].get_loadings())
    assert not np.allclose(again.models[1].get_loadings(), reference.models[1].get_loadings())


def fail_for(monkeypatch: pytest.MonkeyPatch, *which: int) -> None:
    train, n_calls = _runs.train_on, iter(range(100))

    def fragile(*args: Any) -> None:
        if next(n_calls) in which:
            msg = "no room"
            raise MemoryError(msg)
        train(*args)

    monkeypatch.setattr(_runs, "train_on", fragile)


def test_one_failed_run_does_not_lose_the_others(cells, runs, monkeypatch):
    fail_for(monkeypatch, 1)
    with pytest.warns(UserWarning, match="seed 1 failed and is left out .MemoryError: no room"):
        found = fit_ensemble(cells, 3, n_latent=4, **QUICK)
    assert found.seeds == [0, 2]
    assert found.failures == {1: "MemoryError: no room"}
    np.testing.assert_array_equal(found.models[1].get_loadings(), runs.models[2].get_loadings())
    assert "2 runs, 1 failed" in repr(found)


@pytest.mark.parametrize(("n_runs", "which", "resample"), [(3, (0, 1), None), (4, (1, 3), "halves")])
def test_runs_that_cannot_be_compared_raise(cells, monkeypatch, n_runs, which, resample):
    fail_for(monkeypatch, *which)
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match=r"cannot be compared.*no room"):
        fit_ensemble(cells, n_runs, n_latent=4, resample=resample, **QUICK)


def test_loadings_that_are_no_numbers_are_a_failed_run(cells, monkeypatch):
    train = LDVAE.train

    def spoil(self: LDVAE, *args: Any, **kwargs: Any) -> None:
        train(self, *args, **kwargs)
        with torch.no_grad():
            self.module.decoder.factor_regressor.fc_layers[0][0].weight[0, 0] = torch.nan

    monkeypatch.setattr(LDVAE, "train", spoil)
    with pytest.warns(UserWarning, match="loadings that are NaN or infinite"), pytest.raises(RuntimeError):
        fit_ensemble(cells, 2, n_latent=4, **QUICK)


def test_tables_have_the_names_and_numbers_of_the_consensus(runs):
    assert runs.names == ["C_0", "C_1", "C_2", "C_3"]
    loadings = [model.get_loadings(canonical=True).to_numpy() for model in runs.models]
    expected = consensus_of(loadings)
    order = [int(np.argmax(np.abs(row))) for row in cosines(runs.loadings.to_numpy(), expected.loading_gk)]
    np.testing.assert_allclose(runs.loadings, expected.loading_gk[:, order], atol=1e-10)
    np.testing.assert_allclose(runs.spread, expected.spread_gk[:, order], atol=1e-10)
    np.testing.assert_allclose(runs.stats["reproducibility"], expected.cosine_mk.mean(axis=0)[order])
    np.testing.assert_allclose(runs.stats["lowest"], expected.cosine_mk.min(axis=0)[order])
    assert runs.stats["kl"].is_monotonic_decreasing
    kl = []
    for m, model in enumerate(runs.models):
        mean, variance = model.get_latent_representation(return_dist=True)
        matrix = model.rotation.matrix_kk
        mean, variance = mean @ matrix, variance @ matrix**2
        kl.append((0.5 * (mean**2 + variance - 1 - np.log(variance))).mean(axis=0)[expected.partner_mk[m, order]])
    np.testing.assert_allclose(runs.stats["kl"], np.mean(kl, axis=0), rtol=1e-5)
    agreement = runs.agreement.to_numpy()
    np.testing.assert_allclose(np.diag(agreement), 1)
    np.testing.assert_allclose(agreement, agreement.T)


def test_each_run_is_seen_through_varimax(runs):
    for model in runs.models:
        loading_gk = model.get_decoder().centered().weight_gk
        turned = loading_gk @ varimax(loading_gk)
        np.testing.assert_allclose(
            np.abs(cosines(turned, model.get_loadings(canonical=True).to_numpy())).max(axis=1), 1, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_export_is_read_back_also_from_a_file(runs, cells, tmp_path, kind):
    target = ad.AnnData(cells.X[:, 5:], obs=cells.obs[["batch"]].copy(), var=cells.var.iloc[5:])
    target = ad.concat(
        [target, ad.AnnData(np.ones((150, 2)), obs=target.obs, var=pd.DataFrame(index=["x", "y"]))], axis=1
    )
    runs.export_to_anndata(target)
    path = tmp_path / f"a.{kind}"
    target.write_h5ad(path) if kind == "h5ad" else target.write_zarr(path)
    back = ad.read_h5ad(path) if kind == "h5ad" else ad.read_zarr(path)
    pd.testing.assert_frame_equal(get.stability(back), runs.stats, check_dtype=False)
    np.testing.assert_allclose(get.consensus_loadings(back), runs.loadings.iloc[5:], atol=1e-6)
    np.testing.assert_allclose(get.consensus_loadings(back, spread=True), runs.spread.iloc[5:], atol=1e-6)
    assert back.uns["ldvae_consensus"]["resample"] == "none"
    np.testing.assert_array_equal(back.uns["ldvae_consensus"]["seeds"], [0, 1, 2])
    np.testing.assert_allclose(back.uns["ldvae_consensus"]["agreement"], runs.agreement)
    np.testing.assert_array_equal(back.uns["ldvae_consensus"]["cells_of_run"], [0, 1, 2])
    target.uns["taken"] = {"something": 1}
    target.varm["foo_spread"] = np.zeros((target.n_vars, 2))
    for key in ("taken", "foo"):
        before = set(target.varm)
        with pytest.raises(ValueError, match="would be replaced and is no consensus"):
            runs.export_to_anndata(target, key)
        assert set(target.varm) == before
    runs.export_to_anndata(target, "foo", overwrite=True)
    assert get.stability(target, key="foo").shape == (4, 5)
    with pytest.raises(ValueError, match="none of the 30 genes"):
        runs.export_to_anndata(ad.AnnData(np.ones((3, 4))))
    with pytest.raises(KeyError, match="fit_ensemble"):
        get.stability(cells)


def test_the_representative_is_the_best_run_on_the_axes_of_the_consensus(runs):
    rotations = [model.rotation_ for model in runs.models]
    model = runs.representative()
    best = int(np.argmax(runs.consensus.cosine_mk.mean(axis=1)))
    assert model.module is not runs.models[best].module
    np.testing.assert_array_equal(model.get_loadings(), runs.models[best].get_loadings())
    assert [run.rotation_ for run in runs.models] == rotations
    assert model.rotation.method == "consensus"
    own_gk, wanted_gk = model.get_decoder().centered().weight_gk, runs.loadings.to_numpy()
    target = ad.AnnData(
        runs.models[0].adata.X.copy(), obs=runs.models[0].adata.obs[["batch"]].copy(), var=runs.models[0].adata.var
    )
    model.export_to_anndata(target)
    match = tl.match_factors(target, runs)
    assert get.loadings(target).columns.tolist() == ["F_0", "F_1", "F_2", "F_3"]
    signed = np.diag(cosines(get.loadings(target).to_numpy(), wanted_gk))
    assert (signed > 0).all()
    np.testing.assert_allclose(tl.match_factors(model, runs).cosine, match.cosine, atol=1e-5)
    distance = np.linalg.norm(own_gk @ model.rotation.matrix_kk - wanted_gk)
    rng = np.random.default_rng(0)
    for _ in range(50):
        nearby = model.rotation.matrix_kk @ np.linalg.qr(np.eye(4) + 0.05 * rng.normal(size=(4, 4)))[0]
        assert np.linalg.norm(own_gk @ nearby - wanted_gk) > distance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_runs": 1}, "at least 2"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
        ({"seed": 1.5}, "`seed` must be an integer of at least 0"),
        ({"train_kwargs": {"train_size": 5}}, "`train_size` must be above 0"),
        ({"train_kwargs": {"train_size": 0}}, "`train_size` must be above 0"),
        ({"train_kwargs": {"max_epochs": 5}}, "arguments of `fit_ensemble` itself"),
        ({"n_runs": 2.5}, "n_runs"),
        ({"n_latent": 0}, "n_latent"),
        ({"resample": "thirds"}, "must be one of 'halves', 'bootstrap'"),
        ({"model_kwargs": {"latent_distribution": "ln"}}, "cannot be rotated"),
        ({"train_kwargs": {"datasplitter_kwargs": {}}}, "decides which cells"),
        ({"train_kwargs": {"train_size": 0.5}, "resample": "halves"}, "decides which cells"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(cells, monkeypatch, arguments, message):
    monkeypatch.setattr(LDVAE, "train", lambda *_args, **_kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        fit_ensemble(cells, **{"n_runs": 2, "n_latent": 3, "silent": True, **arguments})


def test_an_unknown_option_raises_rather_than_fail_run_by_run(cells):
    with pytest.raises(TypeError, match="no argument 'n_hiden'"):
        fit_ensemble(cells, 2, n_latent=3, model_kwargs={"n_hiden": 8}, **QUICK)
    with pytest.raises(TypeError, match="batch_sise"):
        fit_ensemble(cells, 2, max_epochs=1, train_kwargs={"batch_sise": 8}, silent=True)
    with pytest.raises(TypeError, match="must be an AnnData"):
        fit_ensemble("cells")


def test_the_seed_is_that_of_scvi_settings(cells):
    scvi.settings.seed = 1
    from_settings = fit_ensemble(cells, 2, n_latent=4, **QUICK)
    assert from_settings.seeds == [1, 2]
    given = fit_ensemble(cells, 2, n_latent=4, seed=1, **QUICK)
    np.testing.assert_array_equal(from_settings.models[0].get_loadings(), given.models[0].get_loadings())


def test_suggestion_counts_stable_factors_and_says_where_the_scree_differs(runs, monkeypatch):
    increments = iter(
        [
            dict(zip("abcd", row, strict=True))
            for row in ([0.7, 0.2, 0.06, 0.04], [0.8, 0.1, 0.06, 0.04], [0.9, 0.08, 0.02, 0])
        ]
    )
    monkeypatch.setattr(n_latent, "_increments", lambda _model: next(increments))
    suggestion = suggest_n_latent(ensemble=runs)
    assert suggestion.n_scree == 3
    assert suggestion.n_factors == runs.n_stable == (runs.stats["reproducibility"] >= 0.8).sum()
    assert suggestion.agree == (runs.n_stable == 3)
    assert ("the two differ" in suggestion.message) != suggestion.agree
    assert "share their cells" in suggestion.message
    both = {"adata": runs.models[0].adata, "ensemble": runs}
    for arguments in (
        {},
        both,
        {"ensemble": runs, "seed": 1},
        {"ensemble": runs, "n_latent": 3},
        {"ensemble": runs, "n_runs": 3},
    ):
        with pytest.raises(ValueError, match="either `adata`"):
            suggest_n_latent(**arguments)
    with pytest.raises(TypeError, match="`ensemble` must be a result of `fit_ensemble`; got list"):
        suggest_n_latent(ensemble=runs.models)
    with pytest.raises(ValueError, match="between 0 and 1"):
        suggest_n_latent(ensemble=runs, min_increment=5)


@pytest.mark.parametrize(
    ("n_stable", "n_scree", "words"),
    [(2, 2, "as many"), (1, 3, "mixtures"), (3, 1, "few cells"), (4, 4, "more latents")],
)
def test_the_message_is_in_keeping_with_the_counts(n_stable, n_scree, words):
    runs = SimpleNamespace(resample="bootstrap", replication=None)
    message = n_latent.NLatentSuggestion(n_stable, n_scree, 4, pd.DataFrame(), runs, 0.3).message
    assert words in message
    assert f"{n_stable} of 4 factors are stable" in message
    assert "more than 30%" in message
    assert "share their cells" not in message


def test_increments_are_those_of_the_deviance_rotation_and_leave_the_view_alone(runs):
    model = runs.models[0]
    before = model.rotation_
    increments = n_latent._increments(model)
    assert model.rotation_ is before
    assert list(increments) == ["F_0", "F_1", "F_2", "F_3"]
    model.rotate("deviance")
    table = model.get_explained_deviance(latents=model.factor_names)
    model.rotation_ = before
    whole = table["cumulative"].iloc[-1] - table["without_latents"].iloc[0]
    first = (table["cumulative"].iloc[0] - table["without_latents"].iloc[0]) / whole
    np.testing.assert_allclose(increments["F_0"], first)
    np.testing.assert_allclose(sum(increments.values()), 1)
