"""Running statistics of the decoder's batch norm, estimated anew."""

from __future__ import annotations

from typing import Any

import torch
from anndata import AnnData
from scvi.nn import FCLayers

from ldvae_ext._validate import cell_positions
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import given_cells
from ldvae_ext.model._stock import minibatches_of
from ldvae_ext.model._tasks import reconstruction_error_at_mean


def recalibrate_batch_norm(
    model: LDVAEBase, adata: AnnData | None, indices: Any, validation_indices: Any, batch_size: int | None
) -> dict[str, float | bool]:
    """See :meth:`ldvae_ext.model.LDVAE.recalibrate_batch_norm`."""
    decoder = model.module.decoder
    heads = [decoder.factor_regressor, *([decoder.px_dropout_decoder] if decoder.has_dropout else [])]
    if heads[0].fc_layers[0][1] is None:
        msg = "The decoder of this model has no batch norm."
        raise ValueError(msg)
    if model.query_ and model.module.learnable is not None and heads[0].fc_layers[0][1].momentum == 0:
        msg = "The batch norm of this model belongs to a reference that query mapping keeps as it is."
        raise ValueError(msg)
    if adata is not None and adata is not model.adata and (indices is None or validation_indices is None):
        msg = "`indices` and `validation_indices` are needed for an AnnData other than the model's."
        raise ValueError(msg)
    indices = getattr(model, "train_indices_", None) if indices is None else indices
    held_out = getattr(model, "validation_indices_", None) if validation_indices is None else validation_indices
    n_cells = given_cells(model, adata).n_obs
    if len(cell_positions(indices, n_cells)) == 0:
        msg = "`indices` must choose at least one cell; got none."
        raise ValueError(msg)
    if held_out is not None:
        cell_positions(held_out, n_cells, argument="validation_indices")
    if held_out is None or len(held_out) == 0:
        msg = "`validation_indices` are needed, since training held no cells out."
        raise ValueError(msg)

    def error() -> float:
        loss = reconstruction_error_at_mean(model, adata, held_out, batch_size)
        return float(loss.mean())

    before = error()
    old = [_statistics(head) for head in heads]
    for head, new in zip(heads, _fresh_statistics(model, heads, adata, indices, batch_size), strict=True):
        _set_statistics(head, *new)
    after = error()
    if not after < before:
        for head, values in zip(heads, old, strict=True):
            _set_statistics(head, *values)
    model.batch_norm_is_recalibrated_ = model.batch_norm_is_recalibrated_ or after < before
    return {"before": before, "after": after, "kept": after < before}


@torch.inference_mode()
def _fresh_statistics(
    model: LDVAEBase, heads: list[FCLayers], adata: AnnData | None, indices: Any, batch_size: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance over cells of the input of each head's batch norm; shape (genes,) each."""
    sums: list[Any] = [0.0 for _ in heads]
    squares: list[Any] = [0.0 for _ in heads]
    seen: list[torch.Tensor] = []

    def take(_layer: Any, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0].double())

    hooks = [head.fc_layers[0][1].register_forward_pre_hook(take) for head in heads]
    n_cells = 0
    try:
        with model.module.evaluating(), torch.random.fork_rng():
            torch.manual_seed(0)
            for tensors in minibatches_of(model, adata, indices, batch_size, None, {}):
                seen.clear()
                model.module.forward(tensors, compute_loss=False)
                for i, fed in enumerate(seen):
                    sums[i] = sums[i] + fed.sum(dim=0)
                    squares[i] = squares[i] + fed.square().sum(dim=0)
                n_cells += len(seen[0])
    finally:
        for hook in hooks:
            hook.remove()
    means = [total / n_cells for total in sums]
    return [(mean, square / n_cells - mean.square()) for mean, square in zip(means, squares, strict=True)]


def _statistics(head: FCLayers) -> tuple[torch.Tensor, torch.Tensor]:
    batch_norm = head.fc_layers[0][1]
    return batch_norm.running_mean.clone(), batch_norm.running_var.clone()


@torch.no_grad()
def _set_statistics(head: FCLayers, mean: torch.Tensor, variance: torch.Tensor) -> None:
    batch_norm = head.fc_layers[0][1]
    batch_norm.running_mean.copy_(mean)
    batch_norm.running_var.copy_(variance)
