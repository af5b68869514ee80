"""Loadings of factors in populations of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from ldvae_ext._validate import check_is_decoder, check_one_of, warn
from ldvae_ext.core._arrays import check_shape, checked
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.group_moments import GroupMoments, softplus_log_slope
from ldvae_ext.core.posterior import deterministic_latent

KINDS = ("gradient", "contribution", "path", "within")
SCALES = ("log", "expression")
REFERENCES = ("rest", "prior")
# Column of a path for batches and covariates.
BATCH = "batch"
# Nodes of the quadrature along a path. A path is cut into more pieces until the sum is exact, in log-rate; a warning follows
# if it does not become exact.
_NODES, _PIECES = 16, (1, 2, 4, 8, 16, 64, 256)
_EXACT, _GOOD = 1e-10, 1e-6


def contribution_loadings(decoder: LinearDecoder, difference_k: np.ndarray) -> np.ndarray:
    """Effect of a difference of latents on the log-rates, by factor: ``(z - z_ref)_k`` times the centred loading.

    Returns
    -------
    Shape (genes, factors), in log-rate; up to a constant for each factor, which the softmax does not see.
    """
    return decoder.centered().weight_gk * difference_k


def path_attribution(
    decoder: LinearDecoder,
    z_k: np.ndarray,
    offset_g: np.ndarray,
    reference_k: np.ndarray,
    reference_offset_g: np.ndarray,
) -> np.ndarray:
    """The log-ratio of expression between two points, split exactly over factors and the intercept.

    ``A_gk = (z - z_ref)_k int_0^1 (L_gk - E_rho(t)[L_k]) dt`` along the straight path from the reference to the point
    (integrated gradients: Sundararajan et al. 2017, arXiv:1703.01365), by Gauss-Legendre quadrature; the difference of
    intercepts is treated as one more factor. Rows sum to ``log s_g(z) - log s_g(z_ref)``; s is the softmax or the softplus.
    For the softplus the integrand is ``L_gk`` times the derivative of its logarithm.

    Parameters
    ----------
    decoder
        The decoder.
    z_k, reference_k
        The points, shape (factors,).
    offset_g, reference_offset_g
        Their intercepts, shape (genes,), in log-rate.

    Returns
    -------
    Shape (genes, factors + 1), float64, in log-rate; the last column is for the intercept.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, path_attribution
    >>> loadings, zero = [[0], [np.log(3)]], np.zeros(2)
    >>> decoder = LinearDecoder.from_loadings(loadings, zero, genes=["a", "b"])
    >>> parts = path_attribution(decoder, np.ones(1), zero, np.zeros(1), zero)
    >>> np.exp(parts).round(3)  # shares of 0.25 and 0.75 instead of 0.5 each
    array([[0.5, 1. ],
           [1.5, 1. ]])
    """
    check_is_decoder(decoder)
    for name, value, like in (
        ("z_k", z_k, decoder.factors),
        ("reference_k", reference_k, decoder.factors),
        ("offset_g", offset_g, decoder.genes),
        ("reference_offset_g", reference_offset_g, decoder.genes),
    ):
        check_shape(value, (len(like),), name)
    direction_gk = np.concatenate(
        [decoder.weight_gk * (z_k - reference_k), (offset_g - reference_offset_g)[:, None]], axis=1
    )
    start_g = decoder.weight_gk @ reference_k + reference_offset_g
    step_g = direction_gk.sum(axis=1)
    is_softmax = decoder.link == "softmax"
    ends = np.stack([start_g, start_g + step_g])
    log_ends = log_softmax(ends, axis=1) if is_softmax else _log_softplus(ends)
    node_t, weight_t = np.polynomial.legendre.leggauss(_NODES)
    out_gk, off = direction_gk, np.inf
    for n_pieces in _PIECES:
        # The same nodes in each piece of the path.
        at_t = ((node_t + 1) / 2 + np.arange(n_pieces)[:, None]).ravel() / n_pieces
        share_t = np.tile(weight_t / 2, n_pieces) / n_pieces
        logits_tg = start_g + at_t[:, None] * step_g
        if is_softmax:
            out_gk = direction_gk - share_t @ (decoder.apply_link(logits_tg) @ direction_gk)
        else:
            out_gk = direction_gk * (share_t @ softplus_log_slope(logits_tg))[:, None]
        off = np.abs(out_gk.sum(axis=1) - (log_ends[1] - log_ends[0])).max()
        if off <= _EXACT:
            return out_gk
    if off > _GOOD:
        warn(f"A path is so long that the split of its log-ratios adds up to within {off:.1g} only.")
    return out_gk


def _log_softplus(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softplus, also for softplus values that round to 0."""
    inside = np.clip(logits, -30.0, 20.0)
    # Below, softplus is an exponential; above, torch's is the identity.
    return np.where(logits < -30.0, logits, np.log(np.where(logits > 20.0, logits, np.logaddexp(0.0, inside))))


