"""Encoders of sparse counts: the first layer reads the counts that are there, the rest is scvi-tools' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scvi.nn import Encoder, FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import Normal

from ldvae_ext.core._compiled import compiled, over_rows
from ldvae_ext.module._likelihood import Counts


class _SparseLinear(Function):
    """``[counts, more] @ weight.T + bias``; weights that lie gene by gene in memory are not copied."""

    @staticmethod
    def forward(
        ctx: Any, weight_hg: torch.Tensor, bias_h: torch.Tensor | None, more_nc: torch.Tensor | None, counts: Counts
    ) -> torch.Tensor:
        from ldvae_ext.module import _row_kernels as loops

        weight_gh = weight_hg.detach().t().contiguous()
        out_nh = weight_gh.new_zeros(counts.n_cells, weight_gh.shape[1])
        if bias_h is not None:
            out_nh += bias_h.detach()
        if more_nc is not None:
            out_nh.addmm_(more_nc.detach(), weight_gh[counts.n_genes :])
        with compiled(n_threads=torch.get_num_threads()):
            over_rows(loops.multiply, counts.n_cells, *counts.arrays(), weight_gh.numpy(), out_nh.numpy())
        ctx.counts, ctx.has_bias = counts, bias_h is not None
        ctx.save_for_backward(weight_hg, more_nc)
        return out_nh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_nh: torch.Tensor) -> Any:
        from ldvae_ext.module import _row_kernels as loops

        weight_hg, more_nc = ctx.saved_tensors
        counts, slope_nh = ctx.counts, slope_nh.contiguous()
        d_weight_gh = d_more_nc = None
        if ctx.needs_input_grad[0]:
            d_weight_gh = weight_hg.new_zeros(weight_hg.shape[1], weight_hg.shape[0])
            arrays = (*counts.arrays(), slope_nh.numpy(), d_weight_gh.numpy())
            with compiled(n_threads=torch.get_num_threads()):
                # Threads share hidden units, since a gene is met in many cells.
                over_rows(loops.add_outer, slope_nh.shape[1], *arrays)
            if more_nc is not None:
                torch.mm(more_nc.t(), slope_nh, out=d_weight_gh[counts.n_genes :])
        if more_nc is not None and ctx.needs_input_grad[2]:
            d_more_nc = slope_nh @ weight_hg[:, counts.n_genes :]
        d_bias_h = slope_nh.sum(0) if ctx.has_bias else None
        return None if d_weight_gh is None else d_weight_gh.t(), d_bias_h, d_more_nc, None


def sparse_rows(x_ng: torch.Tensor) -> torch.Tensor:
    """The non-zero values of a dense float32 tensor on a CPU, as a CSR tensor."""
    from ldvae_ext.module import _row_kernels as loops

    dense_ng = x_ng.detach().contiguous().numpy()
    indptr = np.empty(len(dense_ng) + 1, np.int64)
    loops.n_nonzero(dense_ng, indptr)
    indices, values = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], np.float32)
    loops.compress(dense_ng, indptr, indices, values)
    return csr_tensor(indptr, indices, values, dense_ng.shape)


def csr_tensor(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """A CSR tensor of arrays that are known to be one."""
    parts = (torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(values))
    return torch.sparse_csr_tensor(*parts, size=tuple(shape), check_invariants=False)


def encoded(
    encoder: Encoder, counts: Counts, continuous_nc: torch.Tensor | None, categories: Sequence[torch.Tensor]
) -> tuple[Normal, torch.Tensor]:
    """Posterior and a draw from it: ``encoder.forward`` of sparse counts, with the same random numbers.

    Parameters
    ----------
    encoder
        An encoder of scvi-tools.
    counts
        Counts as the encoder sees them, after a logarithm.
    continuous_nc
        Continuous covariates that the encoder sees, shape (cells, covariates).
    categories
        Codes of the categorical ones, shape (cells, 1) each.
    """
    hidden = _through(encoder.encoder, counts, continuous_nc, categories)
    variance = encoder.var_activation(encoder.var_encoder(hidden)) + encoder.var_eps
    # What is not finite shows in the loss, which is looked at once.
    posterior = Normal(encoder.mean_encoder(hidden), variance.sqrt(), validate_args=False)
    return posterior, encoder.z_transformation(posterior.rsample())


def _through(
    layers: FCLayers, counts: Counts, continuous_nc: torch.Tensor | None, categories: Sequence[torch.Tensor]
) -> torch.Tensor:
    """As the layers' own forward, but for the first of them."""
    one_hot = [
        torch.nn.functional.one_hot(codes.squeeze(-1), n_levels)
        for n_levels, codes in zip(layers.n_cat_list, categories, strict=False)
        if n_levels > 1
    ]
    x = None
    for i, group in enumerate(layers.fc_layers):
        for layer in group:
            if x is None:
                more = [*([] if continuous_nc is None else [continuous_nc]), *one_hot]
                more_nc = torch.cat(more, dim=-1).to(layer.weight.dtype) if more else None
                x = _SparseLinear.apply(layer.weight, layer.bias, more_nc, counts)
            elif isinstance(layer, torch.nn.BatchNorm1d):
                x = layer(x)
            elif layer is not None:
                x = layers._apply_layer(layer, x, one_hot, i)
    return x
