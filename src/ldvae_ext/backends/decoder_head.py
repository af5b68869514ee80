"""The linear decoder with its batch norm and the likelihood of counts, in compiled loops: float32, on a CPU.

Functions on tensors are differentiable; those on arrays call the loops, and are shared with the fused step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scvi.nn import FCLayers
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ldvae_ext.backends.batch_norm import fold_batch_norm, update_running_statistics
from ldvae_ext.backends.counts import Counts
from ldvae_ext.kernels.threads import compiled, over_rows, threads

# Cells x genes below which a second thread costs more than it saves.
_PER_THREAD = 400_000


def affine_head(layers: FCLayers, input_np: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and intercept of a head as one affine map, ``input @ weight_pg + intercept_g``, batch norm folded in.

    In training the statistics of its batch norm are those of the minibatch. With mean m and covariance C of the inputs,
    output g has the mean ``W_g m`` and the variance ``v_g = W_g C W_g'``, so that the weights are
    ``F_g = gamma_g W_g / sqrt(v_g + eps)`` and the intercept is ``beta - F m``; gradients pass through m and C. Running
    statistics are updated as torch does it.

    Parameters
    ----------
    layers
        The head; see :func:`ldvae_ext.backends.layers.is_linear_head`.
    input_np
        Its inputs, shape (cells, inputs).
    """
    linear, norm = layers.fc_layers[0][:2]
    if norm is None or not norm.training:
        return fold_batch_norm(linear, norm)
    folded_pg, intercept_g, mean_g, variance_g = _FoldBatchNorm.apply(
        input_np, linear.weight.t(), norm.weight, norm.bias, norm.eps
    )
    if linear.bias is not None:
        # The bias moves the mean alone, so that its gradient is zero.
        mean_g, intercept_g = mean_g + linear.bias.detach(), intercept_g + 0 * linear.bias
    update_running_statistics(norm, mean_g, variance_g, len(input_np))
    return folded_pg, intercept_g


