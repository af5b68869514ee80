"""A saved model in two files that hold no code: arrays in `weights.safetensors`, all else in `model.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldvae_ext._formats import PLAIN_MODEL, check_format
from ldvae_ext._scvi import SETUP_ARGS_KEY
from ldvae_ext._validate import listed

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
# Kinds of values in the JSON file other than those that JSON has.
_ARRAY, _VALUES, _TUPLE, _DICT, _FRAME = "array", "values", "tuple", "dict", "frame"
_NETWORK, _OF_DESCRIPTION = "network.", "description."


class CannotBeWritten(TypeError):
    """A value that only a pickle can hold."""


@dataclass(frozen=True)
class PlainModel:
    """What the two files hold."""

    registry: dict[str, Any]
    attributes: dict[str, Any]
    """Attributes of the model that end in an underscore, ``init_params_`` among them."""
    genes: np.ndarray
    state: dict[str, torch.Tensor]
    """State dict of the network."""

    def write(self, folder: Path, prefix: str = "") -> None:
        """Write both files.

        Parameters
        ----------
        folder, prefix
            Folder, and beginning of the names of the files.

        Raises
        ------
        CannotBeWritten
            If a value is neither a number, text, an array or table of these, nor a container of such values.
        """
        arrays: dict[str, torch.Tensor] = {}
        parts = {"registry": self.registry, "attributes": self.attributes, "genes": self.genes}
        description = {"format": PLAIN_MODEL, **{name: encoded(value, name, arrays) for name, value in parts.items()}}
        tensors = {f"{_NETWORK}{name}": value.detach().cpu().contiguous() for name, value in self.state.items()}
        (folder / f"{prefix}{DESCRIPTION}").write_text(json.dumps(description, indent=1))
        save_file(tensors | arrays, folder / f"{prefix}{WEIGHTS}")

    @classmethod
    def of(cls, model: Any) -> PlainModel:
        """What the two files hold of a model.

        Parameters
        ----------
        model
            The model.
        """
        attributes = {name: value for name, value in model._get_user_attributes() if name.endswith("_")}
        registry = attributes.pop("registry_")
        genes = np.asarray(model.get_var_names()).astype(str)
        return cls(registry, attributes, genes, model.module.state_dict())

    @classmethod
    def read(cls, folder: Path, prefix: str = "") -> PlainModel:
        """Read both files; no code that they could hold is run.

        Parameters
        ----------
        folder, prefix
            As in :meth:`write`.

        Raises
        ------
        ValueError
            If a file is missing, damaged or of another format.
        """
        paths = [folder / f"{prefix}{name}" for name in (DESCRIPTION, WEIGHTS)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            msg = (
                f"{folder} has no {listed(missing)}, which `trusted=False` reads. Earlier versions and LinearSCVI save a pickle alone, "
                "and opening a pickle runs code: if you trust it, open it with `trusted=True` and save it again."
            )
            raise ValueError(msg)
        try:
            description, tensors = json.loads(paths[0].read_text()), load_file(paths[1])
            check_format(DESCRIPTION, description["format"], PLAIN_MODEL)
            registry, attributes, genes = (
                decoded(description[name], tensors) for name in ("registry", "attributes", "genes")
            )
            if not (isinstance(registry, dict) and isinstance(attributes, dict) and isinstance(genes, np.ndarray)):
                msg = "it describes no model"
                raise ValueError(msg)
            if SETUP_ARGS_KEY not in registry:
                msg = "it has no arguments of a set-up"
                raise ValueError(msg)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"{folder} holds no model that can be read: {error}."
            raise ValueError(msg) from error
        state = {name.removeprefix(_NETWORK): value for name, value in tensors.items() if name.startswith(_NETWORK)}
        return cls(registry, attributes, genes, state)


def encoded(value: Any, where: str, arrays: dict[str, torch.Tensor]) -> Any:
    """A value as JSON has it; numeric arrays are added to the others.

    Parameters
    ----------
    value
        The value.
    where
        Its name, for the error.
    arrays
        Arrays by the names that stand for them in the JSON value.

    Raises
    ------
    CannotBeWritten
        If it is neither a number, text, an array or table of these, nor a container of such values.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):  # in registries of scvi-tools' data modules; read as an array
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            name = f"{_OF_DESCRIPTION}{len(arrays)}"
            arrays[name] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
            return {_ARRAY: name}
        return {_VALUES: [encoded(each, where, arrays) for each in value.tolist()], "kind": value.dtype.kind}
    if isinstance(value, (list, tuple)):
        items = [encoded(each, where, arrays) for each in value]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        items = [[encoded(key, where, arrays), encoded(each, f"{where}.{key}", arrays)] for key, each in value.items()]
        return {_DICT: items}
    if isinstance(value, pd.DataFrame):
        columns = {str(name): encoded(value[name].to_numpy(), where, arrays) for name in value}
        return {_FRAME: columns, "index": encoded(value.index.to_numpy(), where, arrays), "name": value.index.name}
    msg = f"`{where}` is a {type(value).__name__}"
    raise CannotBeWritten(msg)


def decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value that :func:`encoded` wrote.

    Parameters
    ----------
    value
        A JSON value.
    tensors
        Arrays by name.
    """
    if isinstance(value, list):
        return [decoded(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return tensors[value[_ARRAY]].numpy()
    if _VALUES in value:
        values = [decoded(each, tensors) for each in value[_VALUES]]
        return np.array(values, dtype=object if value["kind"] == "O" else str)
    if _TUPLE in value:
        return tuple(decoded(each, tensors) for each in value[_TUPLE])
    if _FRAME in value:
        index = pd.Index(decoded(value["index"], tensors), name=value["name"])
        return pd.DataFrame({name: decoded(column, tensors) for name, column in value[_FRAME].items()}, index=index)
    return {decoded(key, tensors): decoded(each, tensors) for key, each in value[_DICT]}
