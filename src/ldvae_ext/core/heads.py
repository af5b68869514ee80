"""Dispersion and dropout of a likelihood, which may depend on the latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ldvae_ext.core.cells import EncodedCells

if TYPE_CHECKING:
    from ldvae_ext.core.decoder import LinearDecoder


def heads_at(
    decoder: LinearDecoder, z_nk: np.ndarray, batch: Any, covariates: Any, label: Any
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Dispersion and dropout logits, each None where the likelihood has none.

    Parameters
    ----------
    decoder
        The decoder.
    z_nk, batch, covariates
        See :meth:`ldvae_ext.core.LinearDecoder.scale`.
    label
        See :meth:`ldvae_ext.core.LinearDecoder.theta`.
    """
    theta = dropout_ng = None
    if decoder.likelihood != "poisson":
        theta = decoder.theta(batch, len(z_nk), label=label, z_nk=z_nk, covariates=covariates)
    if decoder.likelihood == "zinb":
        dropout_ng = decoder.dropout_logits(z_nk, batch, covariates)
    return theta, dropout_ng


def parameters_given(
    decoder: LinearDecoder, z_nk: np.ndarray, cells: EncodedCells, library: Any
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Mean, dispersion and dropout logits of given latents in the batches of given cells."""
    batch, label = decoder.batches[cells.batch], None if decoder.labels is None else decoder.labels[cells.label]
    mu_ng = decoder.rate(z_nk, batch, cells.covariates, library=library)
    return mu_ng, *heads_at(decoder, z_nk, batch, cells.covariates, label)
