"""Training, and the effect of the warm-up of the KL term."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from anndata import AnnData

from ldvae_ext._scvi import get_max_epochs_heuristic, merge_kwargs, parse_device_args, splitting_cells_by
from ldvae_ext._validate import check_one_of, check_positive_int, warn
from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.choose import choose_for_training
from ldvae_ext.backends.loader import CountsSplitter
from ldvae_ext.backends.plan import uses_backend
from ldvae_ext.core._views import check_rotatable
from ldvae_ext.model._arguments import check_mapping, check_plan, check_shares, penalties
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._batch_norm import recalibrate_batch_norm
from ldvae_ext.model._collection import sparse_minibatches
from ldvae_ext.model._interrupts import Interruption
from ldvae_ext.model._ordered import check_can_be_ordered, check_epochs, check_not_decided, order_factors
from ldvae_ext.model._resuming import Resumption, arguments_of_training
from ldvae_ext.model._threads import set_up_for
from ldvae_ext.module._query import QueryTrainingPlan

_WARMED_UP = 0.95
# Momentum of scvi-tools' batch norms; a frozen one has 0, after it has moved.
_MOMENTUM = 0.01


class TrainingMixin(LDVAEBase):
    """scvi-tools' training with a KL warm-up that fits the number of epochs, and a warning if it does not."""

    # Ends in an underscore to be saved with the model, as scvi-tools saves such attributes.
    batch_norm_is_recalibrated_: bool = False

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
        evaluation_mode: bool = False,
        decoder_penalty: float | Mapping[str, float] | None = None,
        resume: str | Path | None = None,
        **trainer_kwargs: Any,
    ) -> Any:
        """Train the model: :meth:`scvi.model.LinearSCVI.train` with ``kl_warmup``, ``backend``, ``evaluation_mode``, ``decoder_penalty`` and ``resume``.

        A model that was trained continues in training mode, with a new optimizer. (LinearSCVI continues in evaluation mode, see
        ``evaluation_mode``.) Ctrl-C ends the training after the step, and raises ``KeyboardInterrupt`` with a model that can be used.

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
            then the latents carry more information than the ELBO allows, and a warning follows.
        backend
            How a step is computed, with the same minibatches, random draws and results but for rounding: ``"scvi"`` as
            scvi-tools does; ``"torch"`` with gamma functions of non-zero counts only; ``"numba"`` in compiled loops over sparse
            counts, on a CPU. ``"auto"``: the last of these that the network and the device allow.
        evaluation_mode
            True to train without dropout and with frozen running statistics of batch norms, which are those that reading uses.
            This is what every training of a LinearSCVI but the first does. As the last part of a training it can raise the
            held-out ELBO a good deal.
        decoder_penalty
            Penalty on the loadings w of the decoder, with its batch norm if it has one, added to the loss per cell: ``{"l1": a,
            "l2": b}`` adds ``a sum |w| + b / 2 sum w^2``, and a number b is ``{"l2": b}``. For N training cells, b is a normal
            prior of the loadings with variance ``1 / (N b)``, and a a Laplace prior with scale ``1 / (N a)``: for 10,000 cells, b = 1e-4 is a standard
            deviation of 1. Loadings of genes with few counts shrink most; none becomes exactly 0. Losses in ``history`` are without the penalty.
        resume
            Folder for a checkpoint, written after epochs, as often as it takes a twentieth of the time. If a training in it was killed,
            the same call continues it, with the same cells, minibatches and draws. If it is complete, the call only restores its model;
            with a larger ``max_epochs`` it goes on. Or a checkpoint of such a folder, to continue from without writing.

        Raises
        ------
        ValueError
            If ``evaluation_mode`` or ``decoder_penalty`` is requested of another training plan, a penalty is negative or unknown, ``kl_warmup`` is combined with a warm-up in ``plan_kwargs``, the network does not support ``backend``, or ``resume`` holds a training of another model, with other data or arguments.

        Examples
        --------
        >>> model = ldvae_ext.model.LDVAE(adata, n_latent=5)
        >>> model.train(max_epochs=5, kl_warmup="auto")
        """
        if datamodule is None and self.adata is None:
            msg = "This model has no AnnData to train on: give `datamodule`."
            raise ValueError(msg)
        if max_epochs is not None:
            check_positive_int("max_epochs", max_epochs, least=0)
        if batch_size is not None:
            check_positive_int("batch_size", batch_size)
        check_shares(train_size, validation_size)
        check_mapping("plan_kwargs", plan_kwargs)
        if datamodule is None:
            self._validate_anndata()
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
        if datamodule is not None:
            if not self.is_trained_:
                self._start_from(datamodule)
            self._datamodule = datamodule  # which `save` needs
        if uses_backend(self._training_plan_cls):
            check_plan(self._training_plan_cls, self.module, plan_kwargs)
        trainer_options = merge_kwargs(trainer_config, trainer_kwargs, name="trainer")
        chosen = self._backend_of(backend, accelerator, devices, plan_kwargs, trainer_options)
        interruption = Interruption()
        if uses_backend(self._training_plan_cls):
            plan_kwargs["backend"], plan_kwargs["is_interrupted"] = chosen, lambda: interruption.has_happened
        if evaluation_mode:
            if not issubclass(self._training_plan_cls, QueryTrainingPlan):
                msg = f"`evaluation_mode=True` needs the training plan of LDVAE; this class has {self._training_plan_cls.__name__}."
                raise ValueError(msg)
            plan_kwargs["evaluation_mode"] = True
        if decoder_penalty is not None:
            if not uses_backend(self._training_plan_cls):
                msg = f"`decoder_penalty` needs the training plan of LDVAE; this class has {self._training_plan_cls.__name__}."
                raise ValueError(msg)
            plan_kwargs["decoder_penalty"] = penalties(decoder_penalty)
        given_options = {
            "train_size": train_size,
            "validation_size": validation_size,
            "shuffle_set_split": shuffle_set_split,
            "load_sparse_tensor": load_sparse_tensor,
            "batch_size": batch_size,
            "early_stopping": early_stopping,
            "datasplitter_kwargs": datasplitter_kwargs,
            "datamodule": datamodule,
        }
        if resume is not None:
            arguments = arguments_of_training(trainer_options, plan_kwargs, **given_options)
            resumption = Resumption(self, resume, arguments, max_epochs, lambda: interruption.has_happened)
            trainer_kwargs = resumption.added_to(trainer_options)
        splitter = None if chosen.name == "scvi" else CountsSplitter
        with (
            self._axes_of_other_loadings_ended(),
            splitting_cells_by(self, splitter),
            set_up_for(chosen, self.module),
            sparse_minibatches(datamodule) if chosen.name != "scvi" else nullcontext(),
            interruption.noted() if uses_backend(self._training_plan_cls) else nullcontext(),
        ):
            result = super().train(
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                plan_kwargs=plan_kwargs,
                trainer_config=trainer_config,
                **given_options,
                **trainer_kwargs,
            )
        if interruption.has_happened:
            msg = f"The training ended after {self.trainer.current_epoch} epochs, and the model can be used."
            raise KeyboardInterrupt(msg)
        self._note_kl_weight(warmup_given=kl_warmup is not None)
        return result

    def order_factors(
        self,
        fine_tune_epochs: int = 40,
        *,
        lr: float = 2e-3,
        batch_size: int = 128,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        plan_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Order the latents by explained deviance, and continue training so that the first j are a good model for any j.

        The latent space is rotated first (:func:`deviance_rotation` of the training cells), which changes no decoded
        expression. Then it is fine-tuned with nested dropout (Rippel et al. 2014, arXiv:1402.0915): each cell of a
        minibatch keeps its first j latents, j ~ U{1..K}; the others are 0, and their KL is not counted. Afterwards
        ``Z_0``, ``Z_1``, ... are in order, and latents beyond the j-th can be left out as zeros, as in
        ``get_explained_deviance()``.

        The cells are those of the first training; the weight of the KL term is 1. If an error occurs, also in the fine-tuning,
        the model is restored.

        Parameters
        ----------
        fine_tune_epochs
            Number of epochs. With 0, nothing is trained, whatever the arguments below: the model is the same, and
            ``rotate("deviance")`` has the same result on other axes.
        lr
            Learning rate.
        batch_size, accelerator, devices, plan_kwargs, **trainer_kwargs
            As in :meth:`train`.

        Raises
        ------
        TypeError
            If an argument would change the cells, the epochs or the weight of the KL term.
        ValueError
            If the model is not trained, has no counts, a logistic-normal latent or batch norm in the decoder, or is a query
            whose reference is frozen.

        Examples
        --------
        >>> from ldvae_ext.model import LDVAE
        >>> model = LDVAE(adata, n_latent=2, use_batch_norm="encoder", bias="auto")
        >>> model.train(max_epochs=5, kl_warmup="auto")
        >>> model.order_factors(fine_tune_epochs=2)
        """
        order_factors(self, fine_tune_epochs, lr, batch_size, accelerator, devices, plan_kwargs, trainer_kwargs)

    @classmethod
    def train_ordered(
        cls,
        adata: AnnData,
        n_latent: int = 10,
        max_epochs: int | None = None,
        *,
        fine_tune_epochs: int = 40,
        fine_tune_lr: float = 2e-3,
        batch_size: int = 128,
        model_kwargs: dict[str, Any] | None = None,
        train_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> Self:
        """A model with ordered latents: ordinary training, then :meth:`order_factors`.

        The decoder has a gene intercept that starts at the log mean expression, and no batch norm, whose statistics a
        truncated decoder would not have: ``use_batch_norm="encoder"``, ``bias="auto"``.

        Parameters
        ----------
        adata
            AnnData registered by :meth:`setup_anndata`.
        n_latent
            Number of latents.
        max_epochs
            Epochs of the ordinary training, as in :meth:`train`.
        fine_tune_epochs, fine_tune_lr
            Number of epochs and learning rate of the fine-tuning, as in :meth:`order_factors`.
        batch_size
            Cells per minibatch, of both trainings.
        model_kwargs
            Other arguments of the model.
        train_kwargs
            Arguments of :meth:`train` for the ordinary training only, such as ``train_size`` or ``plan_kwargs``.
            ``kl_warmup`` is ``"auto"`` unless given.
        **trainer_kwargs
            Arguments of :meth:`train` for both trainings, such as ``accelerator``.

        Returns
        -------
        The model.

        Raises
        ------
        ValueError
            If the options of the model do not let it be ordered; see :meth:`order_factors`.

        Examples
        --------
        >>> model = ldvae_ext.model.LDVAE.train_ordered(adata, n_latent=2, max_epochs=5)
        """
        check_not_decided(
            "train_ordered", trainer_kwargs, "`train_kwargs` are for the ordinary training", "plan_kwargs", "resume"
        )
        check_epochs(fine_tune_epochs)
        options = {"use_batch_norm": "encoder", "bias": "auto", **(model_kwargs or {})}
        model = cls(adata, n_latent=n_latent, **options)
        if fine_tune_epochs:
            check_can_be_ordered(model)
        else:
            check_rotatable(model.module.latent_distribution)
            model._check_has_counts("train_ordered")
        own = {"kl_warmup": "auto", **(train_kwargs or {})}
        model.train(max_epochs, batch_size=batch_size, **own, **trainer_kwargs)
        model.order_factors(fine_tune_epochs, lr=fine_tune_lr, batch_size=batch_size, **trainer_kwargs)
        return model

    @property
    def batch_norm_initial_share(self) -> float:
        """Share of the running statistics of the decoder that are still their initial values (mean 0, variance 1).

        They move by 1 % with each minibatch, so that a share of ``0.99^n`` remains after n of them: half after 69, a
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
            Cells from which the statistics are computed; the training cells if None.
        validation_indices
            Cells that decide; the validation cells of the training if None.
        batch_size
            Cells per minibatch.

        Returns
        -------
        ``before`` and ``after``: nats per held-out cell, lower is better; ``kept``: whether the new ones were kept.

        Raises
        ------
        ValueError
            If the decoder has no batch norm, or one that query mapping has frozen, if no cells were held out, or if
            those of another AnnData are not given.

        Examples
        --------
        >>> sorted(model.recalibrate_batch_norm())
        ['after', 'before', 'kept']
        """
        return recalibrate_batch_norm(self, adata, indices, validation_indices, batch_size)

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
    def _axes_of_other_loadings_ended(self) -> Iterator[None]:
        """End rotation and order if the loadings change in the context: they refer to the loadings before."""
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
        # Weight of the last training step; the property of the plan already refers to the next epoch.
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
            else f"`max_kl_weight={plan.max_kl_weight}` was requested; with 1 the objective is the ELBO."
        )
        warn(
            f"Training ended with a KL weight of {self.kl_weight_:.2f}: the KL of latents, and their order by it, are for another "
            f"objective than the ELBO. {remedy}"
        )
