"""The summands of a paired difference, one for each count, by numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldvae_ext.core.cells import Nonzero, dense, nonzero
from ldvae_ext.core.heads import heads_at
from ldvae_ext.core.likelihood import EPS, log_likelihood, mean_dependent_part
from ldvae_ext.core.posterior import deterministic_latent

if TYPE_CHECKING:
    from ldvae_ext.core.decoder import LinearDecoder


def ablation_changes(
    decoder: LinearDecoder,
    x_ng: Any,
    mean_nk: np.ndarray,
    library_n: np.ndarray,
    batch: Any,
    value: Any,
    sets: Sequence[np.ndarray],
    *,
    covariates: Any = None,
    label: Any = None,
    refit_heads: bool = False,
) -> Iterator[np.ndarray]:
    """The summands of :func:`ldvae_ext.core.ablation_effects`: for each set the change of each count's negative log-likelihood.

    Yields
    ------
    Shape (cells, genes), float64, in nats; an array that the next set overwrites.
    """
    mean_nk = np.asarray(mean_nk, dtype=np.float64)
    value_nk = np.broadcast_to(np.asarray(value, dtype=np.float64), mean_nk.shape)
    z_nk = deterministic_latent(mean_nk, decoder.latent_distribution)
    logits_ng = decoder.logits(z_nk, batch, covariates)
    library_n1 = np.asarray(library_n, dtype=np.float64).reshape(-1, 1)
    heads = heads_at(decoder, z_nk, batch, covariates, label)
    full_ng = logits_ng.copy()
    if decoder.likelihood == "poisson":
        change = _poisson_change(decoder, nonzero(x_ng), full_ng, library_n1)
    else:
        _to_rate(decoder, full_ng, library_n1)
        if refit_heads:
            counts_ng = dense(x_ng)
            full_ng = log_likelihood(decoder.likelihood, counts_ng, full_ng, *heads)
        else:
            change = _change(decoder.likelihood, x_ng, full_ng, *heads)
    buffer_ng = np.empty_like(logits_ng)
    for replaced in sets:
        moved_nk = mean_nk.copy()
        moved_nk[:, replaced] = value_nk[:, replaced]
        moved_nk = deterministic_latent(moved_nk, decoder.latent_distribution)
        touched = replaced if decoder.latent_distribution == "normal" else slice(None)
        np.matmul((moved_nk - z_nk)[:, touched], decoder.weight_gk[:, touched].T, out=buffer_ng)
        buffer_ng += logits_ng
        if decoder.likelihood == "poisson":
            yield change(buffer_ng)
            continue
        _to_rate(decoder, buffer_ng, library_n1)
        if refit_heads:
            moved_heads = heads_at(decoder, moved_nk, batch, covariates, label)
            yield full_ng - log_likelihood(decoder.likelihood, counts_ng, buffer_ng, *moved_heads)
        else:
            yield change(buffer_ng)


def _to_rate(decoder: LinearDecoder, logits_ng: np.ndarray, library_n1: np.ndarray) -> None:
    """Logits to mean counts, in place."""
    if decoder.link == "softmax":
        logits_ng -= logits_ng.max(axis=1, keepdims=True)
        np.exp(logits_ng, out=logits_ng)
        logits_ng *= library_n1 / logits_ng.sum(axis=1, keepdims=True)
    else:
        np.multiply(decoder.apply_link(logits_ng), library_n1, out=logits_ng)


def to_log_rate(decoder: LinearDecoder, logits_ng: np.ndarray, library_n1: np.ndarray) -> None:
    """Logits to logarithms of mean counts, in place; finite also where the mean is smaller than any float."""
    if decoder.link == "softmax":
        logits_ng -= logits_ng.max(axis=1, keepdims=True)
        logits_ng -= np.log(np.exp(logits_ng).sum(axis=1, keepdims=True))
    else:
        # softplus(x) is exp(x) to double precision below -40.
        logits_ng[:] = np.where(logits_ng < -40, logits_ng, np.log(decoder.apply_link(np.maximum(logits_ng, -40))))
    with np.errstate(divide="ignore"):  # a cell without counts has the library 0
        logits_ng += np.log(library_n1)


def _change(
    likelihood: str, x_ng: Any, full_ng: np.ndarray, theta: Any, dropout_ng: np.ndarray | None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a rate: the change of each count's negative log-likelihood from ``full_ng`` to it."""
    if likelihood == "nb":
        return _nb_change(nonzero(x_ng), full_ng, theta)
    x_ng = dense(x_ng)
    before_ng = mean_dependent_part(likelihood, x_ng, full_ng, theta, dropout_ng)
    return lambda rate_ng: before_ng - mean_dependent_part(likelihood, x_ng, rate_ng, theta, dropout_ng)


# The two functions below write into their argument: at this size the time goes into passes over memory.


def _nb_change(x: Nonzero, full_ng: np.ndarray, theta: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    full_at = full_ng.ravel()[x.at] + EPS
    shift = theta + EPS
    shifted_ng = full_ng + shift

    def change(rate_ng: np.ndarray) -> np.ndarray:
        flat = rate_ng.ravel()
        log_ratio_at = np.log((flat[x.at] + EPS) / full_at)
        rate_ng += shift
        rate_ng /= shifted_ng
        np.log(rate_ng, out=rate_ng)
        first_at = x.value * (flat[x.at] - log_ratio_at)
        rate_ng *= theta
        flat[x.at] += first_at
        return rate_ng

    return change


def _poisson_change(
    decoder: LinearDecoder, x: Nonzero, full_ng: np.ndarray, library_n1: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """As :func:`_change`, but of logits: scvi-tools adds no eps to the mean of a Poisson, whose logarithm must be finite."""
    to_log_rate(decoder, full_ng, library_n1)
    log_full_at = full_ng.ravel()[x.at]
    np.exp(full_ng, out=full_ng)

    def change(logits_ng: np.ndarray) -> np.ndarray:
        to_log_rate(decoder, logits_ng, library_n1)
        flat = logits_ng.ravel()
        first_at = x.value * (log_full_at - flat[x.at])
        np.exp(logits_ng, out=logits_ng)
        logits_ng -= full_ng
        flat[x.at] += first_at
        return logits_ng

    return change
