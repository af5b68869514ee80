"""Encoders of sparse counts: the first layer multiplies the counts that are stored; random numbers are scvi-tools' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scvi.nn import Encoder, FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.backends.counts import Counts
from ldvae_ext.backends.distributions import UncheckedNormal


class _SparseLinear(Function):
    """``[counts, more] @ weight.T + bias`` on a CPU, by scipy's sparse-dense product."""

    @staticmethod
    def forward(
        ctx: Any, weight_hg: torch.Tensor, bias_h: torch.Tensor | None, more_nc: torch.Tensor | None, counts: Counts
    ) -> torch.Tensor:
        ctx.counts, ctx.has_bias = counts, bias_h is not None
        ctx.save_for_backward(weight_hg, more_nc)
        weight = weight_hg.detach()
        weight_gh = weight[:, : counts.n_genes].t().contiguous().numpy()
        out_nh = torch.from_numpy((counts.matrix @ weight_gh).astype(weight_gh.dtype, copy=False))
        if bias_h is not None:
            out_nh += bias_h.detach()
        return out_nh if more_nc is None else out_nh.addmm_(more_nc.detach(), weight[:, counts.n_genes :].t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_nh: torch.Tensor) -> Any:
        weight_hg, more_nc = ctx.saved_tensors
        counts, d_weight_hg, d_more_nc = ctx.counts, None, None
        if ctx.needs_input_grad[0]:
            d_weight_hg = torch.empty_like(weight_hg)
            d_weight_gh = counts.matrix.T @ d_out_nh.contiguous().numpy()
            d_weight_hg[:, : counts.n_genes] = torch.from_numpy(d_weight_gh).t()
            if more_nc is not None:
                d_weight_hg[:, counts.n_genes :] = d_out_nh.t() @ more_nc
        if ctx.needs_input_grad[2]:
            d_more_nc = d_out_nh @ weight_hg[:, counts.n_genes :]
        return d_weight_hg, d_out_nh.sum(0) if ctx.has_bias else None, d_more_nc, None


def encode_counts(
    encoder: Encoder, counts: Counts, continuous_nc: torch.Tensor | None, categories: Sequence[torch.Tensor]
) -> tuple[UncheckedNormal, torch.Tensor]:
    """Posterior and a draw from it: ``encoder.forward`` on sparse counts, with the same random numbers.

    Parameters
    ----------
    encoder
        An encoder of scvi-tools.
    counts
        Counts as the encoder takes them: log(1 + counts), or counts.
    continuous_nc
        Continuous covariates of the encoder, shape (cells, covariates).
    categories
        Codes of its categorical covariates, shape (cells, 1) each.
    """
    layers = encoder.encoder
    one_hot = [
        torch.nn.functional.one_hot(codes.squeeze(-1), n_levels)
        for n_levels, codes in zip(layers.n_cat_list, categories, strict=False)
        if n_levels > 1
    ]
    more = [*([] if continuous_nc is None else [continuous_nc]), *one_hot]
    first = layers.fc_layers[0][0]
    more_nc = torch.cat(more, dim=-1).to(first.weight.dtype) if more else None
    x = _SparseLinear.apply(first.weight, first.bias, more_nc, counts)
    hidden = _after_first_linear(layers, x, one_hot)
    variance = encoder.var_activation(encoder.var_encoder(hidden)) + encoder.var_eps
    posterior = UncheckedNormal(encoder.mean_encoder(hidden), variance.sqrt())
    return posterior, encoder.z_transformation(posterior.rsample())


def _after_first_linear(layers: FCLayers, x: torch.Tensor, one_hot: Sequence[torch.Tensor]) -> torch.Tensor:
    """The layers' own forward pass, from after the first linear layer on."""
    for i, group in enumerate(layers.fc_layers):
        for layer in list(group)[i == 0 :]:
            if isinstance(layer, torch.nn.BatchNorm1d):
                x = layer(x)
            elif layer is not None:
                x = layers._apply_layer(layer, x, one_hot, i)
    return x
