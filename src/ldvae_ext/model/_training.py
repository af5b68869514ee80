"""Training, and what the warm-up of the KL term did to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from ldvae_ext._scvi import get_max_epochs_heuristic, merge_kwargs, parse_device_args
from ldvae_ext._validate import check_one_of, check_positive_int, warn
from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.choose import choose_for_training
from ldvae_ext.backends.loader import CountsSplitter
from ldvae_ext.backends.plan import uses_backend
from ldvae_ext.model._base import LDVAEBase

_WARMED_UP = 0.95


class TrainingMixin(LDVAEBase):
    """scvi-tools' training with a KL warm-up that can fit the number of epochs, and a word where it did not."""

    # Ends in an underscore to be saved with the model, as scvi-tools saves such attributes.
    kl_weight_: float | None = None

    @property
    def final_kl_weight(self) -> float:
        """Weight of the KL term in the last step of training; NaN if it is not known (untrained, or from LinearSCVI)."""
        return np.nan if self.kl_weight_ is None else self.kl_weight_

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        load_sparse_tensor: bool = False,
        batch_size: int = 128,
        early_stopping: bool = False,
        datasplitter_kwargs: dict | None = None,
        plan_config: Any = None,
        plan_kwargs: Any = None,
        datamodule: Any = None,
        trainer_config: Any = None,
        *,
        kl_warmup: Literal["auto"] | int | None = None,
        backend: Literal["auto", "numba", "torch", "scvi"] = "auto",
        **trainer_kwargs: Any,
    ) -> Any:
        """Train the model: :meth:`scvi.model.LinearSCVI.train` with two more arguments, ``kl_warmup`` and ``backend``.

        Parameters
        ----------
        max_epochs
            Number of epochs. If None, scvi-tools' heuristic: 400 up to 20,000 cells, fewer beyond.
        accelerator, devices, train_size, validation_size, shuffle_set_split, load_sparse_tensor, batch_size
            As in scvi-tools.
        early_stopping, datasplitter_kwargs, plan_config, plan_kwargs, trainer_config, **trainer_kwargs
            As in scvi-tools.
        datamodule
            As in scvi-tools. The prior of a latent library size is computed from its cells before the first epoch.
        kl_warmup
            Number of epochs over which the weight of the KL term rises from 0 to 1. ``"auto"``: half of
            ``max_epochs``. None leaves LinearSCVI's default of 400 epochs, which a shorter training never completes:
            then the latents carry more information than the ELBO pays for, and a warning says so.
        backend
            How a step is computed, with the same minibatches, random draws and results but for rounding: ``"scvi"`` as
            scvi-tools does; ``"torch"`` with gamma functions of non-zero counts only; ``"numba"`` in compiled loops over sparse
            counts, on a CPU. ``"auto"``: the last of these that the network and the device allow.

        Raises
        ------
        ValueError
            If ``kl_warmup`` comes together with a warm-up in ``plan_kwargs``, or the network does not allow ``backend``.
        """
        if datamodule is None and self.adata is None:
            msg = "This model has no AnnData to train on: give `datamodule`."
            raise ValueError(msg)
        max_epochs = self._n_epochs(max_epochs, datamodule)
        plan_kwargs = merge_kwargs(plan_config, plan_kwargs, name="plan")
        if kl_warmup is not None:
            given = [name for name in ("n_epochs_kl_warmup", "n_steps_kl_warmup") if name in plan_kwargs]
            if given:
                msg = f"Give either `kl_warmup` ({kl_warmup!r}) or `plan_kwargs[{given[0]!r}]` ({plan_kwargs[given[0]]!r})."
                raise ValueError(msg)
            if isinstance(kl_warmup, str):
                check_one_of("kl_warmup", kl_warmup, ("auto",))
                kl_warmup = max(1, max_epochs // 2)
            check_positive_int("kl_warmup", kl_warmup)
            plan_kwargs["n_epochs_kl_warmup"] = int(kl_warmup)
        if datamodule is not None and not self.is_trained_:
            self._start_from(datamodule)
        trainer_options = merge_kwargs(trainer_config, trainer_kwargs, name="trainer")
        chosen = self._backend_of(backend, accelerator, devices, plan_kwargs, trainer_options)
        if uses_backend(self._training_plan_cls):
            plan_kwargs["backend"] = chosen
        with self._axes_of_other_loadings_ended(), self._splitter_of(chosen.name):
            result = super().train(
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                train_size=train_size,
                validation_size=validation_size,
                shuffle_set_split=shuffle_set_split,
                load_sparse_tensor=load_sparse_tensor,
                batch_size=batch_size,
                early_stopping=early_stopping,
                datasplitter_kwargs=datasplitter_kwargs,
                plan_kwargs=plan_kwargs,
                datamodule=datamodule,
                trainer_config=trainer_config,
                **trainer_kwargs,
            )
        self._note_kl_weight(warmup_given=kl_warmup is not None)
        return result

    def _backend_of(
        self, backend: str, accelerator: str, devices: Any, plan_kwargs: dict[str, Any], trainer_kwargs: dict[str, Any]
    ) -> Backend:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scvi-tools warns once more
            _, _, device = parse_device_args(accelerator=accelerator, devices=devices, return_device="torch")
        device_type = torch.device(device).type
        return choose_for_training(
            self.module, backend, device_type, self._training_plan_cls, plan_kwargs, trainer_kwargs
        )

    @contextmanager
    def _splitter_of(self, backend: str) -> Iterator[None]:
        """Sparse minibatches, unless something else splits the cells."""
        is_ours = backend != "scvi" and "_data_splitter_cls" not in self.__dict__
        if is_ours:
            self._data_splitter_cls = CountsSplitter
        try:
            yield
        finally:
            if is_ours:
                del self._data_splitter_cls

    @contextmanager
    def _axes_of_other_loadings_ended(self) -> Iterator[None]:
        """Rotation and order belong to the loadings before: they end if these are others afterwards, however that came."""
        before = self.module.get_loadings() if self.rotation_ is not None or self.is_ordered_ else None
        try:
            yield
        finally:
            if before is not None and not np.array_equal(before, self.module.get_loadings()):
                if self.rotation_ is not None:
                    warn(
                        "The rotation that was in force belonged to the network before this training; `rotate` finds a new "
                        "one."
                    )
                self.rotation_, self.is_ordered_ = None, False

    def _n_epochs(self, max_epochs: int | None, datamodule: Any) -> int:
        if max_epochs is not None:
            return max_epochs
        cells = self.adata if datamodule is None else datamodule
        n_obs = getattr(cells, "n_obs", None)
        if n_obs is None:
            msg = "`max_epochs` is needed, since `datamodule` has no `n_obs`."
            raise ValueError(msg)
        return get_max_epochs_heuristic(n_obs)

    def _note_kl_weight(self, *, warmup_given: bool) -> None:
        plan = self.trainer.lightning_module
        # What the last training step multiplied with; the plan's own property already speaks of the next epoch.
        weight = plan.loss_kwargs.get("kl_weight")
        self.kl_weight_ = None if weight is None else float(weight)
        if self.kl_weight_ is None:  # a loss of a subclass that takes none
            return
        if self.kl_weight_ >= _WARMED_UP:
            return
        remedy = (
            "A shorter `kl_warmup` than the epochs that were run reaches weight 1."
            if warmup_given and plan.max_kl_weight >= _WARMED_UP
            else "`train(kl_warmup='auto')` reaches weight 1 at half of `max_epochs`."
            if plan.max_kl_weight >= _WARMED_UP
            else f"`max_kl_weight={plan.max_kl_weight}` was asked for; with 1 it would be the ELBO."
        )
        warn(
            f"Training ended with a KL weight of {self.kl_weight_:.2f}: the KL of a latent, and the order by it, belong to "
            f"another objective than the ELBO. {remedy}"
        )
