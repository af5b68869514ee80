"""Design of a decoder: batches, categorical and continuous covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldvae_ext._validate import listed
from ldvae_ext.core._arrays import names_array, strings


@dataclass(frozen=True, eq=False)
class Covariate:
    """A covariate of a decoder.

    Parameters
    ----------
    name
        Its name, the column of ``adata.obs``.
    levels
        Its categories, if it is categorical; None if it is continuous.

    Examples
    --------
    >>> ldvae_ext.core.Covariate("donor", np.array(["a", "b", "c"])).n_columns
    3
    >>> ldvae_ext.core.Covariate("age").n_columns  # continuous
    1
    """

    name: str
    levels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(self, "levels", names_array(self.levels, len(self.levels), self.name))

    @property
    def n_columns(self) -> int:
        """Number of columns of the covariate in the design: one for each level, or one for a continuous covariate."""
        return 1 if self.levels is None else len(self.levels)


def checked_covariates(covariates: Any) -> tuple[Covariate, ...]:
    """The covariates as a tuple, or an error that names what is none."""
    for covariate in covariates:
        if not isinstance(covariate, Covariate):
            msg = f"`covariates` must be of class `Covariate`; got {covariate!r}."
            raise TypeError(msg)
    return tuple(covariates)


def level_codes(names: np.ndarray, values: Any, n_cells: int, argument: str = "batch") -> np.ndarray:
    """Position of each cell's level among ``names``; see :meth:`ldvae_ext.core.LinearDecoder.batch_codes`."""
    what, what_all = ("batch", "batches") if argument == "batch" else (f"level of {argument!r}", "its levels")
    if values is None:
        if len(names) > 1:
            msg = f"`{argument}` is needed, since this decoder has several; allowed are {listed(names)}."
            raise ValueError(msg)
        return np.zeros(n_cells, dtype=np.int64)
    given = np.asarray(values).ravel()
    if str(getattr(values, "dtype", "")) == "category":
        given = given.astype(str)
    if given.size not in (1, n_cells):
        msg = f"`{argument}` must be one {what} or one for each of {n_cells} cells; got {given.size}."
        raise ValueError(msg)
    if np.issubdtype(given.dtype, np.integer):
        own_codes = [str(code) for code in range(len(names))]
        if any(_is_number(name) for name in names) and names.tolist() != own_codes:
            msg = (
                f"`{argument}`: {given[0]} may be a code or a name, since {what_all} are named {listed(names)}; "
                "give names as str."
            )
            raise ValueError(msg)
        codes = given.astype(np.int64)
        unknown = given[(codes < 0) | (codes >= len(names))]
    else:
        code_of = {name: i for i, name in enumerate(names)}
        unique, inverse = np.unique(given.astype(str), return_inverse=True)
        codes = np.array([code_of.get(v, -1) for v in unique], dtype=np.int64)[inverse.ravel()]
        unknown = given[codes < 0]
    if unknown.size:
        msg = (
            f"`{argument}`: {unknown.tolist()[0]!r} is no {what} of this decoder; allowed are {listed(names)} "
            f"or 0 to {len(names) - 1}."
        )
        raise ValueError(msg)
    return np.broadcast_to(codes, (n_cells,))


def design_matrix(covariates: Sequence[Covariate], values: Any, n_cells: int) -> np.ndarray:
    """One-hot levels and continuous values of the covariates, side by side.

    Parameters
    ----------
    covariates
        The covariates, in the order of the columns.
    values
        A mapping or DataFrame from names to values, one for all cells or one for each; a DataFrame may have more columns.
    n_cells
        Number of cells.

    Returns
    -------
    Shape (cells, columns), float64.
    """
    names = [covariate.name for covariate in covariates]
    given = [] if values is None else list(values)
    missing, unknown = [n for n in names if n not in given], [n for n in given if n not in names]
    if hasattr(values, "columns"):
        unknown = []  # a table, such as the obs of cells, may hold more
    if missing or unknown:
        msg = (
            f"`covariates` must hold {listed(names) or 'nothing'}: missing {listed(missing) or 'none'}, "
            f"unknown {listed(unknown) or 'none'}."
        )
        raise ValueError(msg)
    design_nc = np.zeros((n_cells, sum(covariate.n_columns for covariate in covariates)))
    column = 0
    for covariate in covariates:
        if covariate.levels is None:
            value = _numbers(values[covariate.name])
            if value is None or value.size not in (1, n_cells) or not np.isfinite(value).all():
                got = f"{values[covariate.name]!r}" if value is None or value.size == 1 else f"{value.size} values"
                msg = (
                    f"`covariates`: {covariate.name!r} must be one finite number or one for each of {n_cells} cells; got {got}"
                    f"{'' if value is None or np.isfinite(value).all() else ', not all finite'}."
                )
                raise ValueError(msg)
            design_nc[:, column] = value
        else:
            codes = level_codes(covariate.levels, values[covariate.name], n_cells, covariate.name)
            design_nc[np.arange(n_cells), column + codes] = 1.0
        column += covariate.n_columns
    return design_nc


def covariates_to_arrays(covariates: Sequence[Covariate]) -> dict[str, np.ndarray]:
    """Arrays that hold the covariates; empty if there are none."""
    if not covariates:
        return {}
    levels = [level for covariate in covariates if covariate.levels is not None for level in covariate.levels]
    return {
        "covariate_names": strings([covariate.name for covariate in covariates]),
        # -1 marks a continuous covariate.
        "covariate_n_levels": np.array([-1 if c.levels is None else len(c.levels) for c in covariates]),
        "covariate_levels": strings(levels),
    }


def covariates_from_arrays(arrays: Any) -> tuple[Covariate, ...]:
    """Inverse of :func:`covariates_to_arrays`."""
    if "covariate_names" not in arrays:
        return ()
    levels, covariates = strings(arrays["covariate_levels"]), []
    names, sizes = strings(arrays["covariate_names"]), np.asarray(arrays["covariate_n_levels"]).ravel()
    if sizes.dtype.kind not in "iu" or len(sizes) != len(names) or sizes[sizes > 0].sum() != len(levels):
        msg = f"`covariate_n_levels` must hold the number of `covariate_levels` of {len(names)} covariates; got {listed(sizes)}."
        raise ValueError(msg)
    for name, n_levels in zip(names, sizes, strict=True):
        own, levels = (None, levels) if n_levels < 0 else (levels[:n_levels], levels[n_levels:])
        covariates.append(Covariate(str(name), own))
    return tuple(covariates)


def _numbers(value: Any) -> np.ndarray | None:
    try:
        return np.asarray(value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return None


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
