"""One step of a network by each backend, for the tests of backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import pytest
import scvi
import torch
from scvi import REGISTRY_KEYS

from ldvae_ext.backends.choose import choose_backend
from ldvae_ext.backends.counts import note_sparse_tensors
from ldvae_ext.backends.fused_step import FusedStep
from tests.helpers import untrained
from tests.reference import covariate_counts, setup_arguments

# Options of the network; `setup` are arguments of `setup_arguments`, `batches`, `genes` and `latents` sizes.
CASES: dict[str, dict[str, Any]] = {
    "nb": {},
    "zinb": {"gene_likelihood": "zinb"},
    "poisson": {"gene_likelihood": "poisson"},
    "4 batches": {"batches": 3, "bias": True},
    "zinb, 4 batches": {"batches": 3, "gene_likelihood": "zinb", "bias": True},
    "gene-batch": {"batches": 3, "dispersion": "gene-batch"},
    "zinb, gene-batch": {"batches": 3, "dispersion": "gene-batch", "gene_likelihood": "zinb"},
    "gene-label": {"dispersion": "gene-label", "setup": {"labels": True}},
    "covariates": {"batches": 3, "setup": {"covariates": "both"}},
    "poisson, covariates": {"batches": 3, "gene_likelihood": "poisson", "setup": {"covariates": "both"}},
    "encoded covariates": {"batches": 3, "setup": {"covariates": "both"}, "encode_covariates": True},
    "two layers": {"n_layers": 2, "batches": 3, "encode_covariates": True, "setup": {"covariates": "categorical"}},
    "two layers, first alone": {
        "n_layers": 2, "batches": 3, "encode_covariates": True, "deeply_inject_covariates": False,
    },
    "ln": {"latent_distribution": "ln"},
    "zinb, ln, gene-batch": {
        "batches": 3, "latent_distribution": "ln", "gene_likelihood": "zinb", "dispersion": "gene-batch",
    },
    "observed library": {"use_observed_lib_size": True},
    "poisson, observed library": {"use_observed_lib_size": True, "gene_likelihood": "poisson"},
    "no batch norm": {"use_batch_norm": False},
    "intercept, no batch norm": {"use_batch_norm": False, "bias": True, "gene_likelihood": "zinb"},
    "no batch norm at all": {"use_batch_norm": "none", "bias": True},
    "batch norm of the decoder": {"use_batch_norm": "decoder"},
    "layer norm": {"use_layer_norm": "encoder", "use_batch_norm": "none", "bias": True},
    "embedding": {"batches": 3, "batch_representation": "embedding"},
    "encoded embedding": {
        "batches": 3, "batch_representation": "embedding", "encode_covariates": True,
        "setup": {"covariates": "continuous"}, "dispersion": "gene-batch",
    },
    "30 latents": {"latents": 30},
    "no logarithm": {"log_variational": False},
    "no dropout": {"dropout_rate": 0.0},
    "an odd number of genes": {"genes": 67, "batches": 3},
    "more genes than a block": {"genes": 577, "gene_likelihood": "zinb"},
}  # fmt: skip
# What the compiled loops are not written for.
NOT_COMPILED: dict[str, dict[str, Any]] = {
    "gene-cell": {"dispersion": "gene-cell", "batches": 3},
    "zinb, gene-cell": {"dispersion": "gene-cell", "gene_likelihood": "zinb"},
    "size factors": {"setup": {"size_factor": True}},
    "zinb, size factors": {"setup": {"size_factor": True}, "gene_likelihood": "zinb", "batches": 3},
    "poisson, size factors": {"setup": {"size_factor": True}, "gene_likelihood": "poisson"},
}


class Step(NamedTuple):
    """What a step leaves behind, in float64."""

    loss: float
    terms: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    draw: np.ndarray
    """A random number drawn afterwards."""


def build(case: str, n_cells: int = 60) -> Any:
    """A model of a case with random parameters and statistics, whose latents are a few units long."""
    options = {**CASES, **NOT_COMPILED}[case].copy()
    sizes = options.pop("genes", 20), options.pop("batches", 1)
    latents, setup = options.pop("latents", 4), options.pop("setup", {})
    adata = covariate_counts(n_cells, *sizes)
    model = untrained(adata, latents, setup=setup_arguments(**setup, batch=sizes[1] > 1), **options)
    with torch.no_grad():
        for encoder in (model.module.z_encoder, model.module.l_encoder):
            for head in (encoder.mean_encoder, encoder.var_encoder):
                head.weight.mul_(0.1)
    return model


def minibatch(model: Any, n_cells: int | None = None) -> dict[str, torch.Tensor]:
    """The first cells of a model, dense."""
    loader = model._make_data_loader(model.adata, batch_size=n_cells or model.adata.n_obs)
    return next(iter(loader))


def in_type(module: Any, dtype: torch.dtype) -> Any:
    """A copy in another type; scvi-tools would make one-hot codes of batches float32."""
    module = deepcopy(module).to(dtype)

    def library_prior(batch_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = batch_index.squeeze(-1)
        return module.library_log_means[0, codes, None], module.library_log_vars[0, codes, None]

    if dtype == torch.float64:
        module._compute_local_library_params = library_prior
    return module


def prepared(tensors: dict[str, torch.Tensor], dtype: torch.dtype, *, is_sparse: bool) -> dict[str, torch.Tensor]:
    """A minibatch in another type or layout."""
    tensors = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tensors.items()
    }
    if is_sparse:
        note_sparse_tensors()
        tensors[REGISTRY_KEYS.X_KEY] = tensors[REGISTRY_KEYS.X_KEY].to_sparse_csr()
    return tensors


def step(
    module: Any,
    tensors: dict[str, torch.Tensor],
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    is_sparse: bool = True,
    layer_by_layer: bool = False,
    weight_n: torch.Tensor | None = None,
    n_backward: int = 1,
    training: bool = True,
) -> Step:
    """Loss, gradients and buffers after a step from a seed, of a copy of the network."""
    module = in_type(module, dtype).train(training)
    tensors = prepared(tensors, dtype, is_sparse=is_sparse)
    scvi.settings.seed = 3
    chosen = choose_backend(module, backend)
    with without_fused_step() if layer_by_layer else nullcontext():
        losses = chosen.loss(module, tensors, 0.7)
    terms = {"reconstruction": losses.reconstruction_loss["reconstruction_loss"], **losses.kl_local}
    loss = losses.loss if weight_n is None else (weight_n.to(dtype) * sum(terms.values())).sum()
    for i in range(n_backward):
        loss.backward(retain_graph=i + 1 < n_backward)
    return Step(
        float(losses.loss.detach()),
        {name: value.detach().double().numpy() for name, value in terms.items()},
        {
            name: np.zeros(value.shape) if value.grad is None else value.grad.double().numpy() / n_backward
            for name, value in module.named_parameters()
        },
        {name: value.double().numpy() for name, value in module.named_buffers()},
        torch.rand(3).numpy(),
    )


def error(value: np.ndarray, truth: np.ndarray) -> float:
    """Relative to the norm of the truth."""
    return float(np.linalg.norm(value - truth) / max(np.linalg.norm(truth), 1e-300))


def without_effect(module: Any) -> set[str]:
    """Names of the biases before a batch norm, which takes them away: their true gradient is zero."""
    names = set()
    for path, layers in module.named_modules():
        if isinstance(layers, torch.nn.Sequential) and len(layers) > 1 and isinstance(layers[1], torch.nn.BatchNorm1d):
            names.add(f"{path}.0.bias")
    return names


def one_normal_draw(monkeypatch: Any) -> None:
    """Make normal draws in float64 those in float32."""
    draw = torch.Tensor.normal_

    def normal(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype != torch.float64:
            return draw(self, *args, **kwargs)
        return self.copy_(draw(torch.empty(self.shape), *args, **kwargs))

    monkeypatch.setattr(torch.Tensor, "normal_", normal)


def assert_same_in_double(module: Any, tensors: dict[str, torch.Tensor], **kwargs: Any) -> None:
    """``"torch"`` in float64 is scvi-tools' own computation in float64."""
    truth = step(module, tensors, "scvi", torch.float64, is_sparse=False, **kwargs)
    largest = max(np.abs(value).max() for value in truth.gradients.values())
    for is_sparse in (True, False):
        found = step(module, tensors, "torch", torch.float64, is_sparse=is_sparse, **kwargs)
        np.testing.assert_allclose(found.loss, truth.loss, rtol=1e-12)
        for name, value in truth.terms.items():
            np.testing.assert_allclose(found.terms[name], value, rtol=1e-11, atol=1e-11, err_msg=name)
        for name, value in truth.gradients.items():
            if name in without_effect(module):
                np.testing.assert_allclose(found.gradients[name], value, atol=1e-12 * largest, err_msg=name)
            else:
                assert error(found.gradients[name], value) < 1e-10, name
        for name, value in truth.buffers.items():
            np.testing.assert_allclose(found.buffers[name], value, rtol=1e-12, atol=1e-14, err_msg=name)
        np.testing.assert_array_equal(found.draw, truth.draw)


