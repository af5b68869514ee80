"""scvi-tools' fields of an AnnData, with genes and levels matched by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scvi.data.fields import CategoricalObsField, LayerField

from ldvae_ext._scvi import StableCategoriesField
from ldvae_ext._validate import listed
from ldvae_ext.core.levels import level_text, match_levels
from ldvae_ext.model._fingerprint import compare_genes
from ldvae_ext.model._registry import known_levels


class CountsField(LayerField):
    """scvi-tools' field of counts, which also takes scipy's sparse arrays, and genes only in the order of the set-up.

    The check of scvi-tools on twenty values does not read sparse arrays. For other matrices it is kept, since it draws
    from numpy's global random state, which a LinearSCVI script may use.
    """

    def validate_field(self, adata: AnnData) -> None:
        """Check that the field is there."""
        self.is_count_data = not isinstance(self.get_field_data(adata), sparse.sparray)
        super().validate_field(adata)

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Register other cells, whose genes must be those of a set-up in the same order."""
        known = np.asarray(state_registry[self.COLUMN_NAMES_KEY]).astype(str)
        names = np.asarray(adata_target.var_names).astype(str)
        if len(names) != len(known):
            msg = f"`adata` must have the {len(known)} genes of the model; it has {len(names)}, and lacks {listed(known[~np.isin(known, names)]) or 'none'}."
            raise ValueError(msg)
        compare_genes(names, known)
        return super().transfer_field(state_registry, adata_target, **kwargs)


class LevelsField(CategoricalObsField):
    """scvi-tools' field of a categorical column, with levels matched by :func:`ldvae_ext.core.levels.match_levels`."""

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Register other cells with the levels of a set-up."""
        known = {} if self.is_default else {self._original_attr_key: state_registry[self.CATEGORICAL_MAPPING_KEY]}
        with _matched_columns(adata_target, known, kwargs):
            return super().transfer_field(state_registry, adata_target, **kwargs)


class CovariatesField(StableCategoriesField):
    """scvi-tools' field of categorical covariates, with levels matched by :func:`ldvae_ext.core.levels.match_levels`."""

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Register other cells with the levels of a set-up."""
        with _matched_columns(adata_target, state_registry.get(self.MAPPINGS_KEY, {}), kwargs):
            return super().transfer_field(state_registry, adata_target, **kwargs)


@contextmanager
def _matched_columns(adata: AnnData, known: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, columns of obs have the known levels; scvi-tools reads them by name. The user's columns are put back."""
    obs: Any = adata.obs
    given = {key: obs[key] for key in known if key in obs}
    extend = options.get("extend_categories", False)
    matched = {key: matched_column(column, known[key], key, extend=extend) for key, column in given.items()}
    try:
        for key, column in matched.items():
            obs[key] = column
        yield
    finally:
        for key, column in given.items():
            obs[key] = column


def check_levels_fit(adata: AnnData, registry: Mapping[str, Any] | None, *, extend: bool) -> None:
    """Raise if the columns of cells cannot have the levels of a registry, before anything is written; see :func:`matched_column`."""
    for key, (_, levels) in known_levels(registry or {}).items():
        if key in adata.obs:
            matched_column(pd.Series(adata.obs[key]), levels, key, extend=extend)


def matched_column(column: pd.Series, levels: Any, name: str, *, extend: bool = False) -> pd.Series:
    """A column with known levels written as they are known, and new ones in the same type.

    Parameters
    ----------
    column
        Values of the cells.
    levels
        Known levels.
    name
        Name of the column in messages.
    extend
        True to allow new levels.

    Raises
    ------
    ValueError
        If a level is unknown and may not be, or if two values would be one level.
    TypeError
        If a new level cannot be written in the type of the known ones.
    """
    code_n, unique = pd.factorize(column, use_na_sentinel=False)
    values, levels = list(unique), np.asarray(levels)
    position = match_levels(name, values, levels.tolist())
    new = [value for value, at in zip(values, position, strict=True) if at < 0]
    if new and not extend:
        msg = f"`{name}`: the model has not seen {listed(new)}; it has {listed(levels)}."
        raise ValueError(msg)
    written = [
        levels[at] if at >= 0 else _like(value, levels, name) for value, at in zip(values, position, strict=True)
    ]
    if len(set(written)) < len(written):
        again = next(value for value in written if written.count(value) > 1)
        msg = f"`{name}`: several of {listed(values)} would be the level {again!r}; give each level one name."
        raise ValueError(msg)
    names = np.array(written, dtype=object if levels.dtype == object else None)
    return pd.Series(names[code_n], index=column.index, name=column.name)


def _like(value: Any, levels: np.ndarray, name: str) -> Any:
    """A new level in the type of the known ones."""
    known: Sequence[Any] = levels.tolist()
    value = value.item() if isinstance(value, np.generic) else value
    if all(isinstance(level, str) for level in known):
        return level_text(value)
    if all(isinstance(level, bool) for level in known):
        is_alike = isinstance(value, bool)
    else:
        if isinstance(value, str):
            for kind in (int, float):
                # Only as a number is written: not "07" or "1e1", which may be meant as other levels than 7 or 10.
                with suppress(ValueError):
                    value = kind(value) if str(kind(value)) == value and np.isfinite(kind(value)) else value
                if not isinstance(value, str):
                    break
        if isinstance(value, float) and value.is_integer() and all(isinstance(level, int) for level in known):
            value = int(value)
        is_alike = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_alike:
        msg = (
            f"`{name}`: the new level {value!r} is {type(value).__name__}, and the known ones are {listed(known)}. Write all of them as "
            "text before the set-up: `adata.obs[key] = adata.obs[key].astype(str)`."
        )
        raise TypeError(msg)
    return value
