"""Columns of obs as the tensors of a network, by a registry alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS

from ldvae_ext._validate import listed
from ldvae_ext.core.levels import match_levels
from ldvae_ext.model._registry import covariates_of, level_names


class Columns:
    """Batches, labels and covariates of cells, in the codes of a registry.

    Parameters
    ----------
    registry
        Registry of a model or of a data module.
    """

    def __init__(self, registry: dict[str, Any]) -> None:
        given = registry.get("setup_args", {})
        self._levels = {
            field: (given.get(key), level_names(registry, field))
            for key, field in (("batch_key", REGISTRY_KEYS.BATCH_KEY), ("labels_key", REGISTRY_KEYS.LABELS_KEY))
        }
        self._covariates = covariates_of(registry)

    def of(self, obs: pd.DataFrame | None, n_cells: int) -> dict[str, np.ndarray]:
        """Arrays by the keys of scvi-tools' registry, shape (cells, columns) each.

        Parameters
        ----------
        obs
            Columns of the cells; None if none are needed.
        n_cells
            Number of cells.
        """
        fields = {
            field: np.zeros((n_cells, 1), np.int64) if key is None else _column(obs, key, levels)
            for field, (key, levels) in self._levels.items()
        }
        for field, is_categorical in ((REGISTRY_KEYS.CAT_COVS_KEY, True), (REGISTRY_KEYS.CONT_COVS_KEY, False)):
            columns = [
                _column(obs, c.name, c.levels) for c in self._covariates if (c.levels is not None) == is_categorical
            ]
            if columns:
                fields[field] = np.concatenate(columns, axis=1)
        return fields


def _column(obs: Any, key: str, levels: np.ndarray | None) -> np.ndarray:
    if levels is None:
        return obs[key].to_numpy(np.float32, copy=True)[:, None]
    code_n, values = pd.factorize(obs[key], use_na_sentinel=False)
    code_of = np.asarray(match_levels(key, list(values), list(levels)), dtype=np.int64)
    if (code_of < 0).any():
        unseen = [value for value, code in zip(values, code_of, strict=True) if code < 0]
        msg = f"`{key}`: the model has not seen {listed(unseen)}; it has {listed(levels)}."
        raise ValueError(msg)
    return code_of[code_n][:, None]
