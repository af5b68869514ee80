"""Trainings that diverge: an error that says what to try, as soon as the loss or the weights are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# How torch's distributions begin the error for parameters that are NaN or infinite; it goes on with all of them.
_INVALID = "Expected parameter"


@contextmanager
def divergence_explained(plan: Any) -> Iterator[None]:
    """Inside, the error of posteriors that are NaN or infinite says what to try; other errors are left as they are.

    The distribution of a latent is refused before there is a loss, with an error that lists the latents of all cells.

    Parameters
    ----------
    plan
        The training plan.

    Raises
    ------
    FloatingPointError
        If the posteriors of a minibatch, or the weights, are NaN or infinite.
    """
    try:
        yield
    except ValueError as error:
        if str(error).startswith(_INVALID) or not are_finite(plan.module.parameters()):
            raise diverged(plan, "the posteriors of a minibatch are NaN or infinite") from None
        raise


def check_step(plan: Any, loss: torch.Tensor) -> None:
    """Raise if the loss of a step is NaN or infinite, on a CPU.

    On other devices this would wait for the device at each step: there the sum of an epoch is looked at.

    Parameters
    ----------
    plan
        The training plan.
    loss
        The loss.

    Raises
    ------
    FloatingPointError
        If it is NaN or infinite.
    """
    if loss.device.type == "cpu":
        check_loss(plan, loss.detach())


def check_loss(plan: Any, loss: Any) -> None:
    """Raise if a loss is NaN or infinite.

    Parameters
    ----------
    plan
        The training plan.
    loss
        A number or a tensor with one.

    Raises
    ------
    FloatingPointError
        If it is NaN or infinite.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise diverged(plan, f"the loss is {value}")


def check_weights(plan: Any) -> None:
    """Raise if weights are NaN or infinite, for the end of a training: the loss is computed before the weights move.

    Parameters
    ----------
    plan
        The training plan.

    Raises
    ------
    FloatingPointError
        If a weight is NaN or infinite.
    """
    if not are_finite(plan.module.parameters()):
        raise diverged(plan, "weights of the network are NaN or infinite")


@torch.no_grad()
def are_finite(values: Iterable[torch.Tensor]) -> bool:
    """True if all values of all tensors are finite.

    Parameters
    ----------
    values
        The tensors.
    """
    return all(bool(torch.isfinite(value).all()) for value in values)


def diverged(plan: Any, what: str) -> FloatingPointError:
    """The error for a training that has diverged.

    Parameters
    ----------
    plan
        The training plan.
    what
        What was found.
    """
    trainer = plan.trainer
    return FloatingPointError(
        f"The training diverged at step {trainer.global_step + 1}, in epoch {trainer.current_epoch + 1}: {what}. The weights of this "
        f"model cannot be used; make a new one, and try a smaller learning rate (`plan_kwargs={{'lr': ...}}`, which was {plan.lr:g}) or "
        "gradient clipping (`gradient_clip_val=1`). In the data, look for single counts far above all others, continuous covariates that "
        "are not standardised, and size factors near 0."
    )
