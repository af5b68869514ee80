"""Running statistics of the decoder's batch norm: how old they are, and a fresh look at them."""

from __future__ import annotations

from typing import Any

import torch
from anndata import AnnData
from scvi.nn import FCLayers

from ldvae_ext.model._tasks import TasksMixin

# Of scvi-tools' layers; that of a frozen one is set to 0, after it has moved.
_MOMENTUM = 0.01


class BatchNormMixin(TasksMixin):
    """What batch norm's running statistics are worth after a short training."""

    # Ends in an underscore to be saved with the model, as scvi-tools saves such attributes.
    batch_norm_is_recalibrated_: bool = False

    @property
    def batch_norm_initial_share(self) -> float:
        """Share of the running statistics of the decoder that are still their initial values (mean 0, variance 1).

        They move by 1 % with each minibatch, so that after n of them ``0.99^n`` is left: half after 69 minibatches, a
        thousandth after 690. 0 without batch norm in the decoder, or after :meth:`recalibrate_batch_norm` kept new ones.
        """
        batch_norm = self.module.decoder.factor_regressor.fc_layers[0][1]
        if batch_norm is None or self.batch_norm_is_recalibrated_:
            return 0.0
        return float((1 - _MOMENTUM) ** int(batch_norm.num_batches_tracked))

    def recalibrate_batch_norm(
        self,
        adata: AnnData | None = None,
        *,
        indices: Any = None,
        validation_indices: Any = None,
        batch_size: int | None = None,
    ) -> dict[str, float | bool]:
        """Estimate the running statistics of the decoder's batch norm anew, and keep them if held-out cells gain.

        The statistics become those of all given cells, of one latent drawn from each posterior (seeded: the same at each
        call). That changes loadings and intercepts. After a short training it can make them better or much worse, so they
        are kept only if the negative log-likelihood of held-out cells at their posterior means falls.

        Parameters
        ----------
        adata
            Cells; the model's own if None.
        indices
            Cells that the statistics are of; those that the model was trained on if None.
        validation_indices
            Cells that decide; those that were held out in training if None.
        batch_size
            Cells per minibatch.

        Returns
        -------
        ``before`` and ``after``: nats per held-out cell, lower is better; ``kept``: whether the new ones were kept.

        Raises
        ------
        ValueError
            If the decoder has no batch norm, one that query mapping has frozen, or no cells were held out, or
            those of another AnnData are not named.
        """
        decoder = self.module.decoder
        heads = [decoder.factor_regressor, *([decoder.px_dropout_decoder] if decoder.has_dropout else [])]
        if heads[0].fc_layers[0][1] is None:
            msg = "The decoder of this model has no batch norm."
            raise ValueError(msg)
        if (
            getattr(self, "query_", None)
            and self.module.learnable is not None
            and heads[0].fc_layers[0][1].momentum == 0
        ):
            msg = "The batch norm of this model belongs to a reference that query mapping keeps as it is."
            raise ValueError(msg)
        if adata is not None and adata is not self.adata and (indices is None or validation_indices is None):
            msg = "`indices` and `validation_indices` are needed for an AnnData other than the model's."
            raise ValueError(msg)
        indices = getattr(self, "train_indices_", None) if indices is None else indices
        held_out = getattr(self, "validation_indices_", None) if validation_indices is None else validation_indices
        if held_out is None or len(held_out) == 0:
            msg = "`validation_indices` are needed, since training held no cells out."
            raise ValueError(msg)

        def error() -> float:
            loss = self.get_reconstruction_error(adata, held_out, batch_size, use_posterior_mean=True)
            return float(loss["reconstruction_loss"])

        before = error()
        old = [_statistics(head) for head in heads]
        for head, new in zip(heads, self._fresh_statistics(heads, adata, indices, batch_size), strict=True):
            _set_statistics(head, *new)
        after = error()
        if not after < before:
            for head, values in zip(heads, old, strict=True):
                _set_statistics(head, *values)
        self.batch_norm_is_recalibrated_ = self.batch_norm_is_recalibrated_ or after < before
        return {"before": before, "after": after, "kept": after < before}

    @torch.inference_mode()
    def _fresh_statistics(
        self, heads: list[FCLayers], adata: AnnData | None, indices: Any, batch_size: int | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and variance of what each head's batch norm is fed, over cells; shape (genes,) each."""
        sums: list[Any] = [0.0 for _ in heads]
        squares: list[Any] = [0.0 for _ in heads]
        seen: list[torch.Tensor] = []

        def take(_layer: Any, inputs: tuple[torch.Tensor]) -> None:
            seen.append(inputs[0].double())

        hooks = [head.fc_layers[0][1].register_forward_pre_hook(take) for head in heads]
        n_cells = 0
        try:
            with self.module.evaluating(), torch.random.fork_rng():
                torch.manual_seed(0)
                for tensors in self._batches_of(adata, indices, batch_size, None, {}):
                    seen.clear()
                    self.module.forward(tensors, compute_loss=False)
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
