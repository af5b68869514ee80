"""Trainings that diverge stop at once, with an error that says what to try."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

from ldvae_ext.model import LDVAE, fit_ensemble
from tests.helpers import TRAIN, counts

BACKENDS = ["numba", "torch", "scvi"]


def fresh(adata=None, **kwargs):
    adata = counts(64, 12) if adata is None else adata
    LDVAE.setup_anndata(adata, **kwargs)
    scvi.settings.seed = 0
    return LDVAE(adata, n_latent=2)


def train(model, max_epochs=3, *, lr=1e-3, **kwargs):
    options = {"train_size": 1.0, "batch_size": 16, "kl_warmup": 1, **TRAIN, **kwargs}
    model.train(max_epochs, plan_kwargs={"lr": lr, **options.pop("plan_kwargs", {})}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_with_an_absurd_learning_rate_stops_with_what_to_try(backend):
    model = fresh()
    with pytest.raises(FloatingPointError, match=r"diverged at step [23], in epoch 1: .* was 1e\+30") as raised:
        train(model, lr=1e30, backend=backend)
    for advice in (
        "a smaller learning rate",
        "gradient clipping (`gradient_clip_val=1`)",
        "make a new one",
        "counts",
        "covariates",
    ):
        assert advice in str(raised.value)
    # torch's own error lists the latents of all cells.
    assert raised.value.__suppress_context__
    assert not model.is_trained_


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_no_number_stops_the_training_at_its_step(backend):
    model = fresh()
    steps = []

    def spoil(*_):
        steps.append(None)
        if len(steps) == 5:
            with torch.no_grad():
                model.module.px_r[0] = torch.nan

    class Spoiler(scvi.train._callbacks.Callback):
        on_train_batch_end = spoil

    with pytest.raises(FloatingPointError, match=r"diverged at step 6, in epoch 2: the loss is nan"):
        train(model, backend=backend, callbacks=[Spoiler()])
    assert len(steps) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_last_step_that_spoils_the_weights_raises(backend):
    model = fresh()
    # One step: the loss before it is finite, and no other follows.
    with pytest.raises(FloatingPointError, match=r"weights of the network are NaN or infinite"):
        train(model, 1, lr=1e300, batch_size=64, backend=backend)
    assert not model.is_trained_


def test_metrics_of_each_step_do_not_hide_a_divergence():
    with pytest.raises(FloatingPointError, match="The training diverged"):
        train(fresh(), lr=1e30, plan_kwargs={"on_step": True, "on_epoch": True})


def test_a_divergence_shows_in_validation_too():
    with pytest.raises(FloatingPointError, match="The training diverged"):
        train(fresh(), 2, lr=1e300, train_size=0.5, batch_size=32, check_val_every_n_epoch=1)


def test_a_penalty_that_is_no_number_stops_the_training():
    model = fresh()
    with pytest.raises(FloatingPointError, match="the loss is inf"):
        train(model, decoder_penalty=1e39)


def test_other_errors_of_a_step_are_left_as_they_are():
    model = fresh()

    def fail(*_, **__):
        msg = "something else"
        raise ValueError(msg)

    model.module.loss = fail
    with pytest.raises(ValueError, match="something else"):
        train(model, backend="scvi")


@pytest.mark.filterwarnings("ignore:The run with seed . failed and is left out:UserWarning")
def test_runs_of_an_ensemble_that_diverge_are_reported_with_the_reason():
    adata = counts(64, 12)
    LDVAE.setup_anndata(adata)
    training = {"plan_kwargs": {"lr": 1e30}, **TRAIN}
    with pytest.raises(RuntimeError, match="The training diverged at step"):
        fit_ensemble(adata, 2, max_epochs=2, n_latent=2, train_kwargs=training, silent=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_check_changes_no_training(backend):
    losses = {}
    for checked in (True, False):
        model = fresh()
        with pytest.MonkeyPatch.context() as patch:
            if not checked:
                patch.setattr("ldvae_ext.backends.plan.check_step", lambda plan, loss: None)
            train(model, backend=backend)
        losses[checked] = model.history["elbo_train"].to_numpy()
    np.testing.assert_array_equal(losses[True], losses[False])
