"""A model on its network's axes, or on the axes of the rotation in force: decoders, posteriors, signs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from scvi import REGISTRY_KEYS

from ldvae_ext._validate import check_one_of, listed
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.levels import match_levels
from ldvae_ext.core.projection import CellPosteriors, posterior_of
from ldvae_ext.core.rotation import CONSENSUS, Rotation, with_signs
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._bridge import linear_decoder
from ldvae_ext.model._cells import CellStream, stream_cells
from ldvae_ext.model._registry import covariates_of, level_names

# Sources of posteriors: the network, or the decoder and the counts of a cell.
ENCODER, REFINED = "encoder", "refined"
UsePosterior = Literal["encoder", "refined"]


def network_decoder(model: LDVAEBase) -> LinearDecoder:
    """The decoder on the network's axes."""
    return linear_decoder(
        model.module,
        model.get_var_names(),
        level_names(model.registry, REGISTRY_KEYS.BATCH_KEY),
        model.latent_names,
        covariates_of(model.registry),
        level_names(model.registry, REGISTRY_KEYS.LABELS_KEY),
    )


def factor_decoder(model: LDVAEBase) -> LinearDecoder:
    """The decoder on the axes of the rotation in force, or on the network's."""
    decoder = network_decoder(model)
    return decoder if model.rotation is None else decoder.rotated(model.rotation.matrix_kk, model.rotation.names)


def canonical_signs(model: LDVAEBase, decoder: LinearDecoder) -> np.ndarray:
    """Sign of each factor, +1 or -1: towards the longer tail of genes, or as in the consensus."""
    is_consensus = model.rotation is not None and model.rotation.method == CONSENSUS
    return np.ones(model.n_latent, dtype=np.int64) if is_consensus else decoder.signs()


def put_in_force(model: LDVAEBase, rotation: Rotation) -> None:
    """Put a rotation in force, with canonical signs."""
    matrix_kk = with_signs(network_decoder(model), rotation.matrix_kk)
    model.rotation_ = {"matrix": matrix_kk, "method": rotation.method}


@contextmanager
def factor_stream(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    batch_size: int | None,
    dataloader: Any = None,
    *,
    use_posterior: str = ENCODER,
    silent: bool | None = None,
) -> Iterator[CellStream]:
    """Cells on the axes of the rotation in force, or on the network's, with the encoder's posteriors or refined ones."""
    with _stream(model, adata, indices, batch_size, dataloader, use_posterior, model.rotation, silent) as cells:
        yield cells


@contextmanager
def network_stream(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    batch_size: int | None,
    dataloader: Any = None,
    *,
    use_posterior: str = ENCODER,
    silent: bool | None = None,
) -> Iterator[CellStream]:
    """Cells on the network's axes, with the encoder's posteriors or refined ones."""
    with _stream(model, adata, indices, batch_size, dataloader, use_posterior, None, silent) as cells:
        yield cells


@contextmanager
def _stream(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    batch_size: int | None,
    dataloader: Any,
    use_posterior: str,
    rotation: Rotation | None,
    silent: bool | None,
) -> Iterator[CellStream]:
    check_one_of("use_posterior", use_posterior, (ENCODER, REFINED))
    if use_posterior == ENCODER:
        with stream_cells(model, adata, indices, batch_size, dataloader, rotation=rotation, silent=silent) as cells:
            yield cells
        return
    model._check_has_counts("use_posterior='refined'")
    # Posteriors are refined on the network's axes, where the prior is N(0, I).
    with stream_cells(model, adata, indices, batch_size, dataloader, silent=silent) as cells:
        decoder = network_decoder(model)
        yield cells._replace(chunks=(refined(decoder, chunk, rotation) for chunk in cells.chunks))


def refine(decoder: LinearDecoder, cells: EncodedCells) -> CellPosteriors:
    """Posteriors of encoded cells from the decoder, on the network's axes, searched from the encoder's means."""
    return posterior_of(
        decoder,
        cells.counts,
        decoder.batches[cells.batch],
        cells.covariates,
        # A cell without counts has an observed library of 0.
        np.where(cells.library > 0, cells.library, 1.0),
        None if decoder.labels is None else decoder.labels[cells.label],
        start_nk=cells.mean,
    )


def refined(decoder: LinearDecoder, cells: EncodedCells, rotation: Rotation | None = None) -> EncodedCells:
    """The cells with the modes and marginal variances of refined posteriors, on the network's axes or on rotated ones."""
    found = refine(decoder, cells)
    encoded = cells._replace(mean=found.mean_nk, variance=found.variance_nk)
    if rotation is None:
        return encoded
    matrix_kk = rotation.matrix_kk
    marginal_nk = np.einsum("ik,nij,jk->nk", matrix_kk, np.asarray(found.covariance_nkk), matrix_kk)
    return rotation.cells(encoded)._replace(variance=marginal_nk)


def network_posterior(
    model: LDVAEBase,
    adata: AnnData | None = None,
    indices: Any = None,
    batch_size: int | None = None,
    seen: Callable[[EncodedCells], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and variances of cells on the network's axes, shape (cells, latents) each; ``seen`` is given each chunk."""
    parts = []
    with stream_cells(model, adata, indices, batch_size) as cells:
        for chunk in cells.chunks:
            parts.append((chunk.mean.astype(np.float64), chunk.variance))
            if seen is not None:
                seen(chunk)
    if not parts:
        msg = "`indices` must choose at least one cell; got none."
        raise ValueError(msg)
    mean_nk, variance_nk = (np.concatenate(part) for part in zip(*parts, strict=True))
    return mean_nk, variance_nk


def transform_batch_codes(model: LDVAEBase, transform_batch: Any) -> list[int | None]:
    """Codes of batches given by their value in ``adata.obs``, as in scvi-tools; None for each cell's own batch."""
    if isinstance(transform_batch, str) or not isinstance(transform_batch, Iterable):
        transform_batch = [transform_batch]
    transform_batch = list(transform_batch)
    if not transform_batch:
        msg = "`transform_batch` must name at least one batch; got none."
        raise ValueError(msg)
    return [None if batch is None else _batch_code(model, "transform_batch", batch) for batch in transform_batch]


def known_batches(model: LDVAEBase, name: str, batches: Any) -> Any:
    """Batches, one or a list of them, as they are named in the set-up; None stays None."""
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        known = level_names(model.registry, REGISTRY_KEYS.BATCH_KEY).tolist()
        return None if batches is None else known[_batch_code(model, name, batches)]
    return [known_batches(model, name, batch) for batch in batches]


def _batch_code(model: LDVAEBase, name: str, batch: Any) -> int:
    known = level_names(model.registry, REGISTRY_KEYS.BATCH_KEY).tolist()
    code = int(match_levels(name, [batch], known)[0])
    if code < 0:
        msg = f"`{name}`: {batch!r} is no batch of this model; allowed are {listed(known)}."
        raise ValueError(msg)
    return code
