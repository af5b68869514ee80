"""The door to scvi-tools and Lightning: the only file that imports or overrides their private names.

Each name has a comment with its reason. ``docs/contributing.md`` has the table of them, with the consequence of a change in a
release changed one; ``tests/test_scvi_contract.py`` fails by name when one changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from packaging.version import Version

# Name of the class of a registry: arguments of LinearSCVI are read differently.
from scvi.data._constants import _MODEL_NAME_KEY as MODEL_NAME_KEY

# Arguments and method of a set-up, to repeat it for a query or for a model made of a LinearSCVI.
from scvi.data._constants import _SETUP_ARGS_KEY as SETUP_ARGS_KEY
from scvi.data._constants import _SETUP_METHOD_NAME as SETUP_METHOD_NAME

# Kinds of minified data.
from scvi.data._constants import ADATA_MINIFY_TYPE

# Kind of an AnnData's minified data, which decides whether counts can be read.
from scvi.data._utils import _get_adata_minify_type as adata_minify_type

# scvi-tools' message where both `adata` and `dataloader` are given.
from scvi.data._utils import _validate_adata_dataloader_input as check_adata_or_dataloader

# dtype of each registered field, so that minibatches are scvi-tools' own.
from scvi.data._utils import registry_key_to_default_dtype
from scvi.data.fields import CategoricalJointObsField

# Default number of epochs, device of a training, and whether cells are divided among processes.
from scvi.model._utils import get_max_epochs_heuristic, parse_device_args, use_distributed_sampler

# A saved model without its data, which a query is mapped onto.
from scvi.model.base._save_load import _load_saved_files as load_saved_files

# Keys of the results of `inference` and `generative`.
from scvi.module._constants import MODULE_KEYS

# A configuration object and keyword arguments as one dictionary.
from scvi.train._config import merge_kwargs

# Hooks of all optimizers, which a step must call.
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = [
    "ADATA_MINIFY_TYPE",
    "MODEL_NAME_KEY",
    "MODULE_KEYS",
    "SETUP_ARGS_KEY",
    "SETUP_METHOD_NAME",
    "DataChecks",
    "DenoisedSamples",
    "FastHookNames",
    "GenerativeInputs",
    "ShortSteps",
    "StableCategoriesField",
    "adata_minify_type",
    "check_adata_or_dataloader",
    "end_training",
    "get_max_epochs_heuristic",
    "is_logging_step",
    "is_on_one_cpu",
    "load_saved_files",
    "merge_kwargs",
    "parse_device_args",
    "registry_key_to_default_dtype",
    "skip_graph_capture_check",
    "splitting_cells_by",
    "untested_releases",
    "use_distributed_sampler",
]

# Releases that the tests run on: from the first, below the second. `backend="auto"` is "scvi" on others, since a patch
# release can change the loss: 1.5.1 changed `VAE.loss`.
TESTED_RELEASES = {"scvi-tools": ("1.5.1", "1.5.2"), "lightning": ("2.6", "2.7")}


def untested_releases() -> str:
    """Installed releases of scvi-tools and Lightning outside of the tested range; empty if there are none."""
    untested = []
    for package, (first, end) in TESTED_RELEASES.items():
        installed = version(package)
        if not Version(first) <= Version(installed) < Version(end):
            untested.append(f"{package} {installed}")
    return ", ".join(untested)


class DataChecks:
    """Stands before scvi-tools' model classes: a check of its own after scvi-tools' check of an AnnData.

    ``_validate_anndata`` is the gate of all inherited methods; there is no public one.
    """

    def _validate_anndata(self, adata: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._check_type(adata)  # type: ignore[attr-defined]
        adata = super()._validate_anndata(adata, *args, **kwargs)  # type: ignore[misc]
        # After it, since it registers an AnnData again that another model was set up on.
        self._check_unchanged(adata)  # type: ignore[attr-defined]
        return adata


class DenoisedSamples:
    """Stands before scvi-tools' model classes: rates before Poisson noise where scvi-tools cannot draw them.

    ``get_feature_correlation_matrix`` takes its rates from ``_get_denoised_samples``, which fails under a Poisson likelihood.
    """

    def _get_denoised_samples(self, adata: Any = None, indices: Any = None, **kwargs: Any) -> Any:
        if self._has_own_rates():  # type: ignore[attr-defined]
            return self._sampled_rates(adata, indices, **kwargs)  # type: ignore[attr-defined]
        return super()._get_denoised_samples(adata=adata, indices=indices, **kwargs)  # type: ignore[misc]


class GenerativeInputs:
    """Stands before scvi-tools' network: latents are changed between inference and decoder.

    ``_get_generative_input`` is the only place between the two through which every forward pass goes.
    """

    def _get_generative_input(self, tensors: Any, inference_outputs: Any, **kwargs: Any) -> Any:
        inputs = super()._get_generative_input(tensors, inference_outputs, **kwargs)  # type: ignore[misc]
        return self.change_latents(inputs, inference_outputs)  # type: ignore[attr-defined]


class StableCategoriesField(CategoricalJointObsField):
    """scvi-tools' field of categorical covariates, with codes that do not depend on the order of a column's categories.

    scvi-tools passes a column with the same categories in another order to pandas, which treats the two types as equal and
    returns the column's own codes, so that levels are exchanged. A file can change that order.
    """

    def _make_array_categorical(self, adata: Any, category_dict: dict | None = None) -> dict:
        if category_dict is not None:
            adata.obsm[self.attr_key] = adata.obsm[self.attr_key].astype(object)
        return super()._make_array_categorical(adata, category_dict)


class FastHookNames:
    """Stands before a training plan: Lightning sets the name of each hook, forty times in a step.

    torch's ``__setattr__`` would check the type of each value, which takes a twentieth of a step.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def is_logging_step(trainer: Any) -> bool:
    """True if Lightning logs the values of this step (every ``log_every_n_steps``); there is no public name for it.

    Parameters
    ----------
    trainer
        The trainer.
    """
    return trainer._logger_connector.should_update_logs