def assert_as_exact(
    module: Any,
    tensors: dict[str, torch.Tensor],
    *,
    backend: str = "numba",
    routes: tuple[bool, ...],
    floor: float = 1e-7,
    tiny: float = 3e-6,
    **kwargs: Any,
) -> None:
    """Errors against float64 are like those of scvi-tools' float32, or tiny; layer by layer or not, as ``routes`` say.

    Errors of a fraction ``tiny`` of the norm of a parameter's gradient are left, or of ``floor`` of the largest of these norms: what is left of large
    terms that cancel, as in the bias of latents that a batch norm is behind, is rounding for everyone.
    """
    truth = step(module, tensors, "scvi", torch.float64, is_sparse=False, **kwargs)
    theirs = step(module, tensors, "scvi", is_sparse=False, **kwargs)
    largest = max(np.linalg.norm(value) for value in truth.gradients.values())
    of_loss = max(3 * abs(theirs.loss - truth.loss), 1e-6 * abs(truth.loss))
    for layer_by_layer in routes:
        for is_sparse in (True, False):
            found = step(module, tensors, backend, is_sparse=is_sparse, layer_by_layer=layer_by_layer, **kwargs)
            assert abs(found.loss - truth.loss) <= of_loss
            for name, value in truth.terms.items():
                allowed = np.maximum(3 * np.abs(theirs.terms[name] - value).max(), 1e-5 * np.abs(value) + 1e-4)
                assert (np.abs(found.terms[name] - value) <= allowed).all(), name
            for name, value in truth.gradients.items():
                if name in without_effect(module):
                    np.testing.assert_allclose(found.gradients[name], value, atol=1e-5 * largest, err_msg=name)
                else:
                    distance = np.linalg.norm(found.gradients[name] - value)
                    of_theirs = 3 * np.linalg.norm(theirs.gradients[name] - value)
                    allowed = max(of_theirs, tiny * np.linalg.norm(value), floor * largest)
                    assert distance <= allowed, (name, layer_by_layer, is_sparse)
            for name, value in truth.buffers.items():
                np.testing.assert_allclose(found.buffers[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(found.draw, theirs.draw)


@contextmanager
def without_fused_step() -> Iterator[None]:
    """Inside, the numba backend computes layer by layer what it would compute by the fused step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedStep, "fits", staticmethod(lambda _module: False))
        yield


def routes_of(module: Any) -> tuple[bool, ...]:
    """Both routes of the numba backend, fused (False) and layer by layer (True), or the only one that the network allows."""
    return (False, True) if FusedStep.fits(module) else (False,)
