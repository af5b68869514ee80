"""The linear decoder with its batch norm and the likelihood of counts, in compiled loops: float32, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scvi.nn import FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.core._compiled import compiled, over_rows, threads
from ldvae_ext.module._likelihood import Counts


def head_inputs(layers: FCLayers, z: torch.Tensor, categories: Sequence[torch.Tensor]) -> torch.Tensor:
    """Latents, continuous covariates and one-hot levels: what the weights of a head are multiplied with.

    Parameters
    ----------
    layers
        The head.
    z
        Latents and continuous covariates, shape (cells, inputs).
    categories
        Codes of the categorical covariates, shape (cells, 1) each.
    """
    one_hot = [
        torch.nn.functional.one_hot(codes.squeeze(-1), n_levels).to(z.dtype)
        for n_levels, codes in zip(layers.n_cat_list, categories, strict=False)
        if n_levels > 1
    ]
    return torch.cat([z, *one_hot], dim=-1) if one_hot else z


def affine(layers: FCLayers, input_np: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A head as one affine map, ``input @ weight_pg + intercept_g``, batch norm folded in.

    In training the statistics of its batch norm are those of the minibatch. With mean m and covariance C of the inputs,
    output g has the mean ``W_g m`` and the variance ``v_g = W_g C W_g'``, so that the weights are
    ``F_g = gamma_g W_g / sqrt(v_g + eps)`` and the intercept is ``beta - F m``; gradients pass through m and C. Running
    statistics are updated as torch does it.

    Parameters
    ----------
    layers
        The head: one linear layer, with or without batch norm.
    input_np
        Its inputs, shape (cells, inputs).
    """
    linear, norm = layers.fc_layers[0][:2]
    weight_pg = linear.weight.t()
    if norm is None:
        return weight_pg, linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    if not norm.training:
        scale_g = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift_g = norm.running_mean if linear.bias is None else norm.running_mean - linear.bias
        return weight_pg * scale_g, norm.bias - shift_g * scale_g
    folded_pg, intercept_g, mean_g, variance_g = _Fold.apply(input_np, weight_pg, norm.weight, norm.bias, norm.eps)
    if linear.bias is not None:
        # It moves the mean and nothing else: its gradient is zero.
        mean_g, intercept_g = mean_g + linear.bias.detach(), intercept_g + 0 * linear.bias
    with torch.no_grad():
        norm.running_mean.lerp_(mean_g, norm.momentum)
        norm.running_var.lerp_(variance_g * (len(input_np) / (len(input_np) - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return folded_pg, intercept_g


def loss_of_head(
    counts: Counts,
    input_np: torch.Tensor,
    weight_pg: torch.Tensor,
    intercept_g: torch.Tensor,
    log_library_n: torch.Tensor,
    log_theta_cg: torch.Tensor | None = None,
    code_n: torch.Tensor | None = None,
    dropout: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each cell where the mean is the library times the softmax of an affine map.

    A negative binomial; a Poisson without ``log_theta_cg``, zero-inflated with ``dropout``.

    Parameters
    ----------
    counts
        The counts.
    input_np, weight_pg, intercept_g
        Inputs of the decoder, its weights and its intercept.
    log_library_n
        Logs of the library sizes, shape (cells,).
    log_theta_cg
        Logs of the inverse dispersions, shape (1 or number of codes, genes).
    code_n
        Row of ``log_theta_cg`` for each cell; the first if None.
    dropout
        Weights and intercept of the logits of zero inflation.

    Returns
    -------
    Shape (cells,), in nats.
    """
    dropout_weight_pg, dropout_intercept_g = (None, None) if dropout is None else dropout
    return _Head.apply(
        input_np,
        weight_pg,
        intercept_g,
        log_library_n,
        log_theta_cg,
        dropout_weight_pg,
        dropout_intercept_g,
        counts,
        code_n,
    )


class _Fold(Function):
    """See :func:`affine`."""

    @staticmethod
    def forward(
        ctx: Any,
        input_np: torch.Tensor,
        weight_pg: torch.Tensor,
        gamma_g: torch.Tensor,
        beta_g: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, ...]:
        from ldvae_ext.module import _head_kernels as loops

        input_np, weight_pg = input_np.detach().contiguous(), weight_pg.detach().contiguous()
        gamma_g, beta_g = gamma_g.detach().contiguous(), beta_g.detach().contiguous()
        centred_np, mean_p = torch.empty_like(input_np), input_np.new_empty(input_np.shape[1])
        spread_pg, folded_pg = torch.empty_like(weight_pg), torch.empty_like(weight_pg)
        inverse_g, intercept_g, mean_g, variance_g = (torch.empty_like(gamma_g) for _ in range(4))
        made = centred_np, mean_p, spread_pg, inverse_g, folded_pg, intercept_g, mean_g, variance_g
        given = input_np.numpy(), weight_pg.numpy(), gamma_g.numpy(), beta_g.numpy()
        loops.fold(*given, eps, *(value.numpy() for value in made))
        ctx.kept = [
            value.numpy() for value in (centred_np, mean_p, weight_pg, gamma_g, inverse_g, spread_pg, folded_pg)
        ]
        ctx.mark_non_differentiable(mean_g, variance_g)
        return folded_pg, intercept_g, mean_g, variance_g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_folded_pg: torch.Tensor, d_intercept_g: torch.Tensor, *_: torch.Tensor) -> Any:
        from ldvae_ext.module import _head_kernels as loops

        n_cells = len(ctx.kept[0])
        d_folded_pg, d_intercept_g = d_folded_pg.clone(), d_intercept_g.contiguous()
        d_input_np, d_weight_pg = d_folded_pg.new_empty(n_cells, len(d_folded_pg)), torch.empty_like(d_folded_pg)
        d_gamma_g = torch.empty_like(d_intercept_g)
        arrays = d_folded_pg, d_intercept_g, d_input_np, d_weight_pg, d_gamma_g
        loops.unfold(*ctx.kept, *(value.numpy() for value in arrays))
        return d_input_np, d_weight_pg, d_gamma_g, d_intercept_g, None


class _Head(Function):
    """See :func:`loss_of_head`; all gradients are made in the forward pass, for cells that weigh the same."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        *tensors, counts, code_n = given
        ctx.tensors = [None if value is None else value.detach().contiguous() for value in tensors]
        ctx.counts, ctx.code_n = counts, code_n
        loss_n, ctx.slopes = _run(ctx.tensors, counts, code_n, torch.ones(counts.n_cells))
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        slopes, ctx.slopes = ctx.slopes, None
        if slopes is not None and bool((weight_n == weight_n[0]).all()):
            return *(None if slope is None else slope.mul_(weight_n[0]) for slope in slopes), None, None
        # Cells that weigh differently, in the sums over cells too; or a second pass backward.
        _, slopes = _run(ctx.tensors, ctx.counts, ctx.code_n, weight_n.contiguous())
        return *slopes, None, None


def _run(
    tensors: Sequence[torch.Tensor | None], counts: Counts, code_n: torch.Tensor | None, weight_n: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Loss of each cell, and slopes of its weighted sum in what is given."""
    from ldvae_ext.module import _head_kernels as loops
    from ldvae_ext.module._kernels import N_TABLE, dispersion_tables

    arrays = [None if value is None else value.numpy() for value in tensors]
    input_np, weight_pg, intercept_g, log_library_n, log_theta_cg, dropout_weight_pg, dropout_intercept_g = arrays
    n_cells, n_genes = len(input_np), len(intercept_g)
    with compiled(n_threads=min(torch.get_num_threads(), n_cells)):

        def sums(like: np.ndarray) -> np.ndarray:
            return np.zeros((threads(), *like.shape), np.float32)

        loss_n, d_input_np, d_log_library_n = (
            np.empty(n_cells, np.float32),
            np.empty_like(input_np),
            np.empty(n_cells, np.float32),
        )
        d_weight_tpg, d_intercept_tg = sums(weight_pg), sums(intercept_g)
        cells = (input_np, weight_pg, intercept_g, np.exp(log_library_n), weight_n.numpy(), *counts.arrays)
        slopes = (loss_n, d_input_np, d_log_library_n, d_weight_tpg, d_intercept_tg)
        d_log_theta_cg = d_dropout_weight_pg = d_dropout_intercept_g = None
        if log_theta_cg is None:
            over_rows(loops.poisson_head, n_cells, *cells, *slopes)
        else:
            theta_cg = np.exp(log_theta_cg)
            codes = np.zeros(n_cells, np.int64) if code_n is None else code_n.numpy()
            tables = (
                *(np.empty_like(theta_cg) for _ in range(2)),
                *np.empty((2, len(theta_cg), N_TABLE + 1, n_genes), np.float32),
            )
            dispersion_tables(theta_cg, *tables)
            d_theta_tcg = sums(theta_cg)
            dispersions = (codes, theta_cg, *tables, d_theta_tcg)
            if dropout_weight_pg is None:
                over_rows(loops.negative_binomial_head, n_cells, *cells, *slopes, *dispersions)
            else:
                dropout = sums(dropout_weight_pg), sums(dropout_intercept_g)
                given = dropout_weight_pg, dropout_intercept_g
                over_rows(loops.zero_inflated_head, n_cells, *cells, *slopes, *dispersions, *given, *dropout)
                d_dropout_weight_pg, d_dropout_intercept_g = (_total(part) for part in dropout)
            d_log_theta_cg = torch.from_numpy(_total(d_theta_tcg).numpy() * theta_cg)
    return torch.from_numpy(loss_n), [
        torch.from_numpy(d_input_np),
        _total(d_weight_tpg),
        _total(d_intercept_tg),
        torch.from_numpy(d_log_library_n),
        d_log_theta_cg,
        d_dropout_weight_pg,
        d_dropout_intercept_g,
    ]


def _total(per_thread: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(per_thread[0] if len(per_thread) == 1 else per_thread.sum(axis=0))
