"""The plot of the cells in the report: places, factors and columns of obs in few bytes."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

# Points, at most.
MAX_POINTS = 20_000
# Columns of obs with so many levels can colour the cells; so many columns besides the populations.
LEVELS, MAX_COLUMNS = (2, 30), 8
EMBEDDINGS = ("X_umap", "X_tsne")


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def scatter(
    adata: AnnData,
    latent_nk: np.ndarray,
    names: list[str],
    columns: list[tuple[str, list[str], np.ndarray]],
) -> dict[str, Any]:
    """Coordinates in 16 bits, factors and columns of obs in 8 bits, of up to 20,000 cells."""
    known = [key for key in EMBEDDINGS if key in adata.obsm]
    at = np.arange(adata.n_obs)
    if len(at) > MAX_POINTS:
        at = np.sort(np.random.default_rng(0).choice(at, MAX_POINTS, replace=False))
    xy = np.asarray(adata.obsm[known[0]], dtype=np.float64)[:, :2] if known else latent_nk[:, : min(2, len(names))]
    if xy.shape[1] < 2:
        xy = np.column_stack([xy[:, 0], np.random.default_rng(0).random(len(xy))])
    xy = xy[at]
    low, span = xy.min(axis=0), np.ptp(xy, axis=0)
    scaled = np.rint((xy - low) / np.where(span > 0, span, 1) * 65535).astype("<u2")
    # Values beyond this are drawn in the colour of the end.
    limit_k = np.maximum(np.quantile(np.abs(latent_nk), 0.98, axis=0), 1e-6)
    shade = np.rint(127.5 + 127.5 * np.clip(latent_nk[at] / limit_k, -1, 1)).astype("u1")
    return {
        "axes": [f"{known[0].removeprefix('X_').upper()}{i}" for i in (1, 2)] if known else [*names[:2], "random"][:2],
        "n": len(at),
        "xy": _bytes(scaled),
        "factors": [_bytes(shade[:, k]) for k in range(len(names))],
        "limits": [float(value) for value in limit_k],
        "names": names,
        "columns": [
            {
                "name": name,
                "groups": groups,
                "codes": _bytes(code_n[at].astype("i1")),
                "colors": _group_colors(adata, name, groups),
            }
            for name, groups, code_n in columns
        ],
    }


def columns_of(
    adata: AnnData, groups: list[str], code_n: np.ndarray | None, groupby: str | None, info: Any
) -> list[tuple[str, list[str], np.ndarray]]:
    """Columns of obs that colour the cells: the populations, the batch, then others; with the groups and codes of each."""
    out = [] if groupby is None or code_n is None else [(groupby, groups, code_n)]
    batch = dict(info.get("setup", {})).get("batch_key")
    names = sorted((name for name in adata.obs.columns if name != groupby), key=lambda name: name != batch)
    most = len(out) + MAX_COLUMNS
    for name in names:
        values = pd.Series(adata.obs[name])
        is_categorical = isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.infer_dtype(values) in (
            "string",
            "boolean",
        )
        # scvi-tools keeps its codes in columns of its own.
        if len(out) == most or str(name).startswith("_scvi") or not (is_categorical or name == batch):
            continue
        column = pd.Categorical(values).remove_unused_categories()
        if LEVELS[0] <= len(column.categories) <= LEVELS[1]:
            out.append((str(name), [str(level) for level in column.categories], np.asarray(column.codes)))
    return out


def _group_colors(adata: AnnData, groupby: str, groups: list[str]) -> list[str]:
    """Colours of the groups in ``uns``, if there is one for each; else an empty list."""
    colors = adata.uns.get(f"{groupby}_colors")
    categories = [str(c) for c in pd.Categorical(pd.Series(adata.obs[groupby])).categories]
    if colors is None or len(colors) < len(categories):
        return []
    color_of = dict(zip(categories, (str(color) for color in colors), strict=False))
    return [color_of.get(group, "#888888") for group in groups]
