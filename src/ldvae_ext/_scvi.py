"""The door to scvi-tools and Lightning: the only file that imports or overrides their private names.

Each name has a comment with its reason. ``docs/contributing.md`` has the table of them, with the consequence of a change in a
release changed one; ``tests/test_scvi_contract.py`` fails by name when one changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

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

# Default number of epochs, and device of a training.
from scvi.model._utils import get_max_epochs_heuristic, parse_device_args

# A saved model without its data, which a query is mapped onto.
from scvi.model.base._save_load import _load_saved_files as load_saved_files

# Keys of the results of `inference` and `generative`.
from scvi.module._constants import MODULE_KEYS

# A configuration object and keyword arguments as one dictionary.
from scvi.train._config import merge_kwargs

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
    "StableCategoriesField",
    "adata_minify_type",
    "check_adata_or_dataloader",
    "checks_of",
    "get_max_epochs_heuristic",
    "load_saved_files",
    "merge_kwargs",
    "parse_device_args",
    "registry_key_to_default_dtype",
    "set_checks_of",
    "splitting_cells_by",
    "untested_releases",
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


def checks_of(stopping: Any) -> int | None:
    """Number of checks of scvi-tools' early stopping, by which it ends its warm-up; checkpoints of Lightning do not have it.

    Parameters
    ----------
    stopping
        The callback, or None.
    """
    return getattr(stopping, "_current_step", None)


def set_checks_of(stopping: Any, n_checks: int | None) -> None:
    """Restore :func:`checks_of`.

    Parameters
    ----------
    stopping
        The callback, or None.
    n_checks
        What :func:`checks_of` returned.
    """
    if n_checks is not None:
        stopping._current_step = n_checks
