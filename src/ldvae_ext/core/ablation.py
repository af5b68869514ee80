"""Paired change of the likelihood of each cell when latents are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from ldvae_ext._validate import check_is_decoder, factor_indices
from ldvae_ext.core._arrays import as_numbers, check_broadcasts, per_cell
from ldvae_ext.core._changes import ablation_changes
from ldvae_ext.core._design import level_codes
from ldvae_ext.core._paired import can_be_compiled, compiled_effects
from ldvae_ext.core.cells import at_rows
from ldvae_ext.core.decoder import LinearDecoder

# Numbers of an array that numpy works on at a time: it passes over it again and again, and it should stay near.
_BLOCK = 2**18


def ablation_effects(
    decoder: LinearDecoder,
    x_ng: Any,
    mean_nk: np.ndarray,
    library_n: np.ndarray,
    batch: Any,
    value: Any,
    factors: Iterable[Any],
    *,
    covariates: Any = None,
    label: Any = None,
    refit_heads: bool = False,
) -> np.ndarray:
    """Change of each cell's negative log-likelihood when latents are set to a value, one set of them at a time.

    A cell is compared with itself: the same latent, library, dispersion and dropout logits on both sides, only the logits
    of the rate move. For a normal latent they move by ``-weight[:, S] (z_S - value_S)``, one rank for each replaced
    latent; for a logistic-normal one ``u_S`` is set and ``z = softmax(u)`` follows. The difference is taken per gene
    before it is summed; under ``"nb"`` with scvi-tools' ``eps`` it is ::

        - sum_g x log((mu' + eps) / (mu + eps)) + sum_g (x + theta) log((theta + mu' + eps) / (theta + mu + eps))

    without a gamma function, where the first sum needs the non-zero counts only. Under a softmax, for ``"nb"`` (unless the
    dispersion is ``"gene-cell"``) and ``"poisson"``, a compiled loop in float32 computes it to 1e-5 of the largest effect, plus
    1e-7 nats for each count of the library. numpy computes the cells for which float32 is not enough, and all other cases.

    Parameters
    ----------
    decoder
        The decoder.
    x_ng
        Counts, shape (cells, genes), dense or sparse.
    mean_nk
        Latents, such as posterior means (of u under ``"ln"``), shape (cells, factors).
    library_n
        Library sizes in counts (size factors under softplus), shape (cells,).
    batch
        See :meth:`ldvae_ext.core.LinearDecoder.batch_codes`.
    value
        Values that replace the latents, broadcast to (cells, factors). Under ``"ln"`` minus infinity drops a latent: its z is 0
        and the others are renormalised.
    factors
        Positions of the latents to replace: each entry one of them, or several that are replaced together.
    covariates, label
        See :meth:`ldvae_ext.core.LinearDecoder.scale` and :meth:`~ldvae_ext.core.LinearDecoder.theta`.
    refit_heads
        True if dropout logits and dispersion are computed from the replaced latent, if they depend on it; False to keep
        those of the unablated cell.

    Returns
    -------
    Shape (cells, sets), float64, in nats. Positive: the latents help. Never clipped.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, ablation_effects
    >>> decoder = LinearDecoder.from_loadings(
    ...     [[0], [np.log(3)]], [0, 0], genes=["a", "b"], likelihood="poisson"
    ... )
    >>> counts, library_n = np.array([[1, 3]]), np.array([4])
    >>> ablation_effects(decoder, counts, [[1]], library_n, None, 0, [0]).round(3)
    array([[0.523]])
    >>> (3 * np.log(3 / 2) - np.log(2)).round(3)  # by hand, in nats
    np.float64(0.523)
    """
    check_is_decoder(decoder)
    n_cells = len(mean_nk)
    return set_effects(
        decoder,
        x_ng,
        mean_nk,
        library_n,
        decoder.batch_codes(batch, n_cells),
        value,
        [_positions(decoder, entry) for entry in factors],
        covariates=covariates,
        label_n=None if decoder.labels is None else level_codes(decoder.labels, label, n_cells, "label"),
        refit_heads=refit_heads,
    )


def _positions(decoder: LinearDecoder, entry: Any) -> np.ndarray:
    """Positions of a set of latents, which may be empty."""
    entry = np.atleast_1d(entry).tolist()
    return factor_indices(entry, decoder.factors.tolist(), argument="factors") if entry else np.zeros(0, dtype=np.int64)


def set_effects(
    decoder: LinearDecoder,
    x_ng: Any,
    mean_nk: np.ndarray,
    library_n: Any,
    batch_n: np.ndarray,
    value: Any,
    sets: Sequence[np.ndarray],
    *,
    covariates: Any = None,
    label_n: np.ndarray | None = None,
    refit_heads: bool = False,
) -> np.ndarray:
    """See :func:`ldvae_ext.core.ablation_effects`; batches and labels are codes.

    Returns
    -------
    Shape (cells, sets), float64, in nats.
    """
    mean_nk = decoder._latent(mean_nk)
    n_cells = len(mean_nk)
    value = as_numbers(value, "value")
    check_broadcasts(value, mean_nk.shape, "value")
    value_nk = np.broadcast_to(value, mean_nk.shape)
    library_n = per_cell(library_n, n_cells, "library_n")
    _check(decoder, x_ng, batch_n, label_n, n_cells)
    if can_be_compiled(decoder) and not refit_heads:
        out_ns = compiled_effects(decoder, x_ng, mean_nk, library_n, batch_n, value_nk, sets, covariates, label_n)
        rows = np.flatnonzero(np.isnan(out_ns).any(axis=1))
    else:
        out_ns, rows = np.full((n_cells, len(sets)), np.nan), np.arange(n_cells)
    x_ng = x_ng.tocsr() if sparse.issparse(x_ng) else np.asarray(x_ng)
    n_rows = max(1, _BLOCK // len(decoder.genes))
    for start in range(0, len(rows), n_rows):
        at = rows[start : start + n_rows]
        changes = ablation_changes(
            decoder,
            x_ng[at],
            mean_nk[at],
            library_n[at],
            decoder.batches[batch_n[at]],
            value_nk[at],
            sets,
            covariates=covariates if len(at) == n_cells else at_rows(covariates, _names(decoder), at, n_cells),
            label=None if decoder.labels is None or label_n is None else decoder.labels[label_n[at]],
            refit_heads=refit_heads,
        )
        effect_ns = np.empty((len(at), len(sets)))
        for s, change_ng in enumerate(changes):
            effect_ns[:, s] = change_ng.sum(axis=1)
        out_ns[at] = np.where(np.isnan(out_ns[at]), effect_ns, out_ns[at])
    return out_ns


def _names(decoder: LinearDecoder) -> list[str]:
    return [covariate.name for covariate in decoder.covariates]


def _check(decoder: LinearDecoder, x_ng: Any, batch_n: np.ndarray, label_n: Any, n_cells: int) -> None:
    """Raise on arguments with which a compiled loop would read out of bounds."""
    if x_ng.shape != (n_cells, len(decoder.genes)):
        msg = f"`x` must have shape ({n_cells}, {len(decoder.genes)}), as the latents and the genes; got {x_ng.shape}."
        raise ValueError(msg)
    levels = {"batch": (batch_n, decoder.batches), "label": (label_n, decoder.labels)}
    for name, (code_n, known) in levels.items():
        if known is None:
            continue
        if (
            code_n is None
            or len(code_n) != n_cells
            or (n_cells and not 0 <= np.min(code_n) <= np.max(code_n) < len(known))
        ):
            msg = f"`{name}` must hold a code of each of {n_cells} cells, 0 to {len(known) - 1}; got {code_n}."
            raise ValueError(msg)
