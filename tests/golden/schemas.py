"""Names, types and axes of all that is in files, without the values."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TEXT = "text"
_SLOTS = ("obs", "var", "obsm", "varm", "uns")


def schema_of(folder: Path) -> dict[str, Any]:
    """Schema of the files in a folder: a name and a type for each array, table and number.

    Parameters
    ----------
    folder
        Folder of an example. `expected.json` and `schema.json` are no part of it, nor are the runs of an ensemble, which are saved
        models with a number of their own.
    """
    out: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        is_run = any(name.startswith("run-") for name in path.relative_to(folder).parts[:-1])
        if path.is_dir() or is_run or path.name in ("expected.json", "schema.json"):
            continue
        out[path.relative_to(folder).as_posix()] = _READERS[path.suffix](path)
    return out


def kind_of(value: Any) -> str:
    """Type and number of axes of a value, the same for all that a file may give back for it."""
    if isinstance(value, (str, bytes)):
        return TEXT
    if value is None:
        return "none"
    array = np.asarray(value)
    kind = {"O": TEXT, "U": TEXT, "T": TEXT, "S": TEXT, "b": "bool", "i": "int", "u": "int"}.get(array.dtype.kind)
    if array.dtype.names is not None:
        return "record[" + ", ".join(kind_of(np.empty(1, array.dtype[name])) for name in array.dtype.names) + "]"
    return f"{array.dtype if kind is None else kind} x{array.ndim}"


def of_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of a dictionary of values."""
    return {
        str(name): of_mapping(value) if hasattr(value, "items") else kind_of(value) for name, value in values.items()
    }


def of_anndata(adata: Any, given: Any) -> dict[str, Any]:
    """Schema of what was added to the fields of an AnnData.

    Parameters
    ----------
    adata
        The AnnData.
    given
        Names of fields that were there before, by slot.
    """
    out: dict[str, Any] = {}
    for slot in _SLOTS:
        table = getattr(adata, slot)
        values = {name: table[name] for name in table if name not in given.get(slot, ())}
        if slot in ("obs", "var"):
            values = {
                name: np.asarray(column.astype(str) if isinstance(column.dtype, pd.CategoricalDtype) else column)
                for name, column in values.items()
            }
        if values:
            out[slot] = of_mapping(values)
    return out


def _of_h5ad(path: Path) -> dict[str, Any]:
    import anndata as ad

    # scvi-tools' own entries.
    given = {
        "obs": ("batch", "group", "age", "_scvi_batch", "_scvi_labels"),
        "uns": ("_scvi_uuid", "_scvi_manager_uuid"),
    }
    return of_anndata(ad.read_h5ad(path), given)


def _of_npz(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: kind_of(arrays[name]) for name in arrays.files}


def _of_csv(path: Path) -> list[str]:
    with path.open() as file:
        return next(csv.reader(file))


def _of_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if path.name == "model.json":
        return {name: value if name == "format" else type(value).__name__ for name, value in content.items()}
    if path.name == "ensemble.json":
        return {name: of_encoded(value) if name == "results" else kind_of(value) for name, value in content.items()}
    if path.name == "arguments.json":
        return {"format": content["format"], "arguments": of_mapping(content["arguments"])}
    return {name: value if name in ("format", "files") else kind_of(value) for name, value in content.items()}


def of_encoded(value: Any) -> Any:
    """Schema of a value as JSON without pickles holds it: dictionaries as pairs, arrays by their names."""
    if isinstance(value, dict) and set(value) == {"dict"}:
        return {name: of_encoded(part) for name, part in value["dict"]}
    return sorted(value) if isinstance(value, dict) else kind_of(value)


def _of_tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    if path.name != "weights.safetensors":
        return {name: kind_of(value.numpy()) for name, value in tensors.items()}
    return {name: kind_of(value.numpy()) for name, value in tensors.items() if name.startswith("network.")}


def _of_model(path: Path) -> dict[str, Any]:
    """Attributes of a pickled model that stock scvi-tools does not write."""
    import torch
    from scvi.model import LinearSCVI

    saved = torch.load(path, map_location="cpu", weights_only=False)
    attributes = saved["attr_dict"]
    names = sorted(name for name in attributes if not hasattr(LinearSCVI, name) and name not in _OF_SCVI)
    return {"keys": sorted(saved), "attributes": {name: type(attributes[name]).__name__ for name in names}}


# Attributes that scvi-tools' own models are saved with.
_OF_SCVI = (
    "get_normalized_function_name_", "history_", "init_params_", "is_trained_", "registry_", "run_id_", "run_name_", "test_indices_", "train_indices_",
    "validation_indices_", "was_pretrained",
)  # fmt: skip


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """What the package adds to a checkpoint of Lightning."""
    import torch

    added = torch.load(path, map_location="cpu", weights_only=True)["ldvae_ext"]
    return {name: value if name == "format" else type(value).__name__ for name, value in added.items()}


_READERS = {
    ".h5ad": _of_h5ad,
    ".npz": _of_npz,
    ".csv": _of_csv,
    ".json": _of_json,
    ".safetensors": _of_tensors,
    ".pt": _of_model,
    ".ckpt": _of_checkpoint,
}
