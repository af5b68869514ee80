"""Arguments of the compiled loop of ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ldvae_ext.core._design import design_matrix
from ldvae_ext.core._tables import filled_up, plain
from ldvae_ext.core.cells import csr_parts
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.kernels.threads import is_compiled, over_rows

# On the simplex the other latents grow if one is removed. With larger factors float32 is not accurate enough.
_MOST_STRETCHED = 16.0


class SetUpdates(NamedTuple):
    """Sets of latents. Each is made from the set before it, or from the empty set, by adding and removing latents."""

    ptr: np.ndarray
    latent: np.ndarray
    sign: np.ndarray
    is_fresh: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[np.ndarray]) -> SetUpdates:
        """The shorter way to each set."""
        if sets and all(len(members) == 1 for members in sets):
            n = len(sets)
            return cls(np.arange(n + 1), np.concatenate(sets), np.ones(n, np.float32), np.ones(n, np.bool_))
        ptr, latents, signs, is_fresh = [0], [], [], []
        before: set[int] = set()
        for members in sets:
            now = set(members.tolist())
            added, gone = sorted(now - before), sorted(before - now)
            fresh = not before or len(now) <= len(added) + len(gone)
            steps = [(k, 1.0) for k in (sorted(now) if fresh else added)] + [(k, -1.0) for k in gone if not fresh]
            latents += [k for k, _ in steps]
            signs += [sign for _, sign in steps]
            ptr.append(len(latents))
            is_fresh.append(fresh)
            # A latent on its own is not written down by the loop.
            before = set() if fresh and len(now) == 1 else now
        return cls(
            np.array(ptr, dtype=np.int64),
            np.array(latents, dtype=np.int64),
            np.array(signs, dtype=np.float32),
            np.array(is_fresh, dtype=np.bool_),
        )


def can_be_compiled(decoder: LinearDecoder) -> bool:
    """True if there is a loop for the decoder: counts under a softmax, and a dispersion that does not depend on the latent."""
    return (
        decoder.link == "softmax"
        and decoder.likelihood in ("nb", "poisson")
        and (decoder.dispersion != "gene-cell" or decoder.likelihood == "poisson")
        # A simplex of one latent is a point, so that all changes are exactly 0.
        and (decoder.latent_distribution == "normal" or len(decoder.factors) > 1)
        and is_compiled()
    )


def compiled_effects(
    decoder: LinearDecoder,
    x_ng: Any,
    mean_nk: np.ndarray,
    library_n: np.ndarray,
    batch_n: np.ndarray,
    value_nk: np.ndarray,
    sets: Sequence[np.ndarray],
    covariates: Any,
    label_n: np.ndarray | None,
) -> np.ndarray:
    """See :func:`ldvae_ext.core.ablation.set_effects`; NaN where float32 is not enough."""
    from ldvae_ext.kernels import ablation

    tables, n_cells = decoder._tables, len(mean_nk)
    out_ns = np.empty((n_cells, len(sets)))
    if not out_ns.size:
        return out_ns
    base_rg, row_n = tables.single.base_bg, batch_n
    if decoder.covariates or covariates is not None:
        design_nc = design_matrix(decoder.covariates, covariates, n_cells)
        if decoder.covariate_cg is not None:
            offset_ng = tables.intercept_bg[batch_n] + design_nc @ decoder.covariate_cg
            offset_ng -= offset_ng.max(axis=1, keepdims=True)
            base_rg = filled_up(np.exp(offset_ng, out=offset_ng))
            row_n = np.arange(n_cells)
    by_cell = decoder.dispersion in ("gene-batch", "gene-label") and decoder.likelihood != "poisson"
    theta_row_n = (batch_n if decoder.dispersion == "gene-batch" else label_n) if by_cell else np.zeros(n_cells)
    over_rows(
        ablation.ablate,
        n_cells,
        plain(deterministic_latent(mean_nk, decoder.latent_distribution), np.float32),
        tables.single.weight_kg,
        tables.single.reach_k,
        base_rg,
        plain(row_n, np.int64),
        plain(library_n, np.float64),
        tables.single.theta_rg,
        plain(theta_row_n, np.int64),
        *csr_parts(x_ng),
        *_moves(decoder.latent_distribution, mean_nk, value_nk, sets),
        *SetUpdates.of(sets),
        len(decoder.genes),
        decoder.likelihood == "nb",
        out_ns,
    )
    return out_ns


def _moves(
    latent_distribution: str, mean_nk: np.ndarray, value_nk: np.ndarray, sets: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Changes of replaced latents, factors of all changes, and relative growth of the other latents.

    Multiplied by NaN where float32 will not do.
    """
    n_cells, n_sets = len(mean_nk), len(sets)
    # Infinities are found by the loop.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if latent_distribution == "normal":
            delta_nk = plain(value_nk - mean_nk, np.float32)
            return delta_nk, np.ones((n_cells, n_sets), np.float32), np.zeros((n_cells, n_sets), np.float32)
        # softmax(u) with some u replaced: these z move by delta, and then all are divided by their sum.
        delta_nk = deterministic_latent(mean_nk, latent_distribution) * np.expm1(value_nk - mean_nk)
        is_member_ks = np.zeros((mean_nk.shape[1], n_sets))
        for s, members in enumerate(sets):
            is_member_ks[members, s] = 1.0
        scale_ns = 1.0 / (1.0 + delta_nk @ is_member_ks)
        scale_ns[~(np.abs(scale_ns) < _MOST_STRETCHED)] = np.nan
        return plain(delta_nk, np.float32), plain(scale_ns, np.float32), plain(scale_ns - 1.0, np.float32)
