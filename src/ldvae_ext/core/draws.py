"""Random numbers of each cell, independent of the selection of cells and of the size of chunks."""

from __future__ import annotations

import numpy as np

# Purposes of draws; two purposes never use the same number.
POSTERIOR, PRIOR, COUNTS = 0, 1, 2


def generator_of(seed: int, purpose: int, position: int) -> np.random.Generator:
    """The random numbers of a cell, see :func:`normal_draws`."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, position]))


def normal_draws(seed: int, purpose: int, position_n: np.ndarray, n_latent: int, n_samples: int = 1) -> np.ndarray:
    """Standard normal draws of some cells.

    Each cell has a counter-based generator (Philox: Salmon et al. 2011, 10.1145/2063384.2063405) keyed by the seed and the
    purpose and started at the cell's position, so that a cell's draws do not depend on the others.

    Parameters
    ----------
    seed
        A non-negative integer.
    purpose
        Purpose of the draws.
    position_n
        Positions of the cells, shape (cells,).
    n_latent, n_samples
        Draws for each cell.

    Returns
    -------
    Shape (samples, cells, latents), float64. The first samples are the same for any larger ``n_samples``.
    """
    out = np.empty((n_samples, len(position_n), n_latent))
    for n, position in enumerate(position_n):
        out[:, n] = generator_of(seed, purpose, position).standard_normal((n_samples, n_latent))
    return out


def donors(seed: int, n_cells: int) -> np.ndarray:
    """For each cell the other one whose latents it is given: a permutation, shape (cells,), int64.

    It is a single cycle through all cells, so that none is given its own.
    """
    cycle = np.random.default_rng(seed).permutation(n_cells)
    out = np.empty(n_cells, dtype=np.int64)
    out[cycle] = np.roll(cycle, -1)
    return out