def head_loss(
    counts: Counts,
    input_np: torch.Tensor,
    weight_pg: torch.Tensor,
    intercept_g: torch.Tensor,
    log_library_n: torch.Tensor,
    log_theta_cg: torch.Tensor | None = None,
    code_n: torch.Tensor | None = None,
    dropout: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each cell whose mean is the library times the softmax of an affine map.

    A Poisson without ``log_theta_cg``, else a negative binomial, zero-inflated with ``dropout``.

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
    return _HeadLoss.apply(
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
    """A linear layer and its batch norm in training as one affine map, and the arrays that its gradients need."""

    weight_pg: np.ndarray
    intercept_g: np.ndarray
    mean_g: np.ndarray
    variance_g: np.ndarray
    kept: tuple[np.ndarray, ...]


def fold_in_training(
    input_np: np.ndarray, weight_pg: np.ndarray, gamma_g: np.ndarray, beta_g: np.ndarray, eps: float
) -> Folded:
    """Forward pass of :func:`affine_head` in training; arrays are float32 and contiguous."""
    from ldvae_ext.kernels import batch_norm as loops

    n_inputs = input_np.shape[1]
    centred_np, mean_p = np.empty_like(input_np), np.empty(n_inputs, np.float32)
    spread_pg, folded_pg = np.empty((2, *weight_pg.shape), np.float32)
    inverse_g, intercept_g, mean_g, variance_g = np.empty((4, len(gamma_g)), np.float32)
    covariance_pp = np.zeros((n_inputs, n_inputs))
    made = covariance_pp, centred_np, mean_p, spread_pg, inverse_g, folded_pg, intercept_g, mean_g, variance_g
    loops.fold_batch_norm(input_np, weight_pg, gamma_g, beta_g, eps, *made)
    kept = centred_np, mean_p, weight_pg, gamma_g, inverse_g, spread_pg, folded_pg
    return Folded(folded_pg, intercept_g, mean_g, variance_g, kept)


def fold_in_training_backward(
    folded: Folded, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Gradients of :func:`fold_in_training` in inputs, weights and gamma; overwrites ``d_weight_pg``.

    The gradient in beta equals that of the intercept.
    """
    from ldvae_ext.kernels import batch_norm as loops

    d_input_np, d_raw_pg = np.empty_like(folded.kept[0]), np.empty_like(d_weight_pg)
    d_gamma_g, along_g, d_variance_g = np.empty((3, len(d_intercept_g)), np.float32)
    d_mean_p = np.empty(len(d_weight_pg), np.float32)
    between = np.empty((len(d_mean_p), len(d_mean_p)), np.float32), d_mean_p, along_g, d_variance_g
    loops.fold_batch_norm_backward(*folded.kept, d_weight_pg, d_intercept_g, *between, d_input_np, d_raw_pg, d_gamma_g)
    return d_input_np, d_raw_pg, d_gamma_g


class _FoldBatchNorm(Function):
    """See :func:`affine_head`."""

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
        ctx.folded = fold_in_training(arrays[0], arrays[1], arrays[2], arrays[3], eps)
        outputs = tuple(map(torch.from_numpy, ctx.folded[:4]))
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight_pg: torch.Tensor, d_intercept_g: torch.Tensor, *_: torch.Tensor) -> Any:
        gradients = fold_in_training_backward(
            ctx.folded, d_weight_pg.clone().numpy(), d_intercept_g.contiguous().numpy()
        )
        return *map(torch.from_numpy, gradients), d_intercept_g, None


class _HeadLoss(Function):
    """See :func:`head_loss`; all gradients are computed in the forward pass, for cells of equal weight."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        *tensors, counts, code_n = given
        ctx.arrays = [None if value is None else value.detach().contiguous().numpy() for value in tensors]
        ctx.counts, ctx.code_n = counts, None if code_n is None else code_n.numpy()
        loss_n, ctx.gradients = head_gradients(ctx.arrays, counts, ctx.code_n)
        return torch.from_numpy(loss_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_n: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        gradients = weighted_gradients(ctx.arrays, ctx.counts, ctx.code_n, gradients, weight_n.contiguous().numpy())
        return *(None if gradient is None else torch.from_numpy(gradient) for gradient in gradients), None, None


def weighted_gradients(
    arrays: Sequence[Any],
    counts: Counts,
    code_n: np.ndarray | None,
    gradients: Sequence[Any] | None,
    weight_n: np.ndarray,
) -> Sequence[Any]:
    """Gradients of the weighted sum of losses; those of the plain sum are scaled if all cells have the same weight."""
    if gradients is None or not (weight_n == weight_n[0]).all():
        return head_gradients(arrays, counts, code_n, weight_n)[1]
    for gradient in gradients:
        if gradient is not None:
            gradient *= weight_n[0]
    return gradients


# As on tensors, an overflow is an infinite loss, which ends the training with an error, and no warning before it.
@np.errstate(over="ignore", invalid="ignore")
def head_gradients(
    arrays: Sequence[Any],
    counts: Counts,
    code_n: np.ndarray | None,
    weight_n: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Any]]:
    """Loss of each cell, and gradients of the weighted sum in each of the arrays.

    Parameters
    ----------
    arrays
        Inputs, weights and intercept of the decoder, log library, log dispersions, weights and intercept of the logits of zero
        inflation, see :func:`head_loss`; float32, contiguous; None where there is none.
    counts, code_n
        See there.
    weight_n
        Weight of each cell; 1 if None.
    """
    from ldvae_ext.kernels import decoder_head as loops
    from ldvae_ext.kernels.likelihood import N_TABLE, dispersion_tables

    input_np, weight_pg, intercept_g, log_library_n, log_theta_cg, dropout_weight_pg, dropout_intercept_g = arrays
    n_cells, n_genes = len(input_np), len(intercept_g)
    weight_n = np.ones(n_cells, np.float32) if weight_n is None else weight_n
    n_threads = _threads_for(n_cells * n_genes)

    def sums(like: np.ndarray) -> np.ndarray:
        return np.zeros((n_threads, *like.shape), np.float32)

    loss_n, d_log_library_n = np.empty((2, n_cells), np.float32)
    d_input_np, d_weight_tpg, d_intercept_tg = np.empty_like(input_np), sums(weight_pg), sums(intercept_g)
    cells = (input_np, weight_pg, intercept_g, np.exp(log_library_n), weight_n, *counts.arrays)
    gradients = (loss_n, d_input_np, d_log_library_n, d_weight_tpg, d_intercept_tg)
    d_log_theta_cg = d_dropout_weight_pg = d_dropout_intercept_g = None
    with compiled(n_threads=n_threads):
        if log_theta_cg is None:
            over_rows(loops.poisson_head, n_cells, *cells, *gradients)
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
                over_rows(loops.negative_binomial_head, n_cells, *cells, *gradients, *dispersions)
            else:
                dropout = sums(dropout_weight_pg), sums(dropout_intercept_g)
                given = dropout_weight_pg, dropout_intercept_g
                over_rows(loops.zero_inflated_head, n_cells, *cells, *gradients, *dispersions, *given, *dropout)
                d_dropout_weight_pg, d_dropout_intercept_g = map(_total, dropout)
            d_log_theta_cg = _total(d_theta_tcg) * theta_cg
    of_heads = d_log_theta_cg, d_dropout_weight_pg, d_dropout_intercept_g
    return loss_n, [d_input_np, _total(d_weight_tpg), _total(d_intercept_tg), d_log_library_n, *of_heads]


def _threads_for(n_values: int) -> int:
    return max(1, min(threads(), n_values // _PER_THREAD))


def _total(per_thread: np.ndarray) -> np.ndarray:
    return per_thread[0] if len(per_thread) == 1 else per_thread.sum(axis=0)
