"""Requests for ablations: checked arguments, groups, and plan of the replacements."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scvi
from anndata import AnnData
from scvi.utils import track

from ldvae_ext._groups import groups_of
from ldvae_ext._validate import warn
from ldvae_ext.core.cells import EncodedCells, has_fractions
from ldvae_ext.core.plan import AblationPlan, AblationRequest, LatentSummary
from ldvae_ext.model._axes import ENCODER, factor_decoder, factor_stream, transform_batch_codes
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import CellStream, given_cells, with_positions

# Name of the group of all cells without `groupby`.
_ALL = "all"
READ_TWICE = (
    "`dataloader` is read twice here, which an iterator cannot be; give a data loader or a list of minibatches."
)


def ablation_request(
    model: LDVAEBase, dataloader: Any, groupby: str | None, transform_batch: Any, **arguments: Any
) -> AblationRequest:
    """The arguments of an ablation, checked before any work is done."""
    if groupby is not None and dataloader is not None:
        msg = (
            "`groupby` needs the obs of an AnnData; a `dataloader` brings none. A data module of `setup_annbatch` is given as "
            "`adata`, with its obs."
        )
        raise ValueError(msg)
    codes = transform_batch_codes(model, transform_batch)
    if model._has_own_order and arguments.get("latents") is None and arguments.get("scheme") == "keep_top":
        arguments["latents"] = model.factor_names
    request = AblationRequest(
        decoder=factor_decoder(model), has_groups=groupby is not None, batches=tuple(codes), **arguments
    )
    if request.needs_latents and isinstance(dataloader, Iterator):
        raise TypeError(READ_TWICE)
    return request


def ablated_chunks(model: LDVAEBase, cells: CellStream, *, silent: bool | None) -> Iterable[EncodedCells]:
    """Chunks of the cells of an ablation, with a bar where one was requested, and a warning if values are not counts."""
    chunks = _with_fraction_warning(model, cells.chunks)
    return track(chunks, description="Ablating", total=cells.n_chunks, disable=silent is not False)


def _with_fraction_warning(model: LDVAEBase, chunks: Iterable[EncodedCells]) -> Iterator[EncodedCells]:
    """The chunks, with a warning if their values are not counts."""
    said = model.module.gene_likelihood == "normal"
    for chunk in chunks:
        if not said and has_fractions(chunk.counts):
            said = True
            warn("The data have values that are not integers; the likelihood is that of raw counts.")
        yield chunk


def groups_of_cells(
    model: LDVAEBase, adata: AnnData | None, groupby: str | None
) -> tuple[list[str], np.ndarray | None]:
    """Groups of all cells; without ``groupby`` they are one."""
    if groupby is None:
        return [_ALL], None
    return groups_of(given_cells(model, adata).obs, groupby)


def ablation_plan(
    model: LDVAEBase,
    request: AblationRequest,
    adata: AnnData | None,
    code_n: np.ndarray | None,
    batch_size: int | None,
    dataloader: Any,
    *,
    use_posterior: str = ENCODER,
) -> AblationPlan:
    """Plan of the replacements, from the latents of all cells if they are needed."""
    default_seed = 0 if scvi.settings.seed is None else scvi.settings.seed
    if not request.needs_latents:
        return request.plan(default_seed=default_seed)
    n_groups = 0 if code_n is None else code_n.max() + 1
    seen = LatentSummary(model.n_latent, n_groups, keep=request.mode == "permute")
    with factor_stream(model, adata, None, batch_size, dataloader, use_posterior=use_posterior) as cells:
        for chunk, at in with_positions(cells.chunks, cells.positions):
            seen.add(chunk.mean, chunk.variance, None if code_n is None else code_n[at], chunk.axes)
    return request.plan(seen, default_seed=default_seed)
