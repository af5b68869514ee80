"""Arguments of a training, checked before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch

from ldvae_ext._validate import check_number, check_one_of, listed


def check_shares(train_size: Any, validation_size: Any) -> None:
    """Raise unless shares of cells are None or numbers from 0 to 1; scvi-tools checks that they fit together."""
    for name, value in (("train_size", train_size), ("validation_size", validation_size)):
        if value is not None:
            check_number(name, value, least=0, most=1)


def check_mapping(name: str, value: Any) -> None:
    """Raise unless an argument with further arguments is None, a mapping, or a configuration of scvi-tools."""
    if value is not None and not isinstance(value, Mapping) and not hasattr(value, "to_kwargs"):
        msg = f"`{name}` must be a dictionary of arguments; got {value!r}."
        raise TypeError(msg)


def check_plan(plan_cls: type, module: Any, given: Mapping[str, Any]) -> None:
    """Raise unless the training plan has these arguments, and the learning rate is a number.

    Parameters
    ----------
    plan_cls
        Class of the training plan.
    module
        The network, whose loss takes the arguments that the plan does not have.
    given
        Arguments of the plan.
    """
    rate = given.get("lr")
    if rate is not None and not isinstance(rate, torch.Tensor):
        check_number("plan_kwargs['lr']", rate, least=0)
    of_loss = signature(module.loss).parameters.values()
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in of_loss):
        return
    known = {parameter.name for parameter in of_loss}
    for cls in plan_cls.__mro__:
        if "__init__" in vars(cls) and cls is not object:
            known |= set(signature(cls.__init__).parameters)  # type: ignore[misc]
    unknown = [name for name in given if name not in known]
    if unknown:
        msg = f"`plan_kwargs`: {listed(unknown)} is no argument of {plan_cls.__name__} or of the loss."
        raise TypeError(msg)


def penalties(penalty: float | Mapping[str, float]) -> dict[str, float]:
    """Weights of the penalties by name."""
    given = dict(penalty) if isinstance(penalty, Mapping) else {"l2": penalty}
    for name, weight in given.items():
        check_one_of("decoder_penalty", name, ("l1", "l2"))
        is_number = isinstance(weight, (int, float, np.integer, np.floating)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < np.inf:
            msg = f"`decoder_penalty` must be a finite number of at least 0, or such numbers by name (l1, l2); got {penalty!r}."
            raise ValueError(msg)
    return {name: float(weight) for name, weight in given.items()}
