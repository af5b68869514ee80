"""Fisher information of the counts about logits and latents, and rotations that weigh genes by it."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.derivatives import softplus_slope
from ldvae_ext.core.heads import parameters_given
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.rotation import varimax, with_signs


def log_mean_information(likelihood: str, mu_ng: np.ndarray, theta: Any = None, dropout_ng: Any = None) -> np.ndarray:
    """Fisher information of each count about the log of its mean.

    ``mu / (1 + mu / theta)`` for a negative binomial, ``mu`` for a Poisson, ``(mu / sigma)^2`` for a normal. Under zero
    inflation it is the information of the negative binomial times the probability of no dropout. This is an upper bound:
    dropouts cannot be distinguished from other zeros.

    Parameters
    ----------
    likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    mu_ng
        Means, shape (cells, genes), positive, in counts.
    theta
        Inverse dispersion, broadcast to (cells, genes); the standard deviation under ``"normal"``; not used by ``"poisson"``.
    dropout_ng
        Logits of zero inflation, shape (cells, genes); used by ``"zinb"`` only.

    Returns
    -------
    Shape (cells, genes), not negative.
    """
    if likelihood == "poisson":
        return mu_ng
    if likelihood == "normal":
        return np.square(mu_ng / theta)
    information_ng = mu_ng / (1 + mu_ng / theta)
    return information_ng * expit(-dropout_ng) if likelihood == "zinb" else information_ng


def logit_information(decoder: LinearDecoder, cells: EncodedCells) -> np.ndarray:
    """Information of each count about its logit, at the posterior mean.

    :func:`log_mean_information` times ``(d log mu / d logit)^2``, which is 1 under softmax up to the constant that
    all genes of a cell share, and ``(sigmoid / softplus)^2`` of the logit under softplus.

    Parameters
    ----------
    decoder
        The decoder.
    cells
        Posteriors of cells; counts are not used.

    Returns
    -------
    Shape (cells, genes), float64.
    """
    z_nk = deterministic_latent(np.asarray(cells.mean, dtype=np.float64), decoder.latent_distribution)
    mu_ng, theta, dropout_ng = parameters_given(decoder, z_nk, cells, cells.library)
    information_ng = log_mean_information(decoder.likelihood, mu_ng, theta, dropout_ng)
    if decoder.link == "softplus":
        information_ng = information_ng * np.square(softplus_slope(mu_ng / cells.library[:, None]))
    return information_ng


def fisher_varimax(decoder: LinearDecoder, weight_g: np.ndarray) -> np.ndarray:
    """Varimax of the loadings weighed by the root of their genes' information, :func:`information_loadings`.

    Parameters
    ----------
    decoder
        The decoder.
    weight_g
        As in :func:`information_loadings`.

    Returns
    -------
    Orthogonal, shape (latents, factors), float64.
    """
    return varimax(information_loadings(decoder, weight_g))


def information_loadings(decoder: LinearDecoder, weight_g: np.ndarray) -> np.ndarray:
    """Loadings in standard errors, up to a constant: ``W^1/2 L``, shape (genes, factors).

    Under softmax L is less its mean over genes with weights W, which is the constant that the softmax takes out.

    Parameters
    ----------
    decoder
        The decoder; its ``weight_gk`` are the loadings.
    weight_g
        Information of each gene about its logit, shape (genes,), not negative; its scale does not matter.
    """
    weight_g, weight_gk = np.asarray(weight_g, dtype=np.float64), decoder.weight_gk
    if decoder.link == "softmax" and weight_g.any():
        weight_gk = weight_gk - np.average(weight_gk, axis=0, weights=weight_g)
    return np.sqrt(weight_g)[:, None] * weight_gk


def fisher_rotation(decoder: LinearDecoder, mean_nk: np.ndarray, weight_g: np.ndarray) -> np.ndarray:
    """Orthogonal axes of the latent space, those first that matter most to the likelihood.

    To second order, leaving latents out costs ``|W^1/2 L (z - z')|^2 / 2`` nats, with the Fisher information W of the logits
    (:func:`logit_information`) and the loadings L, under softmax less their mean over genes with weights W: the constant
    that the softmax takes out. With the second moment C of the posterior means, which are replaced by 0, the best j
    directions are the first j right singular vectors of ``W^1/2 L C^1/2``, carried to the latent space by ``C^1/2``. They
    are made orthogonal one after another, so that the span of the first j stays.

    Parameters
    ----------
    decoder
        The decoder; its ``weight_gk`` are the loadings.
    mean_nk
        Posterior means, shape (cells, factors).
    weight_g
        Information of each gene about its logit, shape (genes,), not negative; its scale does not matter.

    Returns
    -------
    Orthogonal, shape (latents, factors), float64, columns in order: ``z @ R`` are the factors. Each column points to its
    longer tail of genes, as :meth:`ldvae_ext.core.LinearDecoder.signs` has it.
    """
    mean_nk = np.asarray(mean_nk, dtype=np.float64)
    value_k, vector_kk = np.linalg.eigh(mean_nk.T @ mean_nk / len(mean_nk))
    root_kk = (vector_kk * np.sqrt(np.maximum(value_k, 0.0))) @ vector_kk.T
    right_kk = np.linalg.svd(information_loadings(decoder, weight_g) @ root_kk, full_matrices=True)[2].T
    return with_signs(decoder, np.linalg.qr(root_kk @ right_kk)[0])
