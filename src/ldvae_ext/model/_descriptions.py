"""What a training was made of, as text that can be stored with its results and compared with another."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scvi import REGISTRY_KEYS

from ldvae_ext.model._fingerprint import digests
from ldvae_ext.model._linear_scvi import saved_arguments

_DATA = "data."


def described(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Arguments as text, by name; those in a dictionary as ``outer.inner``.

    Parameters
    ----------
    arguments
        Values by name. None means that an argument was not given. Classes and functions are described by their names, other
        objects by their class alone.
    prefix
        Beginning of all names.
    """
    words: dict[str, str] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            words |= described(value, f"{prefix}{name}.")
        elif value is not None:
            words[f"{prefix}{name}"] = _word(value)
    return words


def of_model(model: Any) -> dict[str, str]:
    """Class, options and data of a model.

    Parameters
    ----------
    model
        The model.
    """
    return {
        "model": type(model).__name__,
        **described(saved_arguments(model.init_params_), "model."),
        **({} if model.adata is None else of_data(model.adata_manager)),
    }


def of_datamodule(datamodule: Any) -> dict[str, str]:
    """Number of cells, names of genes, and the path of the collection of a data module, as far as it has them.

    Parameters
    ----------
    datamodule
        A Lightning data module; None is described by nothing.
    """
    words = {}
    n_cells, path = getattr(datamodule, "n_obs", None), getattr(datamodule, "collection_path", None)
    if n_cells is not None:
        words[f"{_DATA}cells"] = str(n_cells)
    registry = getattr(datamodule, "registry", None) or {}
    of_counts = registry.get("field_registries", {}).get(REGISTRY_KEYS.X_KEY, {})
    genes = of_counts.get("state_registry", {}).get("column_names")
    if genes is not None:
        words[f"{_DATA}genes"] = _genes(genes)
    if path is not None:
        is_address = "://" in str(path)
        words["datamodule.collection_path"] = repr(str(path) if is_address else str(Path(path).resolve()))
    return words


def of_data(manager: Any) -> dict[str, str]:
    """Numbers of cells and genes, names of genes, and one number for the values of each registered field.

    Parameters
    ----------
    manager
        Manager of an AnnData.
    """
    adata = manager.adata
    words = {"cells": str(adata.n_obs), "genes": _genes(adata.var_names)}
    # Ten digits: sums on another machine differ in the last of sixteen.
    words |= {name: f"{value:.9e}" for name, value in digests(manager).items()}
    return {f"{_DATA}{name}": word for name, word in words.items()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two descriptions; empty if nothing does.

    Parameters
    ----------
    before, now
        Descriptions.
    """
    said = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name, "not given"), now.get(name, "not given")
        if old == new:
            continue
        if name.startswith(_DATA):
            counted = f" ({old} then, {new} now)" if name == f"{_DATA}cells" else ""
            said.append(f"the {name.removeprefix(_DATA)} of the data are others{counted}")
        else:
            said.append(f"`{name}` was {old} and is {new}")
    return "; ".join(said)


def _word(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {_digest(value)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_word, value))}]"
    if isinstance(value, functools.partial):
        return f"partial({_word(value.func)}, {_word(value.args)}, {_word(value.keywords)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_word(each)}' for key, each in value.items())}}}"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
    return type(value).__name__


def _genes(names: Any) -> str:
    return f"{len(names)} {_digest(np.asarray(names).astype(str))}"


def _digest(value: np.ndarray) -> str:
    array = np.ascontiguousarray(value)
    return hashlib.sha256(repr(array.tolist()).encode() if array.dtype.kind in "OU" else array.tobytes()).hexdigest()[
        :12
    ]