class WithinDirections(NamedTuple):
    """Directions of variation inside a population."""

    loading_gj: np.ndarray
    """Change of the log-rates along each direction, per standard deviation of the cells along it; genes x directions."""
    variance_j: np.ndarray
    """Variance of the log-rates along each direction, summed over genes; descending."""
    share_jk: np.ndarray
    """Share of each factor in the direction. Rows sum to 1, and are NaN for a direction without variation."""


def within_directions(decoder: LinearDecoder, covariance_kk: np.ndarray) -> WithinDirections:
    """Leading directions of a population's latent covariance, pushed through the centred loadings.

    The principal components of the centred log-rates ``L z`` of its cells: with the singular value decomposition
    ``L S^(1/2) = U D V'`` and the covariance S of the latents, direction j moves the genes by ``U_j D_j`` for each of its
    standard deviations. Its variance ``D_j^2 = sum_k (L'U_j)_k (S L'U_j)_k`` is a sum over factors; a term is negative where a
    factor works against the others.

    Parameters
    ----------
    decoder
        The decoder.
    covariance_kk
        Covariance of the latents of its cells, shape (factors, factors).

    Returns
    -------
    ``loading_gj``, genes x directions, in log-rate per standard deviation of the cells (under a softplus link in its argument);
    ``variance_j``, its square, summed over genes; ``share_jk``, directions x factors.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, within_directions
    >>> loadings = [[1, 0], [-1, 0], [0, 1], [0, -1]]
    >>> decoder = LinearDecoder.from_loadings(loadings, [0] * 4, genes=list("abcd"))
    >>> found = within_directions(decoder, np.diag([1, 4]))
    >>> found.variance_j.round(6), found.share_jk.argmax(axis=1)
    (array([8., 2.]), array([1, 0]))
    """
    check_is_decoder(decoder)
    covariance_kk = checked(covariance_kk, (len(decoder.factors),) * 2, "covariance_kk")
    weight_gk = decoder.centered().weight_gk
    value_k, vector_kk = np.linalg.eigh(covariance_kk)
    root_kk = (vector_kk * np.sqrt(np.maximum(value_k, 0.0))) @ vector_kk.T
    left_gj, singular_j, _ = np.linalg.svd(weight_gk @ root_kk, full_matrices=False)
    # A direction is canonical as a factor is: it points to its longer tail of genes.
    left_gj = left_gj * np.where((left_gj**3).sum(axis=0) < 0, -1.0, 1.0)
    projected_kj = weight_gk.T @ left_gj
    term_jk = (projected_kj * (covariance_kk @ projected_kj)).T
    total_j1 = term_jk.sum(axis=1, keepdims=True)
    # Below rounding there is no direction that anything could have a share in.
    is_there = total_j1 > 1e-12 * total_j1.max(initial=0)
    share_jk = np.divide(term_jk, total_j1, where=is_there, out=np.full_like(term_jk, np.nan))
    return WithinDirections(left_gj * singular_j, singular_j**2, share_jk)


