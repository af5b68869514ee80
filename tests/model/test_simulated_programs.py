"""Programs that are known: rotation finds them, runs agree on them, and nothing else is called stable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldvae_ext import datasets, tl
from ldvae_ext.core.matching import cosines, match_columns
from ldvae_ext.model import LDVAE, Ensemble, fit_ensemble, suggest_n_latent

pytestmark = pytest.mark.slow

TRAINING = {"plan_kwargs": {"lr": 5e-3}, "check_val_every_n_epoch": None, "accelerator": "cpu"}


def cosine_with(truth_gk: np.ndarray, loading_gk: np.ndarray) -> np.ndarray:
    """Of each true program with its partner."""
    return match_columns(cosines(truth_gk, loading_gk)).cosine


@pytest.fixture(scope="module")
def five_programs() -> tuple[np.ndarray, Any, Ensemble]:
    adata, decoder = datasets.simulate(n_cells=2500, n_genes=300, n_latent=5, seed=0)
    LDVAE.setup_anndata(adata)
    ensemble = fit_ensemble(adata, 5, n_latent=8, max_epochs=150, train_kwargs=TRAINING, silent=True)
    return decoder.centered().weight_gk, adata, ensemble


def test_varimax_finds_sparse_programs_in_every_run_where_the_latents_do_not(five_programs):
    truth_gk, _, ensemble = five_programs
    raw = [cosine_with(truth_gk, model.get_decoder().centered().weight_gk) for model in ensemble.models]
    rotated = [cosine_with(truth_gk, model.get_loadings(canonical=True).to_numpy()) for model in ensemble.models]
    assert np.median(raw) < 0.9
    assert np.min(rotated) >= 0.95
    assert np.min(cosine_with(truth_gk, ensemble.loadings.to_numpy())) >= 0.95


def test_factors_beyond_the_programs_are_flagged_and_no_program_is(five_programs):
    truth_gk, _, ensemble = five_programs
    of_programs = match_columns(cosines(truth_gk, ensemble.loadings.to_numpy())).second
    is_surplus = ~np.isin(np.arange(8), of_programs)
    is_flagged = (ensemble.stats["flag"] == "unstable").to_numpy()
    # Of three surplus factors and five programs, a precision and recall of 0.9 allow no error.
    np.testing.assert_array_equal(is_flagged, is_surplus)
    assert (ensemble.stats["flag"][~is_surplus] == "stable").all()
    assert ensemble.stats["reproducibility"][~is_surplus].min() >= 0.9


def test_the_representative_run_holds_the_consensus(five_programs):
    truth_gk, adata, ensemble = five_programs
    model = ensemble.representative()
    match = tl.match_factors(model, ensemble)
    of_programs = match_columns(cosines(truth_gk, ensemble.loadings.to_numpy())).second
    assert match.pairs.set_index("second")["cosine"].abs()[[f"C_{k}" for k in of_programs]].min() > 0.97
    true = adata.obsm["z_true"]
    scores = model.get_latent_representation() @ model.rotation.matrix_kk
    correlation = np.abs(np.corrcoef(true.T, scores[:, of_programs].T)[:5, 5:])
    assert np.diag(correlation).min() > 0.8


@pytest.mark.parametrize("n_programs", [3, 8])
def test_the_number_of_programs_is_the_number_of_stable_factors(n_programs):
    adata, _ = datasets.simulate(n_cells=1000, n_genes=300, n_latent=n_programs, seed=n_programs)
    LDVAE.setup_anndata(adata)
    suggestion = suggest_n_latent(
        adata, n_latent=12, n_runs=3, resample=None, max_epochs=100, train_kwargs=TRAINING, silent=True
    )
    assert suggestion.n_factors == n_programs
    assert abs(suggestion.n_scree - n_programs) <= 1
    assert f"{n_programs} of 12 factors are stable" in suggestion.message


def test_the_number_of_programs_is_the_number_of_factors_that_replicate():
    n_programs = 5
    adata, _ = datasets.simulate(n_cells=1000, n_genes=300, n_latent=n_programs, seed=n_programs)
    LDVAE.setup_anndata(adata)
    suggestion = suggest_n_latent(adata, n_latent=12, max_epochs=100, train_kwargs=TRAINING, silent=True)
    assert suggestion.ensemble.resample == "halves"
    assert len(suggestion.ensemble.models) == 6
    assert suggestion.n_factors == n_programs
    assert f"{n_programs} of 12 factors replicate" in suggestion.message


def test_disjoint_halves_of_the_cells_agree_on_strong_programs_as_well():
    adata, decoder = datasets.simulate(n_cells=1500, n_genes=200, n_latent=3, seed=1)
    LDVAE.setup_anndata(adata)
    ensemble = fit_ensemble(adata, 4, n_latent=5, resample="halves", max_epochs=100, train_kwargs=TRAINING, silent=True)
    truth_gk = decoder.centered().weight_gk
    of_programs = match_columns(cosines(truth_gk, ensemble.loadings.to_numpy())).second
    assert ensemble.consensus.reproducibility_k[of_programs].min() > 0.8
    assert np.delete(ensemble.consensus.reproducibility_k, of_programs).max() < 0.8
