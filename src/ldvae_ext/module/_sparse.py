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

from ldvae_ext.core._compiled import compiled, over_rows
from ldvae_ext.module._likelihood import Counts


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


def _weights_by_gene(weight_hg: torch.Tensor) -> torch.Tensor:
    from ldvae_ext.module import _row_kernels as loops

    out_gh = weight_hg.new_empty(weight_hg.shape[::-1])
    loops.turn(weight_hg.detach().contiguous().numpy(), out_gh.numpy())
    return out_gh


def _linear(
    weight_hg: torch.Tensor, bias_h: torch.Tensor | None, more_nc: torch.Tensor | None, counts: Counts
) -> torch.Tensor:
    """``[counts, more] @ weight.T + bias``."""
    from ldvae_ext.module import _row_kernels as loops

    weight_gh = _weights_by_gene(weight_hg)
    out_nh = weight_gh.new_zeros(counts.n_cells, weight_gh.shape[1])
    if bias_h is not None:
        out_nh += bias_h.detach()
    if more_nc is not None:
        out_nh.addmm_(more_nc.detach(), weight_gh[counts.n_genes :])
    over_rows(loops.multiply, counts.n_cells, *counts.arrays, weight_gh.numpy(), out_nh.numpy())
    return out_nh


def _linear_back(
    weight_hg: torch.Tensor, more_nc: torch.Tensor | None, counts: Counts, slope_nh: torch.Tensor, *, of_more: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of :func:`_linear` in the weights and, if they are asked for, in the other inputs."""
    from ldvae_ext.module import _row_kernels as loops

    d_weight_gh = weight_hg.new_zeros(weight_hg.shape[::-1])
    over_rows(loops.multiply, counts.n_genes, *counts.by_gene, slope_nh.numpy(), d_weight_gh.numpy())
    if more_nc is not None:
        torch.mm(more_nc.t(), slope_nh, out=d_weight_gh[counts.n_genes :])
    d_weight_hg = torch.empty_like(weight_hg, memory_format=torch.contiguous_format)
    loops.turn(d_weight_gh.numpy(), d_weight_hg.numpy())
    return d_weight_hg, slope_nh @ weight_hg[:, counts.n_genes :] if of_more else None


class _SparseLinear(Function):
    """A linear layer of sparse counts and other inputs."""

    @staticmethod
    def forward(
        ctx: Any, weight_hg: torch.Tensor, bias_h: torch.Tensor | None, more_nc: torch.Tensor | None, counts: Counts
    ) -> torch.Tensor:
        ctx.counts, ctx.has_bias = counts, bias_h is not None
        ctx.save_for_backward(weight_hg, more_nc)
        with compiled(n_threads=torch.get_num_threads()):
            return _linear(weight_hg, bias_h, more_nc, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_nh: torch.Tensor) -> Any:
        weight_hg, more_nc = ctx.saved_tensors
        with compiled(n_threads=torch.get_num_threads()):
            d_weight_hg, d_more_nc = _linear_back(
                weight_hg, more_nc, ctx.counts, slope_nh.contiguous(), of_more=ctx.needs_input_grad[2]
            )
        return d_weight_hg, slope_nh.sum(0) if ctx.has_bias else None, d_more_nc, None


class _UsualEncoder(Function):
    """Linear layer, batch norm, ReLU and dropout, in training; mean, scale and a draw from the posterior."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_hg: torch.Tensor,
        bias_h: torch.Tensor,
        gamma_h: torch.Tensor,
        beta_h: torch.Tensor,
        mean_weight_kh: torch.Tensor,
        mean_bias_k: torch.Tensor,
        variance_weight_kh: torch.Tensor,
        variance_bias_k: torch.Tensor,
        more_nc: torch.Tensor | None,
        counts: Counts,
        norm: torch.nn.BatchNorm1d,
        dropout: float,
        least_variance: float,
    ) -> tuple[torch.Tensor, ...]:
        from ldvae_ext.module import _row_kernels as loops

        with compiled(n_threads=torch.get_num_threads()):
            before_nh = _linear(weight_hg, bias_h, more_nc, counts)
        # The draws of torch.nn.Dropout.
        kept_nh = torch.empty_like(before_nh).bernoulli_(1 - dropout).div_(1 - dropout)
        normal_nh, inverse_h, hidden_nh = (
            torch.empty_like(before_nh),
            torch.empty_like(gamma_h),
            torch.empty_like(before_nh),
        )
        given = [value.detach().numpy() for value in (before_nh, gamma_h, beta_h, kept_nh)]
        running = norm.running_mean.numpy(), norm.running_var.numpy(), norm.momentum
        loops.hidden(*given, norm.eps, *running, normal_nh.numpy(), inverse_h.numpy(), hidden_nh.numpy())
        norm.num_batches_tracked.add_(1)
        mean_nk = torch.addmm(mean_bias_k, hidden_nh, mean_weight_kh.t())
        free_nk = torch.addmm(variance_bias_k, hidden_nh, variance_weight_kh.t()).exp_()
        scale_nk = (free_nk + least_variance).sqrt_()
        draw_nk = torch.empty_like(mean_nk).normal_()
        ctx.save_for_backward(
            weight_hg, more_nc, gamma_h, beta_h, mean_weight_kh, variance_weight_kh,
            kept_nh, normal_nh, inverse_h, hidden_nh, free_nk, scale_nk, draw_nk,
        )  # fmt: skip
        ctx.counts = counts
        return mean_nk, scale_nk, torch.addcmul(mean_nk, draw_nk, scale_nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean_nk: torch.Tensor, d_scale_nk: torch.Tensor, d_sample_nk: torch.Tensor) -> Any:
        from ldvae_ext.module import _row_kernels as loops

        (
            weight_hg, more_nc, gamma_h, beta_h, mean_weight_kh, variance_weight_kh,
            kept_nh, normal_nh, inverse_h, hidden_nh, free_nk, scale_nk, draw_nk,
        ) = ctx.saved_tensors  # fmt: skip
        d_mean_nk = d_mean_nk + d_sample_nk
        # variance = e^v + least, scale = sqrt(variance).
        d_variance_nk = torch.addcmul(d_scale_nk, d_sample_nk, draw_nk).mul_(free_nk).div_(scale_nk).mul_(0.5)
        d_hidden_nh = torch.addmm(d_mean_nk @ mean_weight_kh, d_variance_nk, variance_weight_kh)
        d_before_nh = torch.empty_like(d_hidden_nh)
        d_gamma_h, d_beta_h = torch.zeros_like(gamma_h), torch.zeros_like(beta_h)
        given = [value.detach().numpy() for value in (d_hidden_nh, gamma_h, beta_h, kept_nh, normal_nh, inverse_h)]
        loops.hidden_back(*given, d_before_nh.numpy(), d_gamma_h.numpy(), d_beta_h.numpy())
        with compiled(n_threads=torch.get_num_threads()):
            d_weight_hg, d_more_nc = _linear_back(
                weight_hg, more_nc, ctx.counts, d_before_nh, of_more=ctx.needs_input_grad[8]
            )
        return (
            d_weight_hg,
            # Before a batch norm, which takes it away, a bias has no effect.
            torch.zeros_like(gamma_h),
            d_gamma_h,
            d_beta_h,
            d_mean_nk.t() @ hidden_nh,
            d_mean_nk.sum(0),
            d_variance_nk.t() @ hidden_nh,
            d_variance_nk.sum(0),
            d_more_nc,
            *[None] * 4,
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
    if _is_usual(encoder, counts.n_cells):
        norm, dropout = layers.fc_layers[0][1], layers.fc_layers[0][4]
        heads = encoder.mean_encoder, encoder.var_encoder
        parameters = [value for layer in (first, norm, *heads) for value in (layer.weight, layer.bias)]
        options = norm, 0.0 if dropout is None else dropout.p, encoder.var_eps
        mean, scale, sample = _UsualEncoder.apply(*parameters, more_nc, counts, *options)
        return Encoded(mean, scale), encoder.z_transformation(sample)
    x = _SparseLinear.apply(first.weight, first.bias, more_nc, counts)
    hidden = _behind_the_first(layers, x, one_hot)
    variance = encoder.var_activation(encoder.var_encoder(hidden)) + encoder.var_eps
    posterior = Encoded(encoder.mean_encoder(hidden), variance.sqrt())
    return posterior, encoder.z_transformation(posterior.rsample())


def _is_usual(encoder: Encoder, n_cells: int) -> bool:
    """Whether an encoder has scvi-tools' one hidden layer and is in training."""
    if len(encoder.encoder.fc_layers) != 1 or encoder.var_activation is not torch.exp:
        return False
    linear, norm, layer_norm, activation, dropout = encoder.encoder.fc_layers[0]
    return (
        type(norm) is torch.nn.BatchNorm1d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and linear.bias is not None
        and layer_norm is None
        and type(activation) is torch.nn.ReLU
        and (dropout is None or (dropout.training and 0 < dropout.p < 1))
        and n_cells > 1
    )


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
    parts = (torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(values))
    return torch.sparse_csr_tensor(*parts, size=tuple(shape), check_invariants=False)
