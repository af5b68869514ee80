"""The choice of a backend: by the network, the device, and the way in which it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldvae_ext._scvi import untested_releases
from ldvae_ext._validate import check_one_of, warn
from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.folded_encoders import FoldedEncoders
from ldvae_ext.backends.numba import NumbaBackend
from ldvae_ext.backends.plan import uses_backend
from ldvae_ext.backends.scvi import ScviBackend
from ldvae_ext.backends.torch import TorchBackend

# In order of preference.
_CLASSES: tuple[type[Backend], ...] = (NumbaBackend, TorchBackend, ScviBackend)
BACKENDS = tuple(cls.name for cls in _CLASSES)
_noted: set[str] = set()


def choose_backend(module: Any, name: str = "auto", device: str | None = None) -> Backend:
    """The backend of a name, or with ``"auto"`` the first of numba, torch and scvi that the network allows.

    Parameters
    ----------
    module
        The network.
    name
        ``"auto"``, ``"numba"``, ``"torch"`` or ``"scvi"``.
    device
        Type of the device; the network's own if None.

    Raises
    ------
    ValueError
        If there is no such backend, or the network does not allow it, with the reason.
    """
    check_one_of("backend", name, ("auto", *BACKENDS))
    device = module.device.type if device is None else device
    if name == "auto" and (releases := untested_releases()):
        _note_once(releases)
        return ScviBackend()
    for cls in _CLASSES:
        if name not in ("auto", cls.name):
            continue
        backend = cls()
        obstacle = backend.obstacle(module, device)
        if obstacle is None:
            return backend
        if name != "auto":
            msg = f"`backend={name!r}`: {obstacle}."
            raise ValueError(msg)
    return ScviBackend()


def choose_for_training(
    module: Any,
    name: str,
    device: str,
    plan_cls: type,
    plan_kwargs: Mapping[str, Any],
    trainer_kwargs: Mapping[str, Any],
) -> Backend:
    """As :func:`choose_backend`, for a training that may need scvi-tools' own forward pass.

    Parameters
    ----------
    module, name, device
        See :func:`choose_backend`.
    plan_cls, plan_kwargs
        Class of the training plan and its arguments.
    trainer_kwargs
        Arguments of the trainer.

    Raises
    ------
    ValueError
        If the training does not allow the backend, with the reason.
    """
    check_one_of("backend", name, ("auto", *BACKENDS))
    precision = trainer_kwargs.get("precision")
    obstacles = {
        "`compile=True`": bool(plan_kwargs.get("compile")),
        f"`precision={precision!r}` or plugins": precision not in (None, 32, "32", "32-true")
        or bool(trainer_kwargs.get("plugins")),
        # Another plan may need distributions, or latents with a graph, which backends do not give.
        f"the training plan `{plan_cls.__name__}`": not uses_backend(plan_cls),
    }
    obstacle = next((obstacle for obstacle, stands in obstacles.items() if stands), None)
    if obstacle is None:
        return choose_backend(module, name, device)
    if name not in ("auto", "scvi"):
        msg = f"`backend={name!r}` does not go with {obstacle}."
        raise ValueError(msg)
    return ScviBackend()


def choose_for_reading(module: Any) -> Backend:
    """The backend that computes posteriors of a network fastest.

    Parameters
    ----------
    module
        The network, whose parameters must not change while the backend is in use.
    """
    return NumbaBackend() if FoldedEncoders.fits(module) else ScviBackend()


def _note_once(releases: str) -> None:
    if releases not in _noted:
        _noted.add(releases)
        warn(
            f"This version of ldvae_ext has not been tested with {releases}: `backend='auto'` is 'scvi', scvi-tools' own "
            "training steps."
        )
