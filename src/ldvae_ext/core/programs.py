"""Additive gene programs: decoded expression as a mixture of non-negative profiles."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from ldvae_ext._validate import check_positive_int
from ldvae_ext.core._arrays import checked, permutation
from ldvae_ext.core.decoder import LinearDecoder
from ldvae_ext.core.matching import Match, cosines, match_columns
from ldvae_ext.core.scores import shares

# Quantile at which scaled expression is capped: a few cells with extreme expression would have programs of their own.
_CAP = 0.999
# Below this share of the explained variance of decoded expression an additive description is called poor.
ADDITIVE = 0.85


class Usages(NamedTuple):
    """Composition of cells."""

    usage_nk: np.ndarray
    """Share of each program in the expression of each cell, (cells, programs); rows sum to one."""
    residual_n: np.ndarray
    """Share of the cell's squared scaled expression that the programs leave, (cells,)."""


@dataclass(frozen=True, eq=False)
class AdditivePrograms:
    """Programs, and all that is needed to find their usages in other cells.

    Parameters
    ----------
    profile_gk
        Share of each gene in the expression of a program, shape (genes, programs); not negative, columns sum to one.
    scale_g
        Scale of each gene: the unit in which deviations of its expression count, shape (genes,); genes with 0 are left out.
    cap
        Scaled expression is capped here.
    explained
        Share of the variance of scaled expression that the programs reproduce, in the cells that they were fitted to.

    Examples
    --------
    >>> from ldvae_ext.core import AdditivePrograms
    >>> profiles = np.array([[0.5, 0], [0.5, 0], [0, 1]])
    >>> programs = AdditivePrograms(profiles, scale_g=np.ones(3), cap=10, explained=1)
    >>> programs.usages(np.array([[0.3, 0.3, 0.4]])).usage_nk.round(6)
    array([[0.6, 0.4]])
    """

    profile_gk: np.ndarray
    scale_g: np.ndarray
    cap: float
    explained: float

    def __post_init__(self) -> None:
        profile_gk = checked(self.profile_gk, (None, None), "profile_gk", least=0)
        object.__setattr__(self, "profile_gk", profile_gk)
        object.__setattr__(self, "scale_g", checked(self.scale_g, (len(profile_gk),), "scale_g", least=0))

    @property
    def scaled_gk(self) -> np.ndarray:
        """Profiles in units of the genes' scales, shape (genes, programs)."""
        return self.profile_gk * _inverse(self.scale_g)[:, None]

    def arranged(self, order: np.ndarray) -> AdditivePrograms:
        """The programs in another order."""
        order = permutation(order, self.profile_gk.shape[1])
        return AdditivePrograms(self.profile_gk[:, order], self.scale_g, self.cap, self.explained)

    def usages(self, expression_ng: np.ndarray) -> Usages:
        """Usages by non-negative least squares (Lawson & Hanson 1974).

        ``min_u |x - S u|^2, u >= 0``, with scaled profiles S and scaled expression x of a cell. A program's profile sums to one, so that u is its share of the expression; it is divided by its sum.

        Parameters
        ----------
        expression_ng
            Expression that sums to one per cell, shape (cells, genes).
        """
        expression_ng = checked(expression_ng, (None, len(self.scale_g)), "expression_ng", least=0)
        scaled_ng = capped(expression_ng, self.scale_g, self.cap)
        # With S = Q R the problem of each cell has as many rows as there are programs.
        q_gk, r_kk = np.linalg.qr(self.scaled_gk)
        part_nk = scaled_ng @ q_gk
        norm_n = np.square(scaled_ng).sum(axis=1)
        beyond_n = norm_n - np.square(part_nk).sum(axis=1)
        usage_nk, left_n = np.zeros_like(part_nk), np.zeros(len(part_nk))
        for n, part_k in enumerate(part_nk):
            usage_nk[n], left_n[n] = nnls(r_kk, part_k)
        total_n = usage_nk.sum(axis=1, keepdims=True)
        residual_n = np.maximum(beyond_n, 0) + left_n**2
        return Usages(
            np.divide(usage_nk, total_n, out=np.full_like(usage_nk, 1 / usage_nk.shape[1]), where=total_n > 0),
            np.divide(residual_n, norm_n, out=np.zeros_like(norm_n), where=norm_n > 0),
        )

    def match(self, other: AdditivePrograms) -> Match:
        """Pairs of programs with the largest cosines of profiles, both in units of this one's scales."""
        if len(other.scale_g) != len(self.scale_g):
            msg = f"`other` must have the {len(self.scale_g)} genes of these programs; got {len(other.scale_g)}."
            raise ValueError(msg)
        return match_columns(cosines(self.scaled_gk, other.profile_gk * _inverse(self.scale_g)[:, None]))


def capped(expression_ng: np.ndarray, scale_g: np.ndarray, cap: float) -> np.ndarray:
    """Expression in units of the genes' scales, at most ``cap``."""
    return np.minimum(np.asarray(expression_ng, dtype=np.float64) * _inverse(scale_g), cap)


def _inverse(scale_g: np.ndarray) -> np.ndarray:
    return np.divide(1.0, scale_g, out=np.zeros_like(scale_g), where=scale_g > 0)