def reference_point(
    moments: GroupMoments, decoder: LinearDecoder, p: int, reference: str | int
) -> tuple[np.ndarray, np.ndarray]:
    """Latent and intercept of the reference of group ``p``: the rest, the prior (z = 0, u = 0), or another group."""
    if reference == "rest":
        return moments.rest(p)
    if reference == "prior":
        origin_k = deterministic_latent(np.zeros((1, len(decoder.factors))), decoder.latent_distribution)[0]
        return origin_k, moments.offset_pg[p]
    return moments.mean_pk[int(reference)], moments.offset_pg[int(reference)]


class PopulationLoadings(NamedTuple):
    """Loadings of some groups."""

    groups: list[int]
    """Positions of the groups: all but the reference."""
    columns: list[str]
    """Factors, with ``"batch"`` for the effect of intercepts, or directions."""
    value_pgk: np.ndarray
    """Groups x genes x columns."""
    directions: list[WithinDirections]
    """For each group, if ``kind="within"``."""


def population_loadings(
    decoder: LinearDecoder, moments: GroupMoments, kind: str, reference: str | int
) -> PopulationLoadings:
    """Loadings of each group of one kind; see :meth:`ldvae_ext.model.LDVAE.get_population_loadings`."""
    chosen = [p for p in range(len(moments.n_p)) if p != reference]
    columns, directions = decoder.factors.tolist(), []
    if kind == "gradient":
        value_pgk = moments.gradient_loadings()
    elif kind == "within":
        directions = [within_directions(decoder, covariance_kk) for covariance_kk in moments.covariance_pkk]
        value_pgk = np.stack([d.loading_gj for d in directions])
        columns = [f"D_{j}" for j in range(value_pgk.shape[2])]
    else:
        values = []
        for p in chosen:
            z_k, offset_g = moments.mean_pk[p], moments.offset_pg[p]
            reference_k, reference_offset_g = reference_point(moments, decoder, p, reference)
            if kind == "contribution":
                values.append(contribution_loadings(decoder, z_k - reference_k))
            else:
                values.append(path_attribution(decoder, z_k, offset_g, reference_k, reference_offset_g))
        value_pgk = np.stack(values)
        has_offsets = reference != "prior" and (len(decoder.batches) > 1 or len(decoder.covariates) > 0)
        if kind == "path" and has_offsets:
            columns = [*columns, BATCH]
        elif kind == "path":
            value_pgk = value_pgk[:, :, :-1]
    return PopulationLoadings(chosen, columns, value_pgk, directions)


@dataclass(frozen=True, kw_only=True)
class PopulationRequest:
    """Arguments of population loadings, checked against the existing groups."""

    groups: list[str]
    kind: str = "gradient"
    reference: str = "rest"
    scale: str | None = None

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, KINDS)
        if self.scale is not None:
            check_one_of("scale", self.scale, SCALES)
            if self.kind != "gradient":
                msg = f"`scale` belongs to `kind='gradient'`; `kind={self.kind!r}` is on the log scale."
                raise ValueError(msg)
        check_one_of("reference", self.reference, [*REFERENCES, *self.groups])
        if self.kind in ("gradient", "within"):
            if self.reference != "rest":
                msg = f"`reference` has no effect with `kind={self.kind!r}`, which describes the inside of each group."
                raise ValueError(msg)
        elif self.reference in REFERENCES and self.reference in self.groups:
            msg = f"`reference={self.reference!r}` may be the group of that name or not; rename the group."
            raise ValueError(msg)
        elif self.reference != "prior" and len(self.groups) == 1:
            msg = f"There is only one group, {self.groups[0]!r}, and no other to compare it with; use `reference='prior'`."
            raise ValueError(msg)

    @property
    def summed_scale(self) -> str | None:
        """Scale of the derivatives to sum; None if they are not needed."""
        return (self.scale or "expression") if self.kind == "gradient" else None

    def loadings(self, decoder: LinearDecoder, moments: GroupMoments) -> PopulationLoadings:
        """The loadings of the groups."""
        is_group = self.kind in ("contribution", "path") and self.reference not in REFERENCES
        return population_loadings(
            decoder, moments, self.kind, self.groups.index(self.reference) if is_group else self.reference
        )
