"""Other axes of the latent space: varimax, and what a rotation does to posteriors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ldvae_ext.core._views import orthogonal
from ldvae_ext.core.cells import EncodedCells, PosteriorAxes
from ldvae_ext.core.decoder import LinearDecoder

METHODS = ("varimax", "score-varimax", "deviance")
# Axes of the consensus of several models, which brings order and signs.
CONSENSUS = "consensus"
# Random starts of varimax beside the principal axes: its criterion has local maxima.
N_STARTS = 8
# Of more rows, a part decides which start is improved on all of them.
_MANY_ROWS = 4096


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotation:
    """Rotated axes of a normal latent space: ``f = R'z``.

    The prior N(0, I) and the decoded expression stay. A cell's posterior N(m, diag(v)) becomes N(R'm, R'diag(v)R), which
    is correlated: its marginal variances are ``sum_i R_ik^2 v_i``, and its divergence from the prior is what it was.

    Parameters
    ----------
    matrix_kk
        Orthogonal, shape (latents, factors): column j holds factor j in terms of the network's latents.
    method
        How it was found.
    """

    matrix_kk: np.ndarray
    method: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix_kk", orthogonal(self.matrix_kk, len(self.matrix_kk)))

    def __repr__(self) -> str:
        return f"Rotation({self.method!r}, {len(self.matrix_kk)} factors)"

    @property
    def names(self) -> list[str]:
        """``F_0``, ``F_1``, ..."""
        return [f"F_{k}" for k in range(len(self.matrix_kk))]

    def variance(self, variance_nk: np.ndarray) -> np.ndarray:
        """Marginal variances of the factors from those of the latents, shape (cells, factors)."""
        return np.asarray(variance_nk, dtype=np.float64) @ np.square(self.matrix_kk)

    def cells(self, cells: EncodedCells) -> EncodedCells:
        """Encoded cells on the rotated axes, which keep what their posterior covariance is made of."""
        return cells._replace(
            mean=np.asarray(cells.mean, dtype=np.float64) @ self.matrix_kk,
            variance=self.variance(cells.variance),
            axes=PosteriorAxes(cells.variance, self.matrix_kk),
        )

    def arranged(self, order: Any, signs: Any) -> Rotation:
        """The same axes in another order, some of them turned."""
        return Rotation(matrix_kk=self.matrix_kk[:, order] * signs, method=self.method)


def varimax(value_nk: np.ndarray, *, n_starts: int = N_STARTS) -> np.ndarray:
    """The rotation after which each column is far from 0 in few rows: Kaiser's (1958) raw varimax.

    Maximises ``sum_k [mean_n y^4 - (mean_n y^2)^2]`` with ``y = value_nk @ R``. Where the rows owe their values to sparse,
    heavy-tailed factors this finds these factors (Rohe & Zeng 2020, arXiv:2004.05387). Each start is improved by
    orthogonal projection of the gradient; the starts are the principal axes and random ones, drawn relative to them, so
    that the result does not depend on the axes that the values came in.

    Parameters
    ----------
    value_nk
        Loadings of genes, or scores of cells; centred over rows by the caller where that is meant.
    n_starts
        Number of random starts.

    Returns
    -------
    Orthogonal, shape (columns, columns), float64; order and signs of its columns have no meaning.
    """
    value_nk = np.asarray(value_nk, dtype=np.float64)
    n_columns = value_nk.shape[1]
    scale = np.sqrt(np.mean(value_nk**2))
    _, vector_kk = np.linalg.eigh(value_nk.T @ value_nk)
    if n_columns < 2 or not scale > 0:
        return vector_kk[:, ::-1]
    axes_kk = vector_kk[:, ::-1]
    # Eigenvectors have arbitrary signs: cubes fix them, so that the random starts are the same whatever came in.
    principal_nk = value_nk @ axes_kk / scale
    signs_k = np.where((principal_nk**3).sum(axis=0) < 0, -1.0, 1.0)
    axes_kk, principal_nk = axes_kk * signs_k, principal_nk * signs_k
    rng = np.random.default_rng(0)
    starts = [np.eye(n_columns), *(np.linalg.qr(rng.normal(size=(n_columns, n_columns)))[0] for _ in range(n_starts))]
    # Of many rows some tell which start is the best.
    some_nk = principal_nk[:: -(-len(principal_nk) // _MANY_ROWS)]
    best_kk, _ = max((_improve(some_nk, start_kk) for start_kk in starts), key=lambda found: found[1])
    if len(some_nk) < len(principal_nk):
        best_kk, _ = _improve(principal_nk, best_kk)
    # The product of many orthogonal matrices drifts from being one.
    left_kk, _, right_kk = np.linalg.svd(axes_kk @ best_kk)
    return left_kk @ right_kk


def _improve(value_nk: np.ndarray, rotation_kk: np.ndarray) -> tuple[np.ndarray, float]:
    """A local maximum of varimax near a rotation, and its height."""
    before = -np.inf
    for _ in range(1000):
        rotated_nk = value_nk @ rotation_kk
        square_nk = rotated_nk * rotated_nk
        mean_k = square_nk.mean(axis=0)
        height = float((np.square(square_nk).mean(axis=0) - mean_k**2).sum())
        if height <= before + 1e-12 * abs(height):
            break
        before = height
        left_kk, _, right_kk = np.linalg.svd(value_nk.T @ (rotated_nk * (square_nk - mean_k)))
        rotation_kk = left_kk @ right_kk
    return rotation_kk, before


def loading_varimax(decoder: LinearDecoder) -> np.ndarray:
    """Varimax of the folded loadings, centred over genes (under softplus, which fixes the constant, as they are)."""
    return varimax(decoder.centered().weight_gk)


def score_varimax(mean_nk: np.ndarray) -> np.ndarray:
    """Varimax of the posterior means, centred over cells."""
    mean_nk = np.asarray(mean_nk, dtype=np.float64)
    return varimax(mean_nk - mean_nk.mean(axis=0))


def with_signs(decoder: LinearDecoder, rotation_kk: np.ndarray) -> np.ndarray:
    """A rotation whose columns point to their longer tail of genes, which makes it a unique one.

    Parameters
    ----------
    decoder
        The decoder.
    rotation_kk
        Orthogonal, shape (latents, factors).
    """
    return rotation_kk * decoder.rotated(rotation_kk).signs()