def fit_programs(
    expression_ng: np.ndarray, scale_g: np.ndarray, n_programs: int, cap: float | None = None
) -> AdditivePrograms:
    """Non-negative factorisation of expression: ``x = S u`` with scaled profiles S and usages u, both not negative.

    Minimises the squared error of scaled expression (scikit-learn's coordinate descent, from a singular value decomposition, so
    that the same expression gives the same programs).

    Parameters
    ----------
    expression_ng
        Expected expression that sums to one per cell, shape (cells, genes).
    scale_g
        See :class:`AdditivePrograms`; the standard deviation over cells of the normalised counts, for instance.
    n_programs
        Number of programs.
    cap
        Scaled expression is capped here; its 99.9 % quantile if None.

    Returns
    -------
    Programs by descending mean usage.

    Raises
    ------
    ValueError
        If ``n_programs`` is no positive integer, or expression is negative or not finite.

    Examples
    --------
    >>> from ldvae_ext.core import fit_programs
    >>> usages = np.array([[1, 0], [0, 1], [0.5, 0.5], [0.8, 0.2]])
    >>> profiles = np.array([[0.5, 0], [0.5, 0], [0, 1]])
    >>> programs = fit_programs(usages @ profiles.T, np.ones(3), n_programs=2)
    >>> bool(np.allclose(programs.profile_gk, profiles, atol=0.01))
    True
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    check_positive_int("n_programs", n_programs)
    expression_ng = checked(expression_ng, (None, None), "expression_ng", least=0)
    scale_g = checked(scale_g, (expression_ng.shape[1],), "scale_g", least=0)
    if cap is None:
        cap = float(np.quantile(capped(expression_ng, scale_g, np.inf), _CAP))
    scaled_ng = capped(expression_ng, scale_g, cap)
    with warnings.catch_warnings():
        # A factorisation that is not at its last digit is as good for reading.
        warnings.simplefilter("ignore", ConvergenceWarning)
        factorisation = NMF(n_programs, init="nndsvda", tol=1e-5, max_iter=500, random_state=0)
        usage_nk = factorisation.fit_transform(scaled_ng)
    expression_gk = factorisation.components_.T * scale_g[:, None]
    mass_k = expression_gk.sum(axis=0)
    left = np.square(scaled_ng - usage_nk @ factorisation.components_).sum()
    varying = np.square(scaled_ng - scaled_ng.mean(axis=0)).sum()
    # A program that no cell uses keeps a profile, so that the number of programs is the one that was asked for.
    profile_gk = np.where(mass_k > 0, expression_gk / np.where(mass_k > 0, mass_k, 1), 1 / len(scale_g))
    order = np.argsort(-(usage_nk.mean(axis=0) * mass_k), kind="stable")
    return AdditivePrograms(
        profile_gk[:, order],
        scale_g,
        cap,
        float(1 - left / varying) if varying > 1e-12 * np.square(scaled_ng).sum() else 1.0,
    )


class Expression:
    """Running sums for the standard deviation over cells of normalised counts, ``x / sum_g x``."""

    def __init__(self, n_genes: int) -> None:
        self._n, self._sum_g, self._square_g = 0, np.zeros(n_genes), np.zeros(n_genes)

    def add(self, x_ng: Any) -> None:
        """Count some cells in; counts are dense or sparse, shape (cells, genes)."""
        share_ng = shares(x_ng)
        self._n += share_ng.shape[0]
        self._sum_g += share_ng.sum(axis=0)
        self._square_g += (share_ng * share_ng).sum(axis=0)

    def deviation_g(self) -> np.ndarray:
        """Standard deviations, shape (genes,)."""
        n = max(1, self._n)
        return np.sqrt(np.maximum(self._square_g / n - np.square(self._sum_g / n), 0))


class Direction(NamedTuple):
    """A program as a direction in the latent space of one population."""

    direction_k: np.ndarray
    """Unit vector along which decoded expression changes most like the program, (factors,)."""
    angle: float
    """Angle in degrees between the change by the program and the nearest change that latents can make: 0 if they can make it."""
    cosine_k: np.ndarray
    """Cosine of the change by the program with the change by each factor, (factors,)."""


def program_direction(decoder: LinearDecoder, profile_g: np.ndarray, mean_g: np.ndarray) -> Direction:
    """Direction of the latent space that comes nearest to a program in a population with a given mean expression.

    Where a small share e of the expression mu of a cell is replaced by the program p, ``d log mu / de = p / mu - 1``. Latents
    change the log of the expression by ``L dz`` less its mean. The direction is the least-squares solution
    with weights mu (the Fisher information of Poisson counts about their log means), and angles are angles under these weights.

    Parameters
    ----------
    decoder
        The decoder; its ``weight_gk`` are the loadings L.
    profile_g
        Profile p of the program, shape (genes,), sums to one.
    mean_g
        Mean expression mu of the population, shape (genes,), positive, sums to one.

    Returns
    -------
    The direction, with its angle in degrees and the cosine of each factor.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder, program_direction
    >>> loadings = [[1, 0], [-1, 0], [0, 1], [0, -1]]
    >>> decoder = LinearDecoder.from_loadings(loadings, [0] * 4, genes=list("abcd"))
    >>> program, mean = np.array([0.5, 0, 0.5, 0]), np.full(4, 0.25)
    >>> program_direction(decoder, program, mean).direction_k.round(3)
    array([0.707, 0.707])
    """
    shape = (len(decoder.genes),)
    profile_g, mean_g = checked(profile_g, shape, "profile_g"), checked(mean_g, shape, "mean_g", positive=True)
    root_g = np.sqrt(mean_g)
    loading_gk = (decoder.weight_gk - mean_g @ decoder.weight_gk) * root_g[:, None]
    change_g = (profile_g / mean_g - 1) * root_g
    direction_k = np.linalg.lstsq(loading_gk, change_g, rcond=None)[0]
    norm, length = np.linalg.norm(change_g), np.linalg.norm(direction_k)
    share = np.linalg.norm(loading_gk @ direction_k) / norm if norm > 0 else 1.0
    return Direction(
        direction_k / length if length > 0 else direction_k,
        float(np.degrees(np.arccos(np.clip(share, 0, 1)))),
        cosines(change_g[:, None], loading_gk)[0],
    )
