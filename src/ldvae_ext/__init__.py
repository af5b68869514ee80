"""Interpret linearly decoded VAEs of single-cell counts.

``ldvae_ext.model.LDVAE`` is a drop-in replacement for :class:`scvi.model.LinearSCVI` with tools for interpretation: an
exact decoder, paired ablation of latent dimensions, and latents in order of information, written to AnnData.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("ldvae-ext")

# Importing scvi-tools and torch takes seconds, so each subpackage is imported at first use.
_SUBPACKAGES = ("core", "datasets", "get", "model", "module", "pl", "tl")

# Functions, and the modules that have them.
_FUNCTIONS = {"report": "_report", "run": "_run"}

__all__ = ["__version__", *_FUNCTIONS, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
