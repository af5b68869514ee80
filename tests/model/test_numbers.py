"""Numeric arguments: each impossible value is named before any work is done."""

from __future__ import annotations

import numpy as np
import pytest

from ldvae_ext import datasets, get, tl
from ldvae_ext.model import LDVAE, fit_ensemble
from tests.helpers import TRAIN, counts, untrained

IMPOSSIBLE = [-1, 0, 1.5, float("nan"), float("inf"), "x", True, 10**30]
COUNTS = {
    "max_epochs": lambda m, v: fresh().train(v, **TRAIN),
    "batch_size": lambda m, v: fresh().train(1, batch_size=v, **TRAIN),
    "kl_warmup": lambda m, v: fresh().train(1, kl_warmup=v, **TRAIN),
    "n_latent": lambda m, v: LDVAE(m.adata, n_latent=v),
    "n_hidden": lambda m, v: LDVAE(m.adata, n_hidden=v),
    "n_layers": lambda m, v: LDVAE(m.adata, n_layers=v),
    "batch_size of ablate": lambda m, v: m.ablate(batch_size=v),
    "batch_size of get_latent_kl": lambda m, v: m.get_latent_kl(batch_size=v),
    "batch_size of get_latent_representation": lambda m, v: m.get_latent_representation(batch_size=v),
    "n_samples": lambda m, v: m.get_normalized_expression(n_samples=v),
    "n_samples of ablate": lambda m, v: m.ablate(use_posterior="samples", n_samples=v),
    "n_mc_samples": lambda m, v: m.get_marginal_ll(n_mc_samples=v),
    "n_samples of posterior_predictive_sample": lambda m, v: m.posterior_predictive_sample(n_samples=v),
    "n of get.top_genes": lambda m, v: get.top_genes(m.adata, n=v),
    "chunk_size": lambda m, v: tl.ablate(m.adata, chunk_size=v),
    "n_runs": lambda m, v: fit_ensemble(m.adata, v),
    "n_cells": lambda m, v: datasets.simulate(v),
    "n_genes": lambda m, v: datasets.simulate(20, v),
    "n_batches": lambda m, v: datasets.simulate(20, 20, n_batches=v),
}
NUMBERS = {
    "library_size": lambda m, v: m.get_normalized_expression(library_size=v),
    "library_size of decode": lambda m, v: m.decode(np.zeros((1, 4)), batch=0, library_size=v),
    "library_size at the mean": lambda m, v: m.get_normalized_expression(library_size=v, use_posterior_mean=True),
    "theta": lambda m, v: datasets.simulate(20, 20, theta=v),
    "dropout": lambda m, v: datasets.simulate(20, 20, dropout=v),
    "median_library": lambda m, v: datasets.simulate(20, 20, median_library=v),
    "dropout_rate": lambda m, v: LDVAE(m.adata, dropout_rate=v),
    "value": lambda m, v: m.ablate(mode="value", value=v),
}
# As in LinearSCVI.
ZERO_IS_ALLOWED = {"max_epochs"}


def fresh():
    LDVAE.setup_anndata(adata := counts())
    return LDVAE(adata, n_latent=2)


@pytest.fixture(scope="module")
def model():
    model = untrained(counts())
    model.export_to_anndata()
    return model


@pytest.mark.parametrize(
    ("argument", "value"),
    [(name, value) for name in COUNTS for value in IMPOSSIBLE if value != 0 or name not in ZERO_IS_ALLOWED],
)
def test_a_number_of_things_is_a_positive_integer(model, argument, value):
    with pytest.raises(ValueError, match=f"`{argument.split()[0]}` must be .*got {value!r}"):
        COUNTS[argument](model, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x"], ids=str)
@pytest.mark.parametrize("argument", NUMBERS)
def test_a_number_is_finite(model, argument, value):
    with pytest.raises(ValueError, match=f"`{argument.split()[0]}` must .*got {value!r}"):
        NUMBERS[argument](model, value)


@pytest.mark.parametrize("seed", [-1, 1.5, float("nan"), "x", True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match=f"`seed` must be an integer of at least 0; got {seed!r}"):
        datasets.simulate(20, 20, seed=seed)
