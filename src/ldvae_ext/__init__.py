"""Read linearly decoded VAEs of single-cell counts.

``ldvae_ext.model.LDVAE`` is a drop-in replacement for :class:`scvi.model.LinearSCVI` with the reading built in: an
exact decoder, paired ablation of latent dimensions, and latents in order of information, written to AnnData.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("ldvae-ext")

# Importing scvi-tools and torch takes seconds, so every room is opened at first use.
_ROOMS = ("core", "datasets", "get", "model", "module", "pl", "tl")

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
