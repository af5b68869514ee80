"""A decoder's arrays as compiled loops want them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

# A whole number of vectors, which a loop processes together.
_WIDTH = 64


class Single(NamedTuple):
    """Arrays in float32, with genes of 0 at the end that fill up the last vector."""

    weight_kg: np.ndarray
    reach_k: np.ndarray
    """Largest loading of each latent, absolutely."""
    base_bg: np.ndarray
    """Numerators of the softmax at z = 0."""
    theta_rg: np.ndarray
    """Dispersion of each batch or label, or of all cells; ones where there is none."""


class Tables(NamedTuple):
    """Folded arrays under a softmax, in a gauge in which numbers are small: the softmax does not see it."""

    weight_kg: np.ndarray
    intercept_bg: np.ndarray
    single: Single

    @classmethod
    def of(cls, weight_gk: np.ndarray, intercept_bg: np.ndarray, theta_rg: np.ndarray | None) -> Tables:
        """The tables of loadings, intercepts and dispersions."""
        # Loadings are taken relative to their mean in an average cell, so that the mean of e^t is near 1.
        share_g = softmax(intercept_bg.mean(axis=0))
        weight_kg = plain((weight_gk - share_g @ weight_gk).T, np.float64)
        intercept_bg = intercept_bg - intercept_bg.max(axis=1, keepdims=True)
        single = Single(
            filled_up(weight_kg),
            plain(np.abs(weight_kg).max(axis=1), np.float32),
            filled_up(np.exp(intercept_bg)),
            filled_up(np.ones((1, len(share_g))) if theta_rg is None else theta_rg),
        )
        return cls(weight_kg, intercept_bg, single)


def plain(array: Any, dtype: Any) -> np.ndarray:
    """The array, or a copy of it, contiguous and writeable: of others numba would compile its loops once more."""
    return np.require(array, dtype, ["C", "W"])


def filled_up(array_rg: np.ndarray) -> np.ndarray:
    """The array in float32, with genes of 0 up to whole vectors."""
    return np.pad(array_rg.astype(np.float32), ((0, 0), (0, -array_rg.shape[1] % _WIDTH)))
