"""Exported gene programs as tables."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._formats import PROGRAMS, check_format
from ldvae_ext._keys import PROGRAMS_KEY, program_keys
from ldvae_ext._validate import check_one_of
from ldvae_ext.core._arrays import strings
from ldvae_ext.get._export import check_is_annotated

What = Literal["scores", "errors", "profiles", "usages", "stats"]


def programs(adata: AnnData, what: What = "scores", *, key: str = PROGRAMS_KEY) -> pd.DataFrame:
    """Gene programs that were written to an AnnData.

    Parameters
    ----------
    adata
        AnnData that :meth:`ldvae_ext.model.Programs.export_to_anndata` wrote to.
    what
        ``"scores"``, ``"errors"`` or ``"profiles"``, genes of the model x programs; ``"usages"``, cells x programs; ``"stats"``: one
        row for each program with ``usage``, ``stability`` and ``lowest``. See :class:`ldvae_ext.model.Programs`.
    key
        ``key_added`` of the programs.

    Raises
    ------
    KeyError
        If there are no programs under this key.

    Examples
    --------
    >>> model.get_programs(5).export_to_anndata(adata)
    >>> usages = ldvae_ext.get.programs(adata, "usages")
    >>> usages.shape
    (700, 5)
    >>> bool(np.allclose(usages.sum(axis=1), 1))
    True
    """
    check_is_annotated(adata)
    check_one_of("what", what, get_args(What))
    info, keys = adata.uns.get(key, {}), program_keys(key)
    if not is_programs(info):
        msg = f"No programs {key!r} in `adata.uns`; `LDVAE.get_programs().export_to_anndata(adata)` writes them."
        raise KeyError(msg)
    check_format(f"`adata.uns[{key!r}]`", info.get("format"), PROGRAMS)
    names = strings(info["names"])
    if what == "stats":
        values = {name: np.asarray(info[name]) for name in ("usage", "stability", "lowest")}
        return pd.DataFrame(values, index=pd.Index(names, name="program"))
    if what == "usages":
        value_nk, index = np.asarray(adata.obsm[keys.usages]), adata.obs_names
    else:
        name = {"scores": keys.scores, "errors": keys.errors, "profiles": keys.profiles}[what]
        value_nk, index = np.asarray(adata.varm[name]), adata.var_names
    # Genes and cells that the programs do not have are NaN; scores of a constant gene are 0, their errors NaN.
    known = ~np.isnan(np.asarray(adata.varm[keys.profiles] if what != "usages" else value_nk)).any(axis=1)
    return pd.DataFrame(value_nk[known], index=index[known], columns=names)


def is_programs(info: Any) -> bool:
    """True if an entry of ``uns`` describes exported programs."""
    return hasattr(info, "keys") and "relations" in info
