"""The training plan: scvi-tools' own, with the loss of a backend and metrics that are gathered over an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scvi.module.base import LossOutput
from scvi.train import TrainingPlan

from ldvae_ext._scvi import FastHookNames
from ldvae_ext._steps import ShortSteps, end_training, is_logging_step, is_on_one_cpu, skip_graph_capture_check
from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.divergence import check_loss, check_step, check_weights, divergence_explained
from ldvae_ext.backends.layers import store_weights
from ldvae_ext.backends.loader import CountsSplitter


class GatheringPlan(FastHookNames, TrainingPlan):
    """``scvi.train.TrainingPlan`` with the loss of a backend, and with metrics that are logged once in an epoch.

    Names and values of the metrics are scvi-tools'. Each is a mean over the epoch, which Lightning would update at each step.
    Values that are logged at steps (``on_step=True``, the KL weight) are logged at the same steps as in scvi-tools.

    Parameters
    ----------
    *args, **kwargs
        As in ``scvi.train.TrainingPlan``.
    backend
        Backend of the loss; the network's forward pass if None.
    is_interrupted
        Function that returns True if the training is to end after the step; never if None.
    decoder_penalty
        Weights of the penalties on the loadings, ``l1`` and ``l2``; no penalty if None. It is added to the loss that is
        minimised, and is not part of the metrics.
    """

    def __init__(
        self,
        *args: Any,
        backend: Backend | None = None,
        is_interrupted: Callable[[], bool] | None = None,
        decoder_penalty: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._backend, self._decoder_penalty = backend, decoder_penalty
        self._is_interrupted = is_interrupted
        self._short_steps: ShortSteps | None = None
        self._gathered: dict[str, _Sums] = {"train": _Sums(), "validation": _Sums()}

    @property
    def backend_name(self) -> str:
        """Name of the backend of the loss."""
        return "scvi" if self._backend is None else self._backend.name

    def configure_optimizers(self) -> dict[str, Any]:
        """scvi-tools' optimizer; on a CPU without its check for a CUDA graph at each step."""
        config = super().configure_optimizers()
        skip_graph_capture_check(config["optimizer"])
        return config

    def on_train_start(self) -> None:
        """Store weights as the backend reads them, and skip Lightning's hooks if nothing is attached to them."""
        if not uses_backend(type(self)) or not is_on_one_cpu(self.trainer):
            return
        # LBFGS views gradients as one vector, which is row by row.
        has_columns = not any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in self.trainer.optimizers)
        if self._backend is not None and self._backend.stores_by_columns and has_columns:
            store_weights(self.module, by_columns=True, optimizers=self.trainer.optimizers)
        data = self.trainer.datamodule
        stays_as_loaded = getattr(data, "loads_minibatches", False) or (
            isinstance(data, CountsSplitter) and not data.load_sparse_tensor
        )
        if stays_as_loaded and self.on_epoch and not self.on_step and ShortSteps.fit(self.trainer):
            self._short_steps = ShortSteps(self.trainer)
            self._short_steps.start()

    def on_train_end(self) -> None:
        """As in scvi-tools; an error if the weights are NaN or infinite."""
        if self._short_steps is not None:
            self._short_steps.end()
            self._short_steps = None
        super().on_train_end()
        check_weights(self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """As in scvi-tools; an error if the loss is NaN or infinite.

        Parameters
        ----------
        batch, batch_idx
            A minibatch and its number.

        Raises
        ------
        FloatingPointError
            If the training has diverged.
        """
        with divergence_explained(self):
            loss = self._training_loss(batch, batch_idx)
        # After the loss: a training that is about to end logs each step, which a short step cannot.
        if self._is_interrupted is not None and self._is_interrupted():
            end_training(self.trainer)
        if self._decoder_penalty is not None:
            loss = loss + self.module.decoder_penalty(**self._decoder_penalty)
        check_step(self, loss)
        return loss

    def _training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.on_step or not self.on_epoch:
            return super().training_step(batch, batch_idx)
        if "kl_weight" in self.loss_kwargs:
            self.loss_kwargs["kl_weight"] = self.kl_weight
            if self.trainer.is_last_batch or is_logging_step(self.trainer):
                self.log("kl_weight", self.loss_kwargs["kl_weight"], on_step=True, on_epoch=False)
        losses = self._losses(batch)
        self._gather("train", losses, is_last=self.trainer.is_last_batch)
        if losses.extra_metrics:
            self.prepare_scib_autotune(losses.extra_metrics, "training")
        return losses.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """As in scvi-tools; an error if posteriors are NaN or infinite.

        Parameters
        ----------
        batch, batch_idx
            A minibatch and its number.

        Raises
        ------
        FloatingPointError
            If the training has diverged.
        """
        with divergence_explained(self):
            if self.on_step or not self.on_epoch:
                return super().validation_step(batch, batch_idx)
            losses = self._losses(batch)
        is_check = self.trainer.sanity_checking
        n_batches = (self.trainer.num_sanity_val_batches if is_check else self.trainer.num_val_batches)[0]
        self._gather("validation", losses, is_last=batch_idx + 1 == n_batches)
        if losses.extra_metrics:
            self.prepare_scib_autotune(losses.extra_metrics, "validation")

    def on_train_epoch_end(self) -> None:
        """Log the metrics of an epoch that ended early."""
        self._log_gathered("train")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of a validation whose length was not known."""
        self._log_gathered("validation")

    def _losses(self, minibatch: Any) -> LossOutput:
        if self._backend is None or set(self.loss_kwargs) - {"kl_weight"}:
            _, _, losses = self.forward(minibatch, loss_kwargs=self.loss_kwargs)
            return losses
        return self._backend.loss(self.module, minibatch, self.loss_kwargs.get("kl_weight", 1.0))

    def _gather(self, mode: str, losses: Any, *, is_last: bool) -> None:
        sums = self._gathered[mode]
        sums.add(losses)
        if is_last:
            self._log_gathered(mode)

    def _log_gathered(self, mode: str) -> None:
        sums, self._gathered[mode] = self._gathered[mode], _Sums()
        if sums.n_batches == 0:
            return
        if mode == "train":
            check_loss(self, sums.loss)
        options = {"on_step": False, "on_epoch": True, "sync_dist": self.use_sync_dist, "batch_size": sums.n_obs}
        self.log(f"{mode}_loss", sums.loss / sums.n_obs, prog_bar=mode == "train", **options)
        metrics = self.train_metrics if mode == "train" else self.val_metrics
        metrics[f"elbo_{mode}"].update(
            reconstruction_loss=sums.reconstruction,
            kl_local=sums.kl_local,
            kl_global=sums.kl_global,
            n_obs_minibatch=sums.n_obs,
        )
        for metric in metrics.values():
            if hasattr(metric, "n_batches"):
                metric.n_batches += sums.n_batches - 1
        self.log_dict(metrics, **options)
        for name, value in sums.extra.items():
            self.log(f"{name}_{mode}", value / sums.n_obs, **options)


def uses_backend(plan_cls: type) -> bool:
    """True if a class of training plans takes the loss of its steps from a backend.

    Parameters
    ----------
    plan_cls
        The class.
    """
    return (
        issubclass(plan_cls, GatheringPlan)
        and plan_cls.training_step is GatheringPlan.training_step
        and plan_cls.validation_step is GatheringPlan.validation_step
        and plan_cls.forward is TrainingPlan.forward
    )


class _Sums:
    """Sums of the metrics over the minibatches of an epoch."""

    def __init__(self) -> None:
        self.n_obs = self.n_batches = 0
        self.loss: Any = 0.0
        self.reconstruction: Any = 0.0
        self.kl_local: Any = 0.0
        self.kl_global: Any = 0.0
        self.extra: dict[str, Any] = {}

    @torch.no_grad()
    def add(self, losses: Any) -> None:
        """Add a minibatch."""
        n_obs = losses.n_obs_minibatch
        self.n_obs += n_obs
        self.n_batches += 1
        self.loss = self.loss + losses.loss.detach() * n_obs
        self.reconstruction = self.reconstruction + losses.reconstruction_loss_sum.detach()
        self.kl_local = self.kl_local + losses.kl_local_sum.detach()
        self.kl_global = self.kl_global + losses.kl_global_sum.detach()
        for name, value in losses.extra_metrics.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                self.extra[name] = self.extra.get(name, 0.0) + value * n_obs
