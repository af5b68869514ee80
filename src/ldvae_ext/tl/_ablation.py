"""Ablation of exported latents, without the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._docs import fill_docstring
from ldvae_ext._groups import gene_ablation, groups_of, table_of
from ldvae_ext._keys import ABLATION_INFO, DEFAULT_KEY
from ldvae_ext._row_store import check_store, table_of_cells
from ldvae_ext._validate import cell_positions, check_positive_int, factor_indices
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.plan import AblationPlan, AblationRequest, LatentSummary, Mode, Scheme, value_of_each
from ldvae_ext.get._export import factors
from ldvae_ext.tl._cells import ExportedCells

CHUNK_SIZE = 1024


@fill_docstring
def ablate(
    adata: AnnData,
    latents: Any = None,
    mode: Mode = "zero",
    *,
    layer: str | None = None,
    key: str = DEFAULT_KEY,
    indices: Any = None,
    value: Any = None,
    groupby: str | None = None,
    scheme: Scheme = "leave_out",
    refit_heads: bool = False,
    use_posterior: Literal["mean", "samples"] = "mean",
    n_samples: int | None = None,
    seed: int | None = None,
    transform_batch: Any = None,
    chunk_size: int = CHUNK_SIZE,
    store: str | Path | None = None,
) -> AnnData:
    """Change of each cell's negative log-likelihood when latents are taken out, from an export.

    Equals :meth:`ldvae_ext.model.LDVAE.ablate` up to rounding, without torch: latents, library sizes and the decoder come
    from the export, counts and batches from ``adata``.

    Parameters
    ----------
    %(adata_of_export)s
    %(latents)s
        Positions and the default of that order are those of the export.
    %(mode)s
    %(layer)s
    %(key)s
    %(indices)s
    %(value)s
        Numbers are in the exported order and signs. If ``latents`` is None and the scheme is ``"leave_out"``, the names of
        a mapping are also the latents.
    %(groupby_of_mode)s
    %(scheme)s
    %(refit_heads)s
    %(use_posterior)s
    %(n_samples)s
    %(seed)s
        The seed is 0 if None.
    %(transform_batch)s
    %(chunk_size)s
    %(store)s

    Returns
    -------
    AnnData, cells x sets of latents, in the exported order. ``X`` is float64, in nats per cell: positive where the latents
    help to explain the cell, negative where they hurt. ``obs`` is a copy; ``uns["ldvae_ablation"]`` describes the ablation, and
    ``var["flag"]`` has the flags of :func:`ldvae_ext.get.factors`, if there are any.

    Raises
    ------
    KeyError
        If there is no such export, layer or column.
    ValueError
        If genes of the model are missing, the matrix does not hold counts, a latent, mode, batch or group does not exist, or
        an argument has no use in the mode.

    Examples
    --------
    >>> effects = ldvae_ext.tl.ablate(adata)
    >>> effects.shape
    (700, 5)
    >>> monocytes = adata.obs["bulk_labels"] == "CD14+ Monocyte"
    >>> effects[monocytes].to_df().mean().idxmax()  # what they need most
    'Z_...'
    """
    work = _ExportAblation(
        adata,
        key,
        layer,
        chunk_size,
        groupby,
        latents=latents,
        mode=mode,
        value=value,
        scheme=scheme,
        refit_heads=refit_heads,
        use_posterior=use_posterior,
        n_samples=n_samples,
        seed=seed,
        transform_batch=transform_batch,
    )
    work.request.reject_unused_groups()
    if store is not None:
        check_store(store, table_of(adata.obs))
    positions = cell_positions(indices, adata.n_obs)
    chunks = work.chunks(positions)
    plan = work.plan()
    in_order = work.in_order(plan.names)
    return table_of_cells(
        (plan.effects(work.request.decoder, cells, at, work.code_n[at])[:, in_order] for cells, at in chunks),
        obs=table_of(adata.obs).iloc[positions].copy(),
        var=_described(adata, key, [plan.names[column] for column in in_order]),
        uns={ABLATION_INFO: work.description(plan, groupby)},
        store=store,
    )


@fill_docstring
def ablate_genes(
    adata: AnnData,
    groupby: str | None = None,
    latents: Any = None,
    *,
    mode: Mode = "zero",
    layer: str | None = None,
    key: str = DEFAULT_KEY,
    indices: Any = None,
    value: Any = None,
    scheme: Scheme = "leave_out",
    refit_heads: bool = False,
    use_posterior: Literal["mean", "samples"] = "mean",
    n_samples: int | None = None,
    seed: int | None = None,
    transform_batch: Any = None,
    chunk_size: int = CHUNK_SIZE,
) -> AnnData:
    """Contribution of each gene to the effect of an ablation, averaged over the cells of each group, from an export.

    Equals :meth:`ldvae_ext.model.LDVAE.ablate_genes` up to rounding, without torch. The sum over genes is the mean effect of
    :func:`ablate` in the group.

    Parameters
    ----------
    %(adata_of_export)s
    %(groupby)s
    %(latents)s
        Positions and the default of that order are those of the export.
    %(mode)s
    %(layer)s
    %(key)s
    %(indices)s
    %(value)s
        Numbers are in the exported order and signs. If ``latents`` is None and the scheme is ``"leave_out"``, the names of
        a mapping are also the latents.
    %(scheme)s
    %(refit_heads)s
    %(use_posterior)s
    %(n_samples)s
    %(seed)s
        The seed is 0 if None.
    %(transform_batch)s
    %(chunk_size)s

    Returns
    -------
    AnnData, (groups x genes) x sets of latents, in the exported order; :func:`ldvae_ext.get.gene_ablation_df` reads it as a
    long table. ``X`` is float64, in nats per cell of the group; ``obs`` has ``group``, ``gene`` and ``n_cells``;
    ``uns["ldvae_ablation"]`` describes the ablation.

    Raises
    ------
    KeyError, ValueError
        As for :func:`ablate`.

    Examples
    --------
    >>> genes = ldvae_ext.tl.ablate_genes(adata, "bulk_labels")
    >>> ldvae_ext.get.gene_ablation_df(genes, factor=0).columns.tolist()
    ['group', 'factor', 'gene', 'n_cells', 'mean', 'share']
    """
    work = _ExportAblation(
        adata,
        key,
        layer,
        chunk_size,
        groupby,
        latents=latents,
        mode=mode,
        value=value,
        scheme=scheme,
        refit_heads=refit_heads,
        use_posterior=use_posterior,
        n_samples=n_samples,
        seed=seed,
        transform_batch=transform_batch,
    )
    chunks = work.chunks(cell_positions(indices, adata.n_obs))
    plan, genes = work.plan(), work.request.decoder.genes
    n_p = np.zeros(len(work.groups), dtype=np.int64)
    total_pgs = np.zeros((len(work.groups), len(genes), len(plan.sets)))
    for cells, at in chunks:
        group_n = work.code_n[at]
        plan.add_gene_effects(total_pgs, work.request.decoder, cells, at, group_n)
        n_p += np.bincount(group_n[group_n >= 0], minlength=len(n_p))
    in_order = work.in_order(plan.names)
    names = [plan.names[column] for column in in_order]
    ablation = gene_ablation(total_pgs[:, :, in_order], n_p, work.groups, genes, names, work.description(plan, groupby))
    ablation.var = _described(adata, key, names)
    return ablation


def _described(adata: AnnData, key: str, names: list[str]) -> pd.DataFrame:
    """Table of the sets of latents, with the flags of single factors if the export has them."""
    table, index = factors(adata, key=key), pd.Index(names)
    if "flag" not in table:
        return pd.DataFrame(index=index)
    return pd.DataFrame({"flag": table["flag"].reindex(index, fill_value="").to_numpy(dtype=object)}, index=index)


class _ExportAblation:
    """Ablation requested in the exported order and signs, computed in those of the network."""

    def __init__(
        self,
        adata: AnnData,
        key: str,
        layer: str | None,
        chunk_size: int,
        groupby: str | None,
        *,
        latents: Any,
        value: Any,
        scheme: str,
        transform_batch: Any,
        **arguments: Any,
    ) -> None:
        check_positive_int("chunk_size", chunk_size)
        self._layer, self._chunk_size = layer, chunk_size
        self.exported = exported = ExportedCells(adata, key)
        if latents is None:
            latents = exported.names if scheme == "keep_top" else None
        elif isinstance(latents, Mapping):
            latents = {name: self._named(members) for name, members in latents.items()}
        else:
            latents = self._named(latents)
        self.request = AblationRequest(
            decoder=exported.decoder,
            latents=latents,
            value=self._in_network_signs(value),
            scheme=scheme,
            has_groups=groupby is not None,
            batches=exported.batch_codes(transform_batch),
            **arguments,
        )
        self.groups, self.code_n = ["all"], np.zeros(adata.n_obs, dtype=np.int64)
        if groupby is not None:
            self.groups, self.code_n = groups_of(adata.obs, groupby)

    def _named(self, latents: Any) -> list[str]:
        names = self.exported.names
        given = [latents] if isinstance(latents, (str, int, np.integer)) else list(latents)
        factor_indices(given, names)
        return [names[factor_indices([latent], names)[0]] for latent in given]

    def _in_network_signs(self, value: Any) -> Any:
        names, signs = self.exported.names, self.exported.signs
        if value is None:
            return None
        frame = replace(self.exported.decoder, factors=np.asarray(names))
        given_k = value_of_each(frame, value)[0]
        return {name: given_k[k] * signs[k] for k, name in enumerate(names) if not np.isnan(given_k[k])}

    def chunks(self, positions: np.ndarray) -> Iterator[tuple[EncodedCells, np.ndarray]]:
        """Cells at these positions, in chunks; see :meth:`ExportedCells.chunks`."""
        return self.exported.chunks(positions, self._chunk_size, self._layer)

    def plan(self) -> AblationPlan:
        """Plan of the replacements, from the exported latents where they are needed."""
        if not self.request.needs_latents:
            return self.request.plan()
        exported = self.exported
        summary = LatentSummary(len(exported.names), len(self.groups), keep=self.request.mode == "permute")
        summary.add(exported.mean(), exported.variance(), self.code_n, exported.axes())
        return self.request.plan(summary)

    def description(self, plan: AblationPlan, groupby: str | None) -> dict[str, Any]:
        """Description of the ablation for ``uns``, in the exported order and signs."""
        info = self.request.description(plan, groupby)
        if "value" in info:
            info["value"] = info["value"][self.exported.order] * self.exported.signs
            info["value_of"] = np.asarray(self.exported.names)
        return info

    def in_order(self, names: list[str]) -> list[int]:
        """Columns of an ablation in the exported order; as they are if they are sets of latents."""
        if not set(names) <= set(self.exported.names) or isinstance(self.request.latents, Mapping):
            return list(range(len(names)))
        return [names.index(name) for name in self.exported.names if name in names]
