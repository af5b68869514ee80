"""Encoders of sparse counts: the first layer reads the counts that are there, random numbers are scvi-tools' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scvi.nn import Encoder, FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import Normal, register_kl

from ldvae_ext.module._likelihood import Counts, note_sparse_tensors


class Encoded(Normal):
    """A posterior. What is not finite is found in the loss, which is looked at once, and not in each parameter."""

    def __init__(self, loc: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)


class Prior(Encoded):
    """A prior without parameters to learn."""


@register_kl(Encoded, Prior)
def _kl(posterior: Encoded, prior: Prior) -> torch.Tensor:
    return _Divergence.apply(posterior.loc, posterior.scale, prior.loc, prior.scale)


class _Divergence(Function):
    """``KL(N(m, s) || N(m0, s0)) = (r + ((m - m0) / s0)^2 - 1 - log r) / 2`` with ``r = (s / s0)^2``."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, scale: torch.Tensor, mean_0: torch.Tensor, scale_0: torch.Tensor) -> Any:
        ratio = (scale / scale_0).square_()
        distance = (mean - mean_0).div_(scale_0)
        ctx.save_for_backward(distance, ratio, scale, scale_0)
        return 0.5 * (ratio + distance.square() - 1 - ratio.log())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: torch.Tensor) -> Any:
        distance, ratio, scale, scale_0 = ctx.saved_tensors
        return weight * distance / scale_0, weight * (ratio - 1) / scale, None, None


class _SparseLinear(Function):
    """``[counts, more] @ weight.T + bias`` on a CPU, by scipy."""

    @staticmethod
    def forward(
        ctx: Any, weight_hg: torch.Tensor, bias_h: torch.Tensor | None, more_nc: torch.Tensor | None, counts: Counts
    ) -> torch.Tensor:
        ctx.counts, ctx.has_bias = counts, bias_h is not None
        ctx.save_for_backward(weight_hg, more_nc)
        weight = weight_hg.detach()
        of_genes_gh = weight[:, : counts.n_genes].t().contiguous().numpy()
        out_nh = torch.from_numpy((counts.matrix @ of_genes_gh).astype(of_genes_gh.dtype, copy=False))
        if bias_h is not None:
            out_nh += bias_h.detach()
        return out_nh if more_nc is None else out_nh.addmm_(more_nc.detach(), weight[:, counts.n_genes :].t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_nh: torch.Tensor) -> Any:
        weight_hg, more_nc = ctx.saved_tensors
        counts, d_weight_hg, d_more_nc = ctx.counts, None, None
        if ctx.needs_input_grad[0]:
            d_weight_hg = torch.empty_like(weight_hg)
            of_genes_gh = counts.matrix.T @ slope_nh.contiguous().numpy()
            d_weight_hg[:, : counts.n_genes] = torch.from_numpy(of_genes_gh).t()
            if more_nc is not None:
                d_weight_hg[:, counts.n_genes :] = slope_nh.t() @ more_nc
        if ctx.needs_input_grad[2]:
            d_more_nc = slope_nh @ weight_hg[:, counts.n_genes :]
        return d_weight_hg, slope_nh.sum(0) if ctx.has_bias else None, d_more_nc, None


def is_plain(layer: Any, kind: type[torch.nn.Module]) -> bool:
    """Whether a layer computes what its kind does: nobody has put a ``forward`` of another class or of its own there."""
    is_its_own = isinstance(layer, torch.nn.Module) and "forward" in layer.__dict__
    return isinstance(layer, kind) and type(layer).forward is kind.forward and not is_its_own


def reads_sparse(encoder: Any) -> bool:
    """Whether :func:`encoded` knows an encoder: scvi-tools' own, whose first layer is linear."""
    return (
        is_plain(encoder, Encoder)
        and is_plain(encoder.encoder, FCLayers)
        and is_plain(encoder.encoder.fc_layers[0][0], torch.nn.Linear)
    )


def encoders_in_use(module: Any) -> list[Encoder]:
    """That of the latents, and that of the library where it is latent, too."""
    return [module.z_encoder] if module.use_observed_lib_size else [module.z_encoder, module.l_encoder]


def has_one_hidden_layer(encoder: Any) -> bool:
    """Whether an encoder is scvi-tools' usual one, no layer of which is of another kind; what norm it has is left open."""
    if not reads_sparse(encoder) or len(encoder.encoder.fc_layers) != 1 or encoder.var_activation is not torch.exp:
        return False
    linear, _, layer_norm, activation, _ = encoder.encoder.fc_layers[0]
    return (
        layer_norm is None
        and is_plain(activation, torch.nn.ReLU)
        and all(
            is_plain(layer, torch.nn.Linear) and layer.bias is not None
            for layer in (linear, encoder.mean_encoder, encoder.var_encoder)
        )
    )


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
    hidden = _behind_the_first(layers, x, one_hot)
    variance = encoder.var_activation(encoder.var_encoder(hidden)) + encoder.var_eps
    posterior = Encoded(encoder.mean_encoder(hidden), variance.sqrt())
    return posterior, encoder.z_transformation(posterior.rsample())


def _behind_the_first(layers: FCLayers, x: torch.Tensor, one_hot: Sequence[torch.Tensor]) -> torch.Tensor:
    """As the layers' own forward, from behind the first linear layer."""
    for i, group in enumerate(layers.fc_layers):
        for layer in list(group)[i == 0 :]:
            if isinstance(layer, torch.nn.BatchNorm1d):
                x = layer(x)
            elif layer is not None:
                x = layers._apply_layer(layer, x, one_hot, i)
    return x


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
    note_sparse_tensors()
    parts = (torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(values))
    return torch.sparse_csr_tensor(*parts, size=tuple(shape), check_invariants=False)
