"""Set-up of a model: batches, labels, covariates, size factors; from AnnData or from a data module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scvi import REGISTRY_KEYS

from ldvae_ext.core import Covariate

# Arguments that LinearSCVI does not have. A model without them is saved without them, so that LinearSCVI can load it.
SETUP_ARGUMENTS = ("size_factor_key", "categorical_covariate_keys", "continuous_covariate_keys")


EMPTY_REGISTRY: dict[str, Any] = {"field_registries": {}, "setup_args": {}}


def registry_of(datamodule: Any) -> dict[str, Any]:
    """Registry of a data module, with numbers as names if it only has the number of levels."""
    given = getattr(datamodule, "registry", None)
    if given is not None:
        return given
    sizes = {key: int(getattr(datamodule, key, 1)) for key in ("n_batch", "n_labels")}
    genes = np.array([str(i) for i in range(datamodule.n_vars)])
    fields: dict[str, Any] = {
        REGISTRY_KEYS.X_KEY: {
            "data_registry": {"attr_name": "X", "attr_key": None},
            "state_registry": {"n_vars": len(genes), "column_names": genes},
            "summary_stats": {"n_vars": len(genes)},
        }
    }
    for key, size in zip((REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY), sizes, strict=True):
        fields[key] = {
            "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{key}"},
            "state_registry": {"categorical_mapping": np.arange(sizes[size]), "original_key": None},
            "summary_stats": {size: sizes[size]},
        }
    return {"setup_method_name": "setup_datamodule", "setup_args": {"layer": None}, "field_registries": fields}


def state_of(registry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """State registry of a field; empty if there is none."""
    return registry.get("field_registries", {}).get(key, {}).get("state_registry") or {}


def level_names(registry: Mapping[str, Any], key: str) -> np.ndarray:
    """Names of the batches or labels of a registry; ``["0"]`` if none were registered."""
    mapping = state_of(registry, key).get("categorical_mapping")
    # Data modules store a dictionary from names to codes, or None.
    return np.asarray(["0"] if mapping is None else list(mapping))


def covariates_of(registry: Mapping[str, Any]) -> tuple[Covariate, ...]:
    """Covariates of a registry, continuous ones first, as in the network."""
    continuous = state_of(registry, REGISTRY_KEYS.CONT_COVS_KEY).get("columns", ())
    categorical = state_of(registry, REGISTRY_KEYS.CAT_COVS_KEY)
    # The key of data modules is "mapping".
    levels = categorical.get("mappings", categorical.get("mapping", {}))
    return (
        *(Covariate(str(name)) for name in continuous),
        *(Covariate(str(name), np.asarray(levels[name])) for name in categorical.get("field_keys", ())),
    )


def has_size_factors(registry: Mapping[str, Any]) -> bool:
    """True if cells have size factors."""
    return bool(registry.get("setup_args", {}).get("size_factor_key"))


def known_levels(registry: Mapping[str, Any]) -> dict[str, tuple[str, np.ndarray]]:
    """Argument and levels of each categorical column that unseen cells must have, by column."""
    known = {}
    for argument, field in (("batch_key", REGISTRY_KEYS.BATCH_KEY), ("labels_key", REGISTRY_KEYS.LABELS_KEY)):
        key = registry.get("setup_args", {}).get(argument)
        if key is not None:
            known[key] = (argument, level_names(registry, field))
    for covariate in covariates_of(registry):
        if covariate.levels is not None:
            known[covariate.name] = ("categorical_covariate_keys", covariate.levels)
    return known
