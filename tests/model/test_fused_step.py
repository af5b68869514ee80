"""All kinds of training take the fused step, with the losses of the layers one by one."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

from ldvae_ext.backends.fused_step import FusedStep
from ldvae_ext.model import LDVAE
from tests.helpers import TRAIN, counts

pytestmark = [
    pytest.mark.filterwarnings("ignore:Training ended with a KL weight"),
    pytest.mark.filterwarnings("ignore:The rotation that was in force"),
]
KWARGS = {**TRAIN, "batch_size": 32}


@pytest.fixture
def n_fused(monkeypatch):
    """Number of minibatches for which the fused step gave the loss."""
    calls = []
    loss = FusedStep.loss

    def counting(self, *args, **kwargs):
        calls.append(1)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(FusedStep, "loss", counting)
    return calls


def cells():
    adata = counts(150, 30)
    rng = np.random.default_rng(0)
    adata.obs["depth"] = rng.normal(size=150)
    adata.obs["donor"] = rng.choice(["a", "b", "c"], 150)
    return adata


def model_of(adata, *, setup=None, **options):
    LDVAE.setup_anndata(adata, batch_key="batch", **(setup or {}))
    scvi.settings.seed = 0
    return LDVAE(adata, n_latent=4, **options)


COVARIATES = {"continuous_covariate_keys": ["depth"], "categorical_covariate_keys": ["donor"]}


def again(backend):
    model = model_of(cells())
    model.train(1, **KWARGS, backend=backend)
    model.train(3, **KWARGS, backend=backend)
    return model


def in_evaluation_mode(backend):
    model = model_of(cells())
    model.train(2, **KWARGS, backend=backend)
    model.train(3, **KWARGS, backend=backend, evaluation_mode=True)
    return model


def without_norm(backend):
    model = model_of(cells(), use_batch_norm="encoder", bias="auto")
    model.train(3, **KWARGS, backend=backend)
    return model


def without_dropout(backend):
    model = model_of(cells(), dropout_rate=0.0)
    model.train(3, **KWARGS, backend=backend)
    return model


def encoded(backend):
    model = model_of(cells(), setup=COVARIATES, encode_covariates=True)
    model.train(3, **KWARGS, backend=backend)
    return model


def ordered(backend):
    model = model_of(cells(), use_batch_norm="encoder", bias="auto")
    # Both from the same network, so that the random truncations are the only difference.
    model.train(2, **KWARGS, backend="torch")
    scvi.settings.seed = 1
    model.order_factors(3, **KWARGS, backend=backend)
    return model


def query(backend, **options):
    adata = cells()
    reference = model_of(adata[:90].copy(), setup=COVARIATES, **options)
    reference.train(2, **KWARGS, backend="torch")
    new = adata[90:].copy()
    new.obs["batch"] = "new"
    mapped = LDVAE.load_query_data(new, reference)
    scvi.settings.seed = 1
    mapped.train(3, **KWARGS, backend=backend)
    return mapped


def encoded_query(backend):
    return query(backend, encode_covariates=True)


@pytest.mark.parametrize(
    "train",
    [again, in_evaluation_mode, without_norm, without_dropout, encoded, ordered, query, encoded_query],
    ids=lambda train: train.__name__,
)
def test_the_fused_step_trains_as_the_layers_do(n_fused, train):
    layers = train("torch")
    assert not n_fused
    fused = train("numba")
    assert len(n_fused) >= fused.trainer.global_step > 0
    for key, values in layers.history.items():
        ours, theirs = (each.astype(float).to_numpy() for each in (fused.history[key], values))
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-4, err_msg=key)
    for name, value in layers.module.state_dict().items():
        torch.testing.assert_close(fused.module.state_dict()[name], value, rtol=0.02, atol=2e-3, msg=name)


def test_frozen_entries_of_a_query_stay_to_the_bit():
    adata = cells()
    reference = model_of(adata[:90].copy(), encode_covariates=True)
    reference.train(2, **KWARGS)
    new = adata[90:].copy()
    new.obs["batch"] = "new"
    mapped = LDVAE.load_query_data(new, reference)
    before = {name: value.clone() for name, value in mapped.module.state_dict().items()}
    mapped.train(3, **KWARGS, plan_kwargs={"weight_decay": 0.1})
    n_moved = 0
    for name, mask in mapped.module.learnable.items():
        after = mapped.module.state_dict()[name]
        assert torch.equal(after[~mask], before[name][~mask]), name
        n_moved += int((after[mask] != before[name][mask]).sum())
    assert n_moved > 0
