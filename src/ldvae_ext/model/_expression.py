"""Decoded expression of posterior means, minibatch by minibatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.utils import track

from ldvae_ext.core._decode import put_scale
from ldvae_ext.core._design import design_matrix
from ldvae_ext.core._expression import check_library_size, gene_positions
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.rotation import Rotation
from ldvae_ext.model._axes import network_decoder, transform_batch_codes
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._cells import stream_cells, with_positions
from ldvae_ext.model._threads import with_torch_threads


@with_torch_threads
def posterior_mean_expression(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    transform_batch: Any,
    gene_list: list[str] | None,
    library_size: float | str,
    batch_size: int | None,
    return_numpy: bool | None,
    silent: bool | None,
    dataloader: Any,
    data_loader_kwargs: dict | None = None,
    edit: Callable[[EncodedCells, np.ndarray], np.ndarray] = lambda cells, _: cells.mean.astype(np.float64),
    rotation: Rotation | None = None,
) -> np.ndarray | pd.DataFrame:
    """Decode the posterior mean, minibatch by minibatch, or the result of ``edit`` on cells and their positions."""
    decoder = network_decoder(model)
    decoder = decoder if rotation is None else decoder.rotated(rotation.matrix_kk, rotation.names)
    genes = gene_positions(decoder.genes, gene_list)
    check_library_size(library_size)
    codes = transform_batch_codes(model, transform_batch)

    def decode(cells: EncodedCells, position_n: np.ndarray, out_ng: np.ndarray) -> None:
        z_nk = deterministic_latent(edit(cells, position_n), decoder.latent_distribution)
        library_n = np.broadcast_to(cells.library if isinstance(library_size, str) else library_size, (len(z_nk),))
        design_nc = design_matrix(decoder.covariates, cells.covariates, len(z_nk)) if decoder.covariates else None
        for code in codes:
            batch_n = cells.batch if code is None else np.full(len(z_nk), code)
            put_scale(decoder, out_ng, z_nk, batch_n, design_nc, library_n, genes=genes, share=1 / len(codes))

    with stream_cells(
        model, adata, indices, batch_size, dataloader, data_loader_kwargs, rotation, silent=silent
    ) as cells:
        chunks = track(cells.chunks, description="Decoding", total=cells.n_chunks, disable=silent is not False)
        located = with_positions(chunks, cells.positions)
        if cells.obs is None:
            parts = []
            for chunk, at in located:
                parts.append(np.zeros((len(at), len(genes)), dtype=np.float32))
                decode(chunk, at, parts[-1])
            return np.concatenate(parts)
        out = np.zeros((len(cells.obs), len(genes)), dtype=np.float32)
        start = 0
        for chunk, at in located:
            decode(chunk, at, out[start : start + len(at)])
            start += len(at)
        return out if return_numpy else pd.DataFrame(out, index=cells.obs.index, columns=decoder.genes[genes])
