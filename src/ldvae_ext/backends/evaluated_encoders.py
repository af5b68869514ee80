"""Posteriors of many cells: the encoders of a network as they are in evaluation mode, on sparse counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.nn import Encoder

from ldvae_ext.core._compiled import kernels
from ldvae_ext.module._likelihood import Counts, check_genes
from ldvae_ext.module._sparse import encoders_in_use, has_one_hidden_layer, is_plain, sparse_rows

# What scvi-tools' way to a posterior passes through.
_STEPS = ("_get_inference_input", "inference", "_regular_inference", "posterior")


class CellPosterior(NamedTuple):
    """What the encoder says of a minibatch, without sampling."""

    mean: torch.Tensor
    """Posterior means (of u under ``"ln"``), shape (cells, latents)."""
    variance: torch.Tensor
    """Posterior variances, same shape."""
    log_library: torch.Tensor
    """Log of the library size: size factor, observed, or the posterior mean of the log library; shape (cells,)."""


class EvaluatedEncoders:
    """The encoders of a network with their batch norm folded in, both in one pass over the counts, in compiled loops.

    Parameters
    ----------
    module
        A network of which :meth:`fit` holds; it must not change meanwhile.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        encoders = encoders_in_use(module)
        first = [_folded(encoder) for encoder in encoders]
        # Gene by gene in memory, the hidden units of both encoders side by side.
        self._weight_gh = np.ascontiguousarray(np.concatenate([weight_hg for weight_hg, _ in first]).T)
        self._bias_h = np.concatenate([bias_h for _, bias_h in first])
        self._n_hidden = len(first[0][1])
        heads = module.z_encoder.mean_encoder, module.z_encoder.var_encoder
        self._mean, self._variance = ((_array(head.weight).T, _array(head.bias)) for head in heads)
        self._library = None
        if len(encoders) > 1:
            head = module.l_encoder.mean_encoder
            self._library = _array(head.weight).T, _array(head.bias)

    @staticmethod
    def fit(module: Any) -> bool:
        """Whether a network has scvi-tools' one hidden layer without covariates, and is where the loops can read it."""
        return (
            kernels() is not None
            and module.minified_data_type is None
            and not module.encode_covariates
            and module.device.type == "cpu"
            and all(map(_is_usual, encoders_in_use(module)))
            and module.replaced(_STEPS, _layers(module)) is None
        )

    def posterior(self, tensors: dict[str, torch.Tensor]) -> CellPosterior:
        """Posterior of the cells of a minibatch.

        Parameters
        ----------
        tensors
            The minibatch; its counts may be a CSR tensor.
        """
        from ldvae_ext.module import _row_kernels as loops

        x_ng = tensors[REGISTRY_KEYS.X_KEY].cpu()
        check_genes(x_ng, self._module.n_input)
        counts = Counts.of(sparse_rows(x_ng.float()) if x_ng.layout is torch.strided else x_ng)
        indptr, indices, values = counts.arrays
        hidden_nh = np.tile(self._bias_h, (counts.n_cells, 1))
        seen = np.log1p(values) if self._module.log_variational else values
        loops.multiply(indptr, indices, seen, self._weight_gh, hidden_nh)
        np.maximum(hidden_nh, 0, out=hidden_nh)
        of_z_nh = hidden_nh[:, : self._n_hidden]
        mean_nk = of_z_nh @ self._mean[0] + self._mean[1]
        with np.errstate(over="ignore"):  # infinite as in torch
            variance_nk = np.exp(of_z_nh @ self._variance[0] + self._variance[1])
        variance_nk += np.float32(self._module.z_encoder.var_eps)
        if self._module.use_size_factor_key:
            log_library = torch.log(tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY]).squeeze(-1)
        elif self._library is None:
            log_library = torch.log(counts.totals())
        else:
            log_library = torch.from_numpy((hidden_nh[:, self._n_hidden :] @ self._library[0] + self._library[1])[:, 0])
        return CellPosterior(torch.from_numpy(mean_nk), torch.from_numpy(variance_nk), log_library)


def _layers(module: Any) -> list[torch.nn.Module]:
    """The layers between a cell's counts and its posterior; what is made of a draw comes later."""
    return [
        layer
        for encoder in encoders_in_use(module)
        for layer in encoder.modules()
        if layer is not encoder.z_transformation
    ]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _is_usual(encoder: Encoder) -> bool:
    if not has_one_hidden_layer(encoder):
        return False
    norm = encoder.encoder.fc_layers[0][1]
    is_norm = norm is None or (is_plain(norm, torch.nn.BatchNorm1d) and norm.affine and norm.track_running_stats)
    return is_norm and all(value.dtype is torch.float32 for value in encoder.parameters())


def _folded(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of the first layer behind its batch norm, float32; folded in float64."""
    linear, norm = encoder.encoder.fc_layers[0][:2]
    weight_hg, bias_h = _array(linear.weight).astype(np.float64), _array(linear.bias).astype(np.float64)
    if norm is not None:
        scale_h = _array(norm.weight).astype(np.float64) / np.sqrt(
            _array(norm.running_var).astype(np.float64) + norm.eps
        )
        bias_h = (bias_h - _array(norm.running_mean)) * scale_h + _array(norm.bias)
        weight_hg = weight_hg * scale_h[:, None]
    return weight_hg.astype(np.float32), bias_h.astype(np.float32)
