"""The backends of a training step compute what scvi-tools computes: losses, gradients, statistics and random draws."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

from ldvae_ext.backends.choose import choose_backend
from ldvae_ext.backends.fused_step import FusedStep
from tests.helpers import TRAIN
from tests.module.backends import (
    CASES,
    NOT_COMPILED,
    assert_as_exact,
    assert_same_in_double,
    build,
    error,
    in_type,
    minibatch,
    one_normal_draw,
    prepared,
    routes_of,
    step,
    without_effect,
)

IN_ONE = ("nb", "zinb", "poisson", "zinb, 4 batches", "gene-batch", "gene-label", "covariates", "30 latents")


@pytest.fixture(autouse=True)
def _one_normal_draw(monkeypatch):
    one_normal_draw(monkeypatch)


@pytest.mark.parametrize("case", [*CASES, *NOT_COMPILED])
def test_torch_is_scvi_tools_in_float64(case):
    model = build(case)
    assert_same_in_double(model.module, minibatch(model))


@pytest.mark.parametrize("case", CASES)
def test_numba_is_as_exact_as_scvi_tools_in_float32(case):
    model = build(case)
    assert_as_exact(model.module, minibatch(model), routes=routes_of(model.module))


@pytest.mark.parametrize("case", [*CASES, *NOT_COMPILED])
def test_torch_is_as_exact_as_scvi_tools_in_float32(case):
    model = build(case)
    assert_as_exact(model.module, minibatch(model), backend="torch", routes=(False,))


@pytest.mark.parametrize("case", IN_ONE)
def test_the_usual_network_is_computed_in_one_step(case):
    assert routes_of(build(case).module) == (False, True)


@pytest.mark.parametrize("case", ["nb", "zinb, gene-batch", "poisson, covariates", "ln", "two layers", "embedding"])
def test_validation_too(case):
    model = build(case)
    tensors = minibatch(model)
    assert_same_in_double(model.module, tensors, training=False)
    assert_as_exact(model.module, tensors, routes=(False,), training=False)


@pytest.mark.grid(0)
@pytest.mark.parametrize("case", ["nb", "zinb, 4 batches", "poisson", "gene-batch", "30 latents", "ln"])
def test_a_trained_network_too(case):
    model = build(case, n_cells=200)
    model.is_trained_ = False
    model.module.train()
    model.train(15, **TRAIN, batch_size=32, plan_kwargs={"lr": 0.01}, kl_warmup=1, backend="scvi")
    tensors = minibatch(model, 128)
    assert_same_in_double(model.module, tensors)
    # Of a fitted library little is left but rounding: the means of a cell add up to its counts.
    assert_as_exact(model.module, tensors, routes=routes_of(model.module), tiny=1e-5)


@pytest.mark.parametrize("case", ["nb", "zinb, gene-batch", "gene-label"])
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_dispersions_get_their_gradients(case, layer_by_layer):
    model = build(case)
    tensors = minibatch(model)
    truth = step(model.module, tensors, "scvi", torch.float64, is_sparse=False).gradients["px_r"]
    found = step(model.module, tensors, "numba", layer_by_layer=layer_by_layer).gradients["px_r"]
    assert found.shape == truth.shape
    assert np.abs(truth).min() > 0
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-6 * np.abs(truth).max())


@pytest.mark.parametrize("case", ["nb", "zinb, gene-batch", "poisson", "covariates", "two layers", "no batch norm"])
def test_cells_may_weigh_differently_and_the_graph_may_be_kept(case):
    model = build(case)
    tensors = minibatch(model)
    weight_n = torch.linspace(-1, 2, len(tensors["X"]), dtype=torch.float64) ** 2 / 60
    options = {"weight_n": weight_n, "n_backward": 2}
    assert_same_in_double(model.module, tensors, **options)
    assert_as_exact(model.module, tensors, routes=routes_of(model.module), **options)


@pytest.mark.parametrize("case", ["nb", "zinb, gene-batch"])
def test_equal_weights_and_a_graph_that_is_kept(case):
    model = build(case)
    tensors = minibatch(model)
    assert_as_exact(model.module, tensors, routes=routes_of(model.module), n_backward=3)


@pytest.mark.parametrize("case", ["nb", "zinb", "poisson", "covariates"])
def test_nested_dropout(case):
    model = build(case)
    tensors = minibatch(model)
    with model.module.truncating():
        assert_same_in_double(model.module, tensors)
        assert_as_exact(model.module, tensors, routes=(False,))
    whole = step(model.module, tensors, "numba")
    with model.module.truncating():
        assert step(model.module, tensors, "numba").loss != whole.loss


@pytest.mark.parametrize("frozen", ["decoder", "z_encoder", "l_encoder"])
def test_frozen_batch_norms_keep_their_statistics(frozen):
    model = build("zinb, 4 batches")
    tensors = minibatch(model)

    class Kept(torch.nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(mode=False)

    for layer in getattr(model.module, frozen).modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.__class__ = Kept
    assert_same_in_double(model.module, tensors)
    assert_as_exact(model.module, tensors, routes=(False,))


def test_parameters_that_do_not_learn_get_no_gradient():
    model = build("zinb, 4 batches")
    model.module.z_encoder.requires_grad_(requires_grad=False)
    model.module.px_r.requires_grad_(requires_grad=False)
    tensors = minibatch(model)
    assert_same_in_double(model.module, tensors)
    assert_as_exact(model.module, tensors, routes=(False, True))
    for backend in ("numba", "torch"):
        gradients = step(model.module, tensors, backend).gradients
        assert not any(value.any() for name, value in gradients.items() if name.startswith(("z_encoder", "px_r")))


def test_gradients_have_the_layout_of_their_parameters():
    model = build("zinb, 4 batches")
    tensors = minibatch(model)
    model.module.train()
    optimizer = torch.optim.Adam(model.module.parameters())
    for backend in ("numba", "torch"):
        choose_backend(model.module, backend).loss(model.module, tensors, 1.0).loss.backward()
        optimizer.step()
        for name, value in model.module.named_parameters():
            assert value.is_contiguous(), name
            assert value.grad is None or value.grad.shape == value.shape


@pytest.mark.parametrize("case", ["nb", "zinb", "poisson", "30 latents"])
def test_two_threads(case, monkeypatch):
    monkeypatch.setattr("ldvae_ext.backends.decoder_head._PER_THREAD", 1)
    model = build(case, n_cells=61)
    tensors = minibatch(model)
    alone = step(model.module, tensors, "numba")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = step(model.module, tensors, "numba")
        weighted = {"weight_n": torch.linspace(0, 1, 61)}
        assert_as_exact(model.module, tensors, routes=(False, True), **weighted)
    finally:
        torch.set_num_threads(before)
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    for name in alone.gradients.keys() - without_effect(model.module):
        value = alone.gradients[name]
        assert error(together.gradients[name], value) < 3e-6, name


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_terms_of_the_loss_are_those_of_scvi_tools(backend):
    model = build("zinb, 4 batches")
    tensors = minibatch(model)
    losses = {}
    for name in ("scvi", backend):
        scvi.settings.seed = 3
        with torch.no_grad():
            losses[name] = choose_backend(model.module.train(), name).loss(model.module, tensors, 1.0)
    theirs, ours = losses["scvi"], losses[backend]
    assert ours.n_obs_minibatch == theirs.n_obs_minibatch
    assert ours.kl_local.keys() == theirs.kl_local.keys()
    for name, value in theirs.kl_local.items():
        np.testing.assert_allclose(ours.kl_local[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        ours.reconstruction_loss["reconstruction_loss"], theirs.reconstruction_loss["reconstruction_loss"], rtol=1e-4
    )


@pytest.mark.parametrize("case", ["nb", "covariates"])
def test_the_loss_and_one_of_its_terms_may_be_taken_together(case):
    model = build(case)
    assert FusedStep.fits(model.module)
    tensors, found = minibatch(model), []
    for backend in ("scvi", "numba"):
        module = in_type(model.module, torch.float32).train()
        scvi.settings.seed = 3
        prepared_tensors = prepared(tensors, torch.float32, is_sparse=backend == "numba")
        losses = choose_backend(module, backend).loss(module, prepared_tensors, 0.7)
        (2 * losses.loss + 0.01 * losses.kl_local["kl_divergence_z"].sum()).backward()
        found.append({name: value.grad for name, value in module.named_parameters() if value.grad is not None})
    largest = max(float(value.abs().max()) for value in found[0].values())
    for name, value in found[1].items():
        torch.testing.assert_close(value, found[0][name], rtol=1e-3, atol=1e-5 * largest, msg=name)
