"""The linear decoder with its batch norm and the likelihood of counts, in compiled loops: float32, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi.nn import FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.core._compiled import compiled, over_rows
from ldvae_ext.module._likelihood import Counts
from ldvae_ext.module._sparse import is_plain

# Cells x genes below which a second thread costs more than it saves.
_PER_THREAD = 400_000


def is_known_head(layers: Any) -> bool:
    """Whether a head of the decoder is what :func:`affine` takes it for."""
    if (
        not is_plain(layers, FCLayers)
        or len(layers.fc_layers) != 1
        or any(layer is not None for layer in layers.fc_layers[0][2:])
    ):
        return False
    linear, norm = layers.fc_layers[0][:2]
    return is_plain(linear, torch.nn.Linear) and (norm is None or is_known_norm(norm))


def is_known_norm(norm: Any) -> bool:
    """Whether a layer is a batch norm whose running statistics are moving averages."""
    is_batch_norm = is_plain(norm, torch.nn.BatchNorm1d)
    return is_batch_norm and norm.affine and norm.track_running_stats and norm.momentum is not None


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
    update_norm(norm, mean_g, variance_g, len(input_np))
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


class Folded(NamedTuple):
    """A linear layer and its batch norm as one affine map, and what gradients need."""

    weight_pg: np.ndarray
    intercept_g: np.ndarray
    mean_g: np.ndarray
    variance_g: np.ndarray
    kept: tuple[np.ndarray, ...]


def fold(input_np: np.ndarray, weight_pg: np.ndarray, gamma_g: np.ndarray, beta_g: np.ndarray, eps: float) -> Folded:
    """See :func:`affine`; arrays of float32, contiguous."""
    from ldvae_ext.module import _head_kernels as loops

    n_inputs = input_np.shape[1]
    centred_np, mean_p = np.empty_like(input_np), np.empty(n_inputs, np.float32)
    spread_pg, folded_pg = np.empty((2, *weight_pg.shape), np.float32)
    inverse_g, intercept_g, mean_g, variance_g = np.empty((4, len(gamma_g)), np.float32)
    covariance_pp = np.zeros((n_inputs, n_inputs))
    made = covariance_pp, centred_np, mean_p, spread_pg, inverse_g, folded_pg, intercept_g, mean_g, variance_g
    loops.fold(input_np, weight_pg, gamma_g, beta_g, eps, *made)
    kept = centred_np, mean_p, weight_pg, gamma_g, inverse_g, spread_pg, folded_pg
    return Folded(folded_pg, intercept_g, mean_g, variance_g, kept)


def unfold(folded: Folded, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray) -> tuple[np.ndarray, ...]:
    """Gradients of :func:`fold` in inputs, weights and gamma; beta's is the intercept's. Overwrites ``d_weight_pg``."""
    from ldvae_ext.module import _head_kernels as loops

    d_input_np, d_raw_pg = np.empty_like(folded.kept[0]), np.empty_like(d_weight_pg)
    d_gamma_g, along_g, d_variance_g = np.empty((3, len(d_intercept_g)), np.float32)
    d_mean_p = np.empty(len(d_weight_pg), np.float32)
    between = np.empty((len(d_mean_p), len(d_mean_p)), np.float32), d_mean_p, along_g, d_variance_g
    loops.unfold(*folded.kept, d_weight_pg, d_intercept_g, *between, d_input_np, d_raw_pg, d_gamma_g)
    return d_input_np, d_raw_pg, d_gamma_g


@torch.no_grad()
def update_norm(norm: Any, mean_g: torch.Tensor, variance_g: torch.Tensor, n_cells: int) -> None:
    """Move the running statistics of a batch norm of which :func:`is_known_norm` holds, as torch does."""
    norm.running_mean.lerp_(mean_g, norm.momentum)
    norm.running_var.lerp_(variance_g * (n_cells / (n_cells - 1)), norm.momentum)
    norm.num_batches_tracked.add_(1)


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
        arrays = [value.detach().contiguous().numpy() for value in (input_np, weight_pg, gamma_g, beta_g)]
        ctx.folded = fold(arrays[0], arrays[1], arrays[2], arrays[3], eps)
        outputs = tuple(map(torch.from_numpy, ctx.folded[:4]))
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight_pg: torch.Tensor, d_intercept_g: torch.Tensor, *_: torch.Tensor) -> Any:
        slopes = unfold(ctx.folded, d_weight_pg.clone().numpy(), d_intercept_g.contiguous().numpy())
        return *map(torch.from_numpy, slopes), d_intercept_g, None


class _Head(Function):
    """See :func:`loss_of_head`; all gradients are made in the forward pass, for cells that weigh the same."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        *tensors, counts, code_n = given
        ctx.arrays = [None if value is None else value.detach().contiguous().numpy() for value in tensors]
        ctx.counts, ctx.code_n = counts, None if code_n is None else code_n.numpy()
        loss_n, ctx.slopes = run_head(ctx.arrays, counts, ctx.code_n)
        return torch.from_numpy(loss_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        slopes, ctx.slopes = ctx.slopes, None
        slopes = weighted_slopes(ctx.arrays, ctx.counts, ctx.code_n, slopes, weight_n.contiguous().numpy())
        return *(None if slope is None else torch.from_numpy(slope) for slope in slopes), None, None


def weighted_slopes(
    arrays: Sequence[Any],
    counts: Counts,
    code_n: np.ndarray | None,
    slopes: Sequence[Any] | None,
    weight_n: np.ndarray,
) -> Sequence[Any]:
    """Slopes of the weighted sum of losses, from those of their plain sum where cells weigh the same."""
    if slopes is None or not (weight_n == weight_n[0]).all():
        return run_head(arrays, counts, code_n, weight_n)[1]
    for slope in slopes:
        if slope is not None:
            slope *= weight_n[0]
    return slopes


def run_head(
    arrays: Sequence[Any],
    counts: Counts,
    code_n: np.ndarray | None,
    weight_n: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Any]]:
    """Loss of each cell, and slopes of its weighted sum in each of the arrays.

    Parameters
    ----------
    arrays
        Inputs, weights and intercept of the decoder, log library, log dispersions, weights and intercept of the logits of zero
        inflation, see :func:`loss_of_head`; float32, contiguous; None where there is none.
    counts, code_n
        See there.
    weight_n
        Weight of each cell; 1 if None.
    """
    from ldvae_ext.module import _head_kernels as loops
    from ldvae_ext.module._kernels import N_TABLE, dispersion_tables

    input_np, weight_pg, intercept_g, log_library_n, log_theta_cg, dropout_weight_pg, dropout_intercept_g = arrays
    n_cells, n_genes = len(input_np), len(intercept_g)
    weight_n = np.ones(n_cells, np.float32) if weight_n is None else weight_n
    n_threads = _threads_for(n_cells * n_genes)

    def sums(like: np.ndarray) -> np.ndarray:
        return np.zeros((n_threads, *like.shape), np.float32)

    loss_n, d_log_library_n = np.empty((2, n_cells), np.float32)
    d_input_np, d_weight_tpg, d_intercept_tg = np.empty_like(input_np), sums(weight_pg), sums(intercept_g)
    cells = (input_np, weight_pg, intercept_g, np.exp(log_library_n), weight_n, *counts.arrays)
    slopes = (loss_n, d_input_np, d_log_library_n, d_weight_tpg, d_intercept_tg)
    d_log_theta_cg = d_dropout_weight_pg = d_dropout_intercept_g = None
    with compiled(n_threads=n_threads):
        if log_theta_cg is None:
            over_rows(loops.poisson_head, n_cells, *cells, *slopes)
        else:
            theta_cg = np.exp(log_theta_cg)
            codes = np.zeros(n_cells, np.int64) if code_n is None else code_n
            inverse_cg, share_cg = np.empty((2, *theta_cg.shape), np.float32)
            log_gamma_cxg, digamma_cxg = np.empty((2, len(theta_cg), N_TABLE + 1, n_genes), np.float32)
            tables = inverse_cg, share_cg, log_gamma_cxg, digamma_cxg
            dispersion_tables(theta_cg, *tables)
            d_theta_tcg = sums(theta_cg)
            dispersions = (codes, theta_cg, *tables, d_theta_tcg)
            if dropout_weight_pg is None:
                over_rows(loops.negative_binomial_head, n_cells, *cells, *slopes, *dispersions)
            else:
                dropout = sums(dropout_weight_pg), sums(dropout_intercept_g)
                given = dropout_weight_pg, dropout_intercept_g
                over_rows(loops.zero_inflated_head, n_cells, *cells, *slopes, *dispersions, *given, *dropout)
                d_dropout_weight_pg, d_dropout_intercept_g = map(_total, dropout)
            d_log_theta_cg = _total(d_theta_tcg) * theta_cg
    of_heads = d_log_theta_cg, d_dropout_weight_pg, d_dropout_intercept_g
    return loss_n, [d_input_np, _total(d_weight_tpg), _total(d_intercept_tg), d_log_library_n, *of_heads]


def _threads_for(n_values: int) -> int:
    return max(1, min(torch.get_num_threads(), n_values // _PER_THREAD))


def _total(per_thread: np.ndarray) -> np.ndarray:
    return per_thread[0] if len(per_thread) == 1 else per_thread.sum(axis=0)