def end_training(trainer: Any) -> None:
    """End a training after this step, also in the first epoch; what follows a training happens as usual.

    Parameters
    ----------
    trainer
        The trainer.
    """
    trainer.fit_loop.min_epochs = None
    trainer.should_stop = True


def is_on_one_cpu(trainer: Any) -> bool:
    """True if a network is trained in one process on a CPU.

    Parameters
    ----------
    trainer
        The trainer.
    """
    return type(trainer.strategy) is SingleDeviceStrategy and trainer.strategy.root_device.type == "cpu"


# Hooks of Lightning in a training step: of callbacks, of the training plan, and of the data.
_CALLBACK_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_PLAN_HOOKS = (
    *_CALLBACK_HOOKS,
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
)
_DATA_HOOKS = ("on_before_batch_transfer",)


class ShortSteps:
    """Training steps that skip Lightning's hooks where nothing is attached to them.

    Lightning calls some forty hooks in a step, which takes as long as a sixth of a step of 2,000 genes. Inside of an epoch, where
    nothing is logged either, the same calls remain: the training step, ``zero_grad``, the backward pass, the optimizer's step,
    and the counters of the loop. The first and the last step of an epoch, and those that are logged, are Lightning's own.

    Parameters
    ----------
    trainer
        A trainer for which :meth:`fit` is True.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._loop = trainer, trainer.fit_loop.epoch_loop
        self._advance = self._loop.advance
        self._adam = _FusedAdam(trainer.optimizers[0]) if _FusedAdam.fits(trainer.optimizers[0]) else None

    @staticmethod
    def fit(trainer: Any) -> bool:
        """True if no callback, no part of the training plan and no option of the trainer takes part in a step.

        Parameters
        ----------
        trainer
            The trainer, at the start of the training.
        """
        plan, data = trainer.lightning_module, trainer.datamodule
        return (
            is_on_one_cpu(trainer)
            and type(trainer.precision_plugin) is Precision
            and type(trainer.profiler) is PassThroughProfiler
            and trainer.accumulate_grad_batches == 1
            and trainer.gradient_clip_val is None
            and not trainer._detect_anomaly
            and plan.automatic_optimization
            and len(trainer.optimizers) == 1
            and all(config.interval == "epoch" for config in trainer.lr_scheduler_configs)
            and not any(_has_own(callback, Callback, _CALLBACK_HOOKS) for callback in trainer.callbacks)
            and not _has_own(plan, LightningModule, (*_PLAN_HOOKS, *_DATA_HOOKS))
            and not _has_own(data, LightningDataModule, _DATA_HOOKS)
        )

    def start(self) -> None:
        """Take the place of the loop's steps."""
        self._loop.advance = self

    def end(self) -> None:
        """Restore Lightning's step."""
        self._loop.__dict__.pop("advance", None)

    def __call__(self, batches: Any) -> None:
        """A step, as ``_TrainingEpochLoop.advance``.

        Parameters
        ----------
        batches
            Lightning's fetcher of minibatches.
        """
        loop, progress = self._loop, self._loop.batch_progress
        n_done = progress.current.ready
        is_last = batches.length is None or min(batches.length, self._trainer.num_training_batches) <= n_done + 1
        if n_done == 0 or is_last or loop.restarting or is_logging_step(self._trainer):
            self._advance(batches)
            return
        plan, optimizer = self._trainer.lightning_module, self._trainer.optimizers[0]
        steps = loop.automatic_optimization.optim_progress.optimizer
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        minibatch = next(batches)[0]
        progress.is_last_batch = False
        progress.increment_ready()
        progress.increment_started()
        steps.step.increment_ready()

        def closure() -> Any:
            loss = plan.training_step(minibatch, n_done)
            for value in parameters:
                value.grad = None
            loss.backward()
            return loss

        if self._adam is None:
            # Some optimizers call it several times.
            optimizer.step(closure)
        else:
            closure()
            self._adam.step()
        for counted in (steps.zero_grad.total, steps.zero_grad.current):
            counted.ready += 1
            counted.started += 1
            counted.completed += 1
        steps.step.increment_completed()
        progress.increment_processed()
        progress.increment_completed()


