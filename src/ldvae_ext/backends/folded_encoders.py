"""Posteriors of many cells: the encoders of a network in evaluation mode, on sparse counts, in compiled loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from scvi.nn import Encoder

from ldvae_ext.backends.batch_norm import batch_norm_of
from ldvae_ext.backends.counts import Counts, check_genes, csr_of_dense
from ldvae_ext.backends.inference import CellPosterior
from ldvae_ext.backends.layers import encoders_in_use, has_one_hidden_layer, is_plain, replaced
from ldvae_ext.core.fold import fold_batch_norm
from ldvae_ext.kernels.threads import is_compiled

# Methods between a minibatch and its posterior in scvi-tools, which are passed over here.
_METHODS = ("_get_inference_input", "inference", "_regular_inference", "posterior")


class FoldedEncoders:
    """The encoders of a network with their batch norm folded in, both in one pass over the counts, in compiled loops.

    Parameters
    ----------
    module
        A network for which :meth:`fits` is True; its parameters must not change afterwards.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        encoders = encoders_in_use(module)
        first = [_folded(encoder) for encoder in encoders]
        # Row-major by gene, the hidden units of both encoders side by side.
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
    def fits(module: Any) -> bool:
        """True if a network has one hidden layer without covariates, and is where compiled loops can read it."""
        return (
            is_compiled()
            and module.minified_data_type is None
            and not module.encode_covariates
            and module.device.type == "cpu"
            and all(map(_can_be_folded, encoders_in_use(module)))
            and replaced(module, _METHODS, _layers(module)) is None
        )

    def posterior(self, tensors: dict[str, torch.Tensor]) -> CellPosterior:
        """Posterior of the cells of a minibatch.

        Parameters
        ----------
        tensors
            The minibatch; its counts may be a CSR tensor.
        """
        from ldvae_ext.kernels import sparse as loops

        x_ng = tensors[REGISTRY_KEYS.X_KEY].cpu()
        check_genes(x_ng, self._module.n_input)
        counts = Counts.of(csr_of_dense(x_ng.float()) if x_ng.layout is torch.strided else x_ng)
        indptr, indices, values = counts.arrays
        hidden_nh = np.empty((counts.n_cells, len(self._bias_h)), np.float32)
        seen = np.log1p(values) if self._module.log_variational else values
        loops.sparse_dense_product(indptr, indices, seen, self._weight_gh, self._bias_h, hidden_nh)
        np.maximum(hidden_nh, 0, out=hidden_nh)
        latent_nh = hidden_nh[:, : self._n_hidden]
        mean_nk = latent_nh @ self._mean[0] + self._mean[1]
        with np.errstate(over="ignore"):  # infinite as in torch
            variance_nk = np.exp(latent_nh @ self._variance[0] + self._variance[1])
        variance_nk += np.float32(self._module.z_encoder.var_eps)
        if self._module.use_size_factor_key:
            log_library = torch.log(tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY]).squeeze(-1)
        elif self._library is None:
            log_library = torch.log(counts.totals())
        else:
            log_library = torch.from_numpy((hidden_nh[:, self._n_hidden :] @ self._library[0] + self._library[1])[:, 0])
        return CellPosterior(torch.from_numpy(mean_nk), torch.from_numpy(variance_nk), log_library)


def _layers(module: Any) -> list[torch.nn.Module]:
    """The layers between the counts of a cell and its posterior; those that transform a draw come later."""
    return [
        layer
        for encoder in encoders_in_use(module)
        for layer in encoder.modules()
        if layer is not encoder.z_transformation
    ]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _can_be_folded(encoder: Encoder) -> bool:
    if not has_one_hidden_layer(encoder):
        return False
    norm = encoder.encoder.fc_layers[0][1]
    is_norm = norm is None or (is_plain(norm, torch.nn.BatchNorm1d) and norm.affine and norm.track_running_stats)
    return is_norm and all(value.dtype is torch.float32 for value in encoder.parameters())


def _folded(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the first layer with its batch norm, float32; folded in float64."""
    linear, norm = encoder.encoder.fc_layers[0][:2]
    weight_hg, bias_h = (_array(value).astype(np.float64) for value in (linear.weight, linear.bias))
    folded = fold_batch_norm(weight_hg, bias_h, None if norm is None else batch_norm_of(norm))
    return folded[0].astype(np.float32), folded[1].astype(np.float32)
