"""The door to scvi-tools and Lightning: the only file that imports or overrides their private names.

Each name has a line that says why it is needed. ``docs/contributing.md`` has the table of all of them, with what would
break if a release changed one; ``tests/test_scvi_contract.py`` fails by name when one does.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from packaging.version import Version

# Name of the class that a registry belongs to: arguments of LinearSCVI are read differently.
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

# Default number of epochs, device of a training, and whether cells are divided among processes.
from scvi.model._utils import get_max_epochs_heuristic, parse_device_args, use_distributed_sampler

# A saved model without its data, which a query is mapped onto.
from scvi.model.base._save_load import _load_saved_files as load_saved_files

# Keys of what `inference` and `generative` return.
from scvi.module._constants import MODULE_KEYS

# A configuration object and keyword arguments as one dictionary.
from scvi.train._config import merge_kwargs

__all__ = [
    "ADATA_MINIFY_TYPE",
    "MODEL_NAME_KEY",
    "MODULE_KEYS",
    "SETUP_ARGS_KEY",
    "SETUP_METHOD_NAME",
    "adata_minify_type",
    "check_adata_or_dataloader",
    "get_max_epochs_heuristic",
    "load_saved_files",
    "merge_kwargs",
    "parse_device_args",
    "registry_key_to_default_dtype",
    "use_distributed_sampler",
]

# Releases that the test matrix covers: from the first, below the second.
TESTED_RELEASES = {"scvi-tools": ("1.5", "1.7"), "lightning": ("2.5", "2.7")}


def untested_releases() -> str:
    """Installed releases of scvi-tools and Lightning that are outside of the tested range; empty if there are none."""
    untested = []
    for package, (first, end) in TESTED_RELEASES.items():
        installed = version(package)
        if not Version(first) <= Version(installed) < Version(end):
            untested.append(f"{package} {installed}")
    return ", ".join(untested)


def is_logging_step(trainer: Any) -> bool:
    """True if Lightning logs the values of this step, as every `log_every_n_steps`: it has no public name for that.

    Parameters
    ----------
    trainer
        The trainer.
    """
    return trainer._logger_connector.should_update_logs
