"""The door to Lightning's training loop and to torch's optimizers: training steps without what nobody uses in them.

As in ``_scvi.py``, private names are touched here alone.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

# Hooks of all optimizers, which a step must call.
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


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


def as_between_epochs(checkpoint: dict[str, Any]) -> None:
    """Count the epoch that is about to begin out of a checkpoint, so that a training that loads it begins this epoch.

    Parameters
    ----------
    checkpoint
        A checkpoint of Lightning, written when an epoch begins or the training ends.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    for counted in (progress["total"], progress["current"]):
        counted["ready"] = counted["completed"]


def continue_between_epochs(trainer: Any) -> None:
    """Treat a training that was restored between two epochs as one that arrived there.

    For a restored training, Lightning leaves out the new order of the minibatches, since it may be inside of an epoch.

    Parameters
    ----------
    trainer
        The trainer, when the training starts.
    """
    trainer.fit_loop.restarting = False
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop):
        vars(loop).update(_loaded_from_state_dict=False, _resuming_from_checkpoint=False)


def is_on_one_cpu(trainer: Any) -> bool:
    """True if a network is trained in one process on a CPU.

    Parameters
    ----------
    trainer
        The trainer.
    """
    return type(trainer.strategy) is SingleDeviceStrategy and trainer.strategy.root_device.type == "cpu"


# Hooks of Lightning in a training step: of callbacks, of the training plan, and of the data.
CALLBACK_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_PLAN_HOOKS = (
    *CALLBACK_HOOKS,
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
        self._adam = FusedAdam(trainer.optimizers[0]) if FusedAdam.fits(trainer.optimizers[0]) else None

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
            and not any(_has_own(callback, Callback, CALLBACK_HOOKS) for callback in trainer.callbacks)
            and not _has_own(plan, LightningModule, (*_PLAN_HOOKS, *_DATA_HOOKS))
            and (getattr(data, "loads_minibatches", False) or not _has_own(data, LightningDataModule, _DATA_HOOKS))
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
        minibatch = next(batches)[0]
        progress.is_last_batch = False
        progress.increment_ready()
        progress.increment_started()
        steps.step.increment_ready()

        def closure() -> Any:
            loss = plan.training_step(minibatch, n_done)
            optimizer.zero_grad()
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


class FusedAdam:
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
        if not self.fits(optimizer):
            optimizer.step()
            return
        group = optimizer.param_groups[0]
        trained = [value for value in group["params"] if value.grad is not None]
        states = [optimizer.state[value] for value in trained]
        if not all(map(_are_stored_alike, trained, states)):
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


def _are_stored_alike(value: torch.Tensor, state: dict[str, Any]) -> bool:
    """True if a parameter, its gradient and its moments have one order in memory; False before its first step."""
    others = (value.grad, state.get("exp_avg"), state.get("exp_avg_sq"))
    return all(other is not None and other.stride() == value.stride() for other in others)


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
