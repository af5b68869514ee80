"""Backends at the edges: counts, dispersions, means, sizes and numbers that are not numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldvae_ext.backends.counts import Counts
from ldvae_ext.backends.elementwise import log1p, softplus
from tests.module.backends import (
    assert_as_exact,
    assert_same_in_double,
    build,
    minibatch,
    one_normal_draw,
    prepared,
    routes_of,
    step,
)

LIKELIHOODS = ("nb", "zinb", "poisson")


@pytest.fixture(autouse=True)
def _one_normal_draw(monkeypatch):
    one_normal_draw(monkeypatch)


def assert_right(model, tensors):
    assert_same_in_double(model.module, tensors)
    assert_as_exact(model.module, tensors, backend="torch", routes=(False,), floor=1e-6)
    assert_as_exact(model.module, tensors, routes=routes_of(model.module), floor=1e-6)


@pytest.mark.parametrize("case", [*LIKELIHOODS, "zinb, gene-batch"])
@pytest.mark.parametrize("largest", [8, 9, 5000, 200_000])
def test_large_counts(case, largest):
    model = build(case)
    tensors = minibatch(model)
    tensors["X"][::7, 3] = largest
    tensors["X"][1, :] = largest
    assert_right(model, tensors)


@pytest.mark.filterwarnings("ignore:The value argument must be within the support")
@pytest.mark.parametrize("case", ["nb", "zinb", "no logarithm"])
def test_counts_that_are_not_whole(case):
    model = build(case)
    tensors = minibatch(model)
    tensors["X"] = tensors["X"] * 0.7 + (tensors["X"] > 3) * 0.01
    assert_right(model, tensors)


@pytest.mark.parametrize("backend", ["scvi", "torch", "numba"])
def test_counts_that_are_not_whole_are_called_by_name(backend):
    for case in ("poisson", "zinb"):
        model = build(case)
        tensors = minibatch(model)
        tensors["X"][3, 2] = 0.5
        with (
            pytest.warns(UserWarning, match="within the support")
            if case == "zinb"
            else pytest.raises(ValueError, match="within the support")
        ):
            step(model.module, tensors, backend)


@pytest.mark.parametrize("case", ["nb", "zinb"])
@pytest.mark.parametrize("log_theta", [-13.8, 0.0, 11.5, 18.4])
def test_dispersions_of_any_size(case, log_theta):
    model = build(case)
    tensors = minibatch(model)
    tensors["X"][::7, 3] = 300
    with torch.no_grad():
        model.module.px_r[::2] = log_theta
    # In float64 scvi-tools itself is no better than this at 1e8: differences of gamma functions of large numbers.
    if log_theta < 11:
        assert_same_in_double(model.module, tensors)
    assert_as_exact(model.module, tensors, backend="torch", routes=(False,), floor=1e-6)
    assert_as_exact(model.module, tensors, routes=(False, True), floor=1e-6)


@pytest.mark.parametrize("case", ["intercept, no batch norm", "no batch norm at all", "4 batches"])
def test_means_of_almost_nothing(case):
    model = build(case)
    tensors = minibatch(model)
    layer, norm = model.module.decoder.factor_regressor.fc_layers[0][:2]
    with torch.no_grad():
        (layer if norm is None else norm).bias[::3] -= 60
    assert (tensors["X"][:, ::3] > 0).any()
    assert_right(model, tensors)


@pytest.mark.parametrize("case", [*LIKELIHOODS, "zinb, gene-batch"])
def test_a_cell_without_counts(case):
    model = build(case)
    tensors = minibatch(model)
    tensors["X"][5] = 0
    tensors["X"][59] = 0
    assert_right(model, tensors)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_cell_without_counts_and_its_observed_library(likelihood, backend):
    model = build("observed library")
    model.module.gene_likelihood = likelihood
    model.module.decoder.has_dropout = likelihood == "zinb"
    tensors = minibatch(model)
    tensors["X"][5] = 0
    theirs = step(model.module, tensors, "scvi", is_sparse=False)
    ours = step(model.module, tensors, backend)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert all(np.isfinite(value).all() for value in ours.gradients.values())


@pytest.mark.grid
@pytest.mark.parametrize("case", [*LIKELIHOODS, "covariates", "ln", "30 latents"])
@pytest.mark.parametrize("n_cells", [2, 3, 5])
def test_small_minibatches(case, n_cells):
    model = build(case)
    tensors = minibatch(model, n_cells)
    assert_as_exact(model.module, tensors, backend="torch", routes=(False,), floor=1e-6)
    assert_as_exact(model.module, tensors, routes=routes_of(model.module), floor=1e-6)


@pytest.mark.parametrize("case", [*LIKELIHOODS, "covariates", "no batch norm at all"])
def test_a_minibatch_of_one_cell(case):
    model = build(case)
    tensors = minibatch(model, 1)
    assert_same_in_double(model.module, tensors)
    assert_as_exact(model.module, tensors, routes=(False,), floor=1e-6)


@pytest.mark.parametrize("case", [*LIKELIHOODS, "zinb, gene-batch"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_zeros_that_are_stored(case, backend):
    model = build(case)
    tensors = prepared(minibatch(model), torch.float32, is_sparse=True)
    dense = tensors["X"].to_dense()
    padded = torch.where(dense == 0, 7.0, dense).to_sparse_csr()
    values = torch.where(padded.values() == 7, 0.0, padded.values())
    values = torch.where((dense == 7).reshape(-1), 7.0, values)
    stored = torch.sparse_csr_tensor(
        padded.crow_indices(), padded.col_indices(), values, dense.shape, check_invariants=True
    )
    assert len(stored.values()) > len(tensors["X"].values())
    expected = step(model.module, tensors, backend, is_sparse=False)
    found = step(model.module, {**tensors, "X": stored}, backend, is_sparse=False)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, value in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("backend", ["scvi", "torch", "numba"])
@pytest.mark.parametrize("case", ["nb", "ln", "two layers", "observed library"])
def test_an_encoder_that_is_not_finite_raises_what_scvi_tools_raises(backend, case):
    model = build(case)
    with torch.no_grad():
        model.module.z_encoder.mean_encoder.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Expected parameter loc .* of distribution Normal"):
        step(model.module, minibatch(model), backend)


@pytest.mark.grid
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    "case", ["nb", "zinb", "zinb, gene-batch", "poisson, observed library", "no batch norm at all"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["factor_regressor", "px_dropout_decoder", "px_r"])
def test_a_logit_that_is_not_finite_is_not_hidden(backend, case, value, part):
    model = build(case)
    module = model.module
    with torch.no_grad():
        if part == "px_r":
            if module.gene_likelihood == "poisson":
                return
            module.px_r.reshape(-1)[1] = torch.nan
        else:
            if part == "px_dropout_decoder" and module.gene_likelihood != "zinb":
                return
            getattr(module.decoder, part).fc_layers[0][0].weight[1, 1] = value
    assert np.isnan(step(module, minibatch(model), backend).loss)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_counts_that_are_not_finite_are_not_hidden(backend):
    for case in ("no logarithm", "observed library"):
        model = build(case)
        tensors = minibatch(model)
        tensors["X"][2, 3] = torch.nan
        with pytest.raises(ValueError, match="distribution Normal"):
            step(model.module, tensors, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithms_of_tensors_are_those_of_torch(dtype):
    small = torch.logspace(-30, 4, 400, dtype=dtype)
    x = torch.cat([small, -small, torch.tensor([0.0, 19.9, 20.1, 88.0, 1e4, torch.inf, -torch.inf], dtype=dtype)])
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(log1p(small), torch.log1p(small), rtol=rtol, atol=0)
    torch.testing.assert_close(softplus(x), torch.nn.functional.softplus(x), rtol=rtol, atol=0)


def test_counts_below_what_a_logarithm_takes_are_left_to_others_to_find():
    found = log1p(torch.tensor([-1.0, -2.0, torch.nan]))
    np.testing.assert_array_equal(found, [-np.inf, np.nan, np.nan])


def test_what_numpy_does_not_know_is_left_to_torch():
    x_ng = torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=torch.bfloat16)
    counts = Counts.of(x_ng)
    assert counts.values.tolist() == [3.0, 1.0]
    torch.testing.assert_close(log1p(counts.values), torch.log1p(counts.values))
    torch.testing.assert_close(softplus(x_ng), torch.nn.functional.softplus(x_ng))