class _FusedAdam:
    """Steps of torch's fused Adam on a CPU, by its own function, without its search for other cases at each step.

    The function copies arrays that are not in rows; here it takes the transpose of those that are stored by columns.

    Parameters
    ----------
    optimizer
        An optimizer for which :meth:`fits` is True.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @staticmethod
    def fits(optimizer: Any) -> bool:
        """True for a fused Adam with scvi-tools' options, and nothing that changes its steps.

        Parameters
        ----------
        optimizer
            The optimizer.
        """
        if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
            return False
        group = optimizer.param_groups[0]
        others = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
        return (
            hasattr(torch, "_fused_adam_")
            and bool(group.get("fused"))
            and not any(group.get(name) for name in others)
            and not optimizer._optimizer_step_pre_hooks
            and not _global_optimizer_pre_hooks
            and not _global_optimizer_post_hooks
        )

    @torch.no_grad()
    def step(self) -> None:
        """A step, and the hooks that follow a step of the optimizer."""
        optimizer = self._optimizer
        if len(optimizer.param_groups) != 1 or not self.fits(optimizer):
            optimizer.step()
            return
        group = optimizer.param_groups[0]
        trained = [value for value in group["params"] if value.grad is not None]
        states = [optimizer.state[value] for value in trained]
        if not all(states) or any(value.grad.stride() != value.stride() for value in trained):
            # The first step of a parameter.
            optimizer.step()
            return
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        means, squares = ([_in_rows(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        torch._fused_adam_(
            [_in_rows(value) for value in trained],
            [_in_rows(value.grad) for value in trained],
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (), {})


def _in_rows(value: torch.Tensor) -> torch.Tensor:
    """A matrix or its transpose, whichever is stored row by row."""
    return value.t() if value.ndim == 2 and not value.is_contiguous() else value


def _has_own(value: Any, base: type, names: tuple[str, ...]) -> bool:
    """True if an object has methods of its own instead of those of a base class; a callback may have them on itself."""
    return any(
        getattr(type(value), name, None) is not getattr(base, name, None) or name in vars(value) for name in names
    )


def skip_graph_capture_check(optimizer: Any) -> None:
    """Leave out an optimizer's check for a CUDA graph at each step, if all parameters are on a CPU.

    Parameters
    ----------
    optimizer
        An optimizer of torch.
    """
    check = "_accelerator_graph_capture_health_check"
    on_cpu = all(value.device.type == "cpu" for group in optimizer.param_groups for value in group["params"])
    if on_cpu and hasattr(optimizer, check):
        setattr(optimizer, check, _skip)


def _skip() -> None:
    """Replaces a check that does not concern a CPU."""


@contextmanager
def splitting_cells_by(model: Any, splitter: type | None) -> Iterator[None]:
    """Inside, a class divides the cells of a model into training and validation, unless the user has set another.

    scvi-tools takes the class from the attribute ``_data_splitter_cls``; ``train`` has no argument for it.

    Parameters
    ----------
    model
        The model.
    splitter
        The class; scvi-tools' own if None.
    """
    is_set = splitter is not None and "_data_splitter_cls" not in model.__dict__
    if is_set:
        model._data_splitter_cls = splitter
    try:
        yield
    finally:
        if is_set:
            del model._data_splitter_cls
