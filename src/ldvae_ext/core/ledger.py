"""Decomposition of the KL of posteriors: information about cells, dependence between factors, misfit to the prior."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import xlogy

from ldvae_ext._validate import check_positive_int
from ldvae_ext.core._arrays import read_only
from ldvae_ext.core._views import axes_of_factors, inverse_axes
from ldvae_ext.core.draws import POSTERIOR, normal_draws
from ldvae_ext.core.posterior import kl_per_dimension

_LOG_2PI = np.log(2 * np.pi)
# Number of lattice intervals in the smallest standard deviation of an octave, and range of a component in standard
# deviations. The error of cubic interpolation is at most 3e-5 of the peak of a component; the cut mass is 1e-15.
_INTERVALS_PER_SD, _REACH = 4, 8
_BLOCK = 1024  # components in one computation
# Axes in float32 are off by less than that.
_ROUNDING = 1e-5


class InformationLedger(NamedTuple):
    """The parts of the mean KL of the posteriors from the prior, all in nats; arrays have shape (factors,).

    On orthogonal axes ``kl = mutual_information + total_correlation + dimension_wise_kl``, up to the sampling error of the first two.

    Examples
    --------
    >>> from ldvae_ext.core import information_ledger
    >>> mean_nk = np.random.default_rng(0).normal(size=(50, 2))
    >>> ledger = information_ledger(mean_nk, np.full((50, 2), 0.1))
    >>> parts = ledger.mutual_information_k + ledger.dimension_wise_kl_k
    >>> bool(np.allclose(ledger.kl_k, parts))
    True
    """

    kl_k: np.ndarray
    """Mean over cells of the KL of the factor's marginal posterior from its prior."""
    mutual_information_k: np.ndarray
    """Mutual information of the factor and the cell, ``kl_k - dimension_wise_kl_k``: from 0 to log(cells)."""
    dimension_wise_kl_k: np.ndarray
    """KL of the factor's aggregated posterior from its prior."""
    total_correlation_k: np.ndarray
    """Mutual information of the factor and all others under the aggregated posterior; sampled."""
    kl: float
    """Mean over cells of the KL of the joint posterior from the prior."""
    mutual_information: float
    """Mutual information of all factors together and the cell: from 0 to log(cells); sampled."""
    total_correlation: float
    """KL of the aggregated posterior from the product of its margins; sampled."""
    dimension_wise_kl: float
    """Sum of ``dimension_wise_kl_k``."""
    n_cells: int
    """Cells of the aggregated posterior."""


def information_ledger(
    mean_nk: np.ndarray,
    variance_nk: np.ndarray,
    rotation_kk: np.ndarray | None = None,
    *,
    n_samples: int = 1,
    seed: int = 0,
    chunk_size: int = 256,
) -> InformationLedger:
    """Split the mean KL of the posteriors from the prior into the parts that mean something.

    With posteriors ``q(z|n) = N(mean_n, diag variance_n)`` of N cells, the aggregated posterior
    ``q(z) = 1/N sum_n q(z|n)`` (Makhzani et al. 2015, arXiv:1511.05644) and the prior ``p = N(0, I)``,

    ``mean_n KL(q(z|n) || p) = I(z; n) + KL(q(z) || prod_k q(f_k)) + sum_k KL(q(f_k) || p(f_k))``

    (Hoffman & Johnson 2016, "ELBO surgery"; Chen et al. 2018, arXiv:1802.04942, eq. 2), where ``f = R' z`` are the
    factors and R is orthogonal. With oblique axes the prior of the factors is correlated, and the right side lacks the
    term ``E_q log (p(f) / prod_k p(f_k))``, with a minus. The KL and the mutual information of all factors together do not depend on R; the other
    terms do. No mutual
    information with cells exceeds log(cells). Close to this bound every cell is distinct from every other, and more cells
    would increase the value.

    Terms of single factors are integrated, to about 1e-5 nats, and do not depend on the seed. Joint terms are means over
    draws from each cell's posterior. They are not clipped, so that an estimate of zero can be slightly negative. Time grows with
    cells squared: 5000 cells and 10 factors take seconds.

    Parameters
    ----------
    mean_nk, variance_nk
        Posterior means and variances in the network's axes, shape (cells, latents); of u for a logistic-normal latent,
        where z = softmax(u).
    rotation_kk
        Matrix R whose columns, of unit length, are the factors' axes, shape (latents, factors); None for the network's own.
    n_samples
        Draws from the posterior of each cell; the error falls with the square root of all draws.
    seed
        A non-negative integer that the draws are keyed by.
    chunk_size
        Number of draws in one computation; the result does not depend on it, up to rounding.

    Returns
    -------
    The ledger, in nats.

    Raises
    ------
    ValueError
        If shapes differ, there are no cells or latents, values are not finite, variances are not positive (or lost in
        the rounding of the means), the axes are not independent or not of unit length, or another argument is out of its range.

    Examples
    --------
    >>> from ldvae_ext.core import information_ledger
    >>> mean_nk = np.array([[-1, 0], [1, 0]])  # the second latent is constant
    >>> ledger = information_ledger(mean_nk, np.full((2, 2), 1e-4))
    >>> np.exp(ledger.mutual_information_k).round(3)  # cells told apart
    array([2., 1.])
    """
    mean_nk, variance_nk, rotation_kk = _checked(mean_nk, variance_nk, rotation_kk)
    check_positive_int("n_samples", n_samples)
    check_positive_int("chunk_size", chunk_size)
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        msg = f"`seed` must be a non-negative integer below 2**64; got {seed!r}."
        raise ValueError(msg)
    n_cells, n_latent = mean_nk.shape
    factor_mean_nk, factor_variance_nk = mean_nk @ rotation_kk, variance_nk @ rotation_kk**2
    margins = [_Mixture(mean_n, np.sqrt(v_n)) for mean_n, v_n in zip(factor_mean_nk.T, factor_variance_nk.T)]
    # The cross-entropy with the prior has a formula, the entropy of a mixture has none.
    dimension_wise_k = 0.5 * (_LOG_2PI + (factor_mean_nk**2 + factor_variance_nk).mean(axis=0))
    dimension_wise_k += [margin.negative_entropy() for margin in margins]
    kl_k = kl_per_dimension(factor_mean_nk, factor_variance_nk).mean(axis=0)

    # Along a column of this matrix one factor changes and the others stay. Densities of f are those of z over the volume.
    direction_kk = inverse_axes(rotation_kk, _ROUNDING).T
    log_volume = np.linalg.slogdet(rotation_kk)[1]
    joint = _JointMixture(mean_nk, variance_nk, direction_kk)
    noise_sk = normal_draws(seed, POSTERIOR, np.arange(n_cells), n_latent, n_samples).reshape(-1, n_latent)
    own_n = -0.5 * (n_latent * _LOG_2PI + np.log(variance_nk).sum(axis=1))
    information, correlation, correlation_k = 0.0, 0.0, np.zeros(n_latent)
    for start in range(0, len(noise_sk), chunk_size):
        noise_ck = noise_sk[start : start + chunk_size]
        cell_c = np.arange(start, start + len(noise_ck)) % n_cells
        z_ck = mean_nk[cell_c] + np.sqrt(variance_nk[cell_c]) * noise_ck
        joint_c, others_ck = joint.log_density(z_ck)
        margin_ck = np.stack([np.log(m.density(f_c)) for m, f_c in zip(margins, (z_ck @ rotation_kk).T)], axis=1)
        # Ratios of densities at the same draw vary less than either side with the other's expectation put in.
        information += (own_n[cell_c] - 0.5 * (noise_ck**2).sum(axis=1) - joint_c).sum()
        correlation += (joint_c - log_volume - margin_ck.sum(axis=1)).sum()
        correlation_k += (joint_c[:, None] - margin_ck - others_ck).sum(axis=0)
    return InformationLedger(
        kl_k=kl_k,
        mutual_information_k=kl_k - dimension_wise_k,
        dimension_wise_kl_k=dimension_wise_k,
        total_correlation_k=correlation_k / len(noise_sk),
        kl=float(kl_per_dimension(mean_nk, variance_nk).sum(axis=1).mean()),
        mutual_information=float(information / len(noise_sk)),
        total_correlation=float(correlation / len(noise_sk)),
        dimension_wise_kl=float(dimension_wise_k.sum()),
        n_cells=n_cells,
    )


def _checked(mean_nk: np.ndarray, variance_nk: np.ndarray, rotation_kk: np.ndarray | None) -> list[np.ndarray]:
    """The arguments in float64, or a ValueError."""
    mean_nk = read_only(mean_nk, (None, None), "mean_nk")
    if 0 in mean_nk.shape:
        msg = f"`mean_nk` must hold at least one cell and one latent; got shape {mean_nk.shape}."
        raise ValueError(msg)
    variance_nk = read_only(variance_nk, mean_nk.shape, "variance_nk")
    # Expanded quadratic forms are off by the rounding of squared means over variances: by 1e-4 at this floor.
    floor = 1e-12 * (mean_nk**2).max()
    if (variance_nk <= floor).any():
        msg = (
            f"`variance_nk` must be above {floor:.2g}, 1e-12 of the largest squared mean; got {variance_nk.min():.2g}."
        )
        raise ValueError(msg)
    n_latent = mean_nk.shape[1]
    if rotation_kk is None:
        return [mean_nk, variance_nk, np.eye(n_latent)]
    rotation_kk = read_only(rotation_kk, (n_latent, n_latent), "rotation_kk")
    return [mean_nk, variance_nk, axes_of_factors(rotation_kk, n_latent, _ROUNDING)]


class _Lattice(NamedTuple):
    """The components of a mixture whose standard deviations lie in one octave, on as fine a lattice as they need."""

    spacing: float
    """Distance of nodes, a power of two, so that each interval of a coarser lattice is a union of intervals."""
    node_i: np.ndarray
    """Nodes that some component reaches, as multiples of the spacing, ascending."""
    value_i: np.ndarray
    """Sum of the components' densities there."""
    derivative_i: np.ndarray
    """Its derivative, times the spacing."""

    @classmethod
    def of(cls, mean_n: np.ndarray, sd_n: np.ndarray, exponent: int) -> _Lattice:
        """Tabulate components with ``2**(exponent - 1) <= sd < 2**exponent``."""
        spacing = float(np.ldexp(1.0 / _INTERVALS_PER_SD, exponent - 1))
        reach = 2 * _INTERVALS_PER_SD * _REACH
        window_w = np.arange(-reach, reach + 2)
        mean_n, sd_n = (v_n[np.argsort(mean_n)] for v_n in (mean_n, sd_n))
        left_n = np.floor(mean_n / spacing).astype(np.int64)
        # Gaps between windows are left out of the table, which is then never larger than the windows.
        start_n = np.cumsum(np.minimum(np.diff(left_n, prepend=left_n[0]), len(window_w)))
        node_i = np.empty(start_n[-1] + len(window_w), dtype=np.int64)
        value_i, derivative_i = np.zeros(len(node_i)), np.zeros(len(node_i))
        for block in range(0, len(mean_n), _BLOCK):
            mean_n1, sd_n1, left_n1, start_n1 = (
                v[block : block + _BLOCK, None] for v in (mean_n, sd_n, left_n, start_n)
            )
            at_nw, node_nw = start_n1 - start_n1[0] + np.arange(len(window_w)), left_n1 + window_w
            table = slice(start_n1[0, 0], start_n1[-1, 0] + len(window_w))
            t_nw = (node_nw * spacing - mean_n1) / sd_n1
            value_nw = np.exp(-0.5 * t_nw**2) / (np.sqrt(2 * np.pi) * sd_n1)
            node_i[table][at_nw] = node_nw
            value_i[table] += np.bincount(at_nw.ravel(), weights=value_nw.ravel())
            derivative_i[table] -= np.bincount(at_nw.ravel(), weights=(value_nw * t_nw * spacing / sd_n1).ravel())
        return cls(spacing, node_i, value_i, derivative_i)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Density by cubic Hermite interpolation."""
        left = np.floor(x / self.spacing)
        t = x / self.spacing - left
        i = np.minimum(np.searchsorted(self.node_i, left), len(self.node_i) - 2)
        inside = (self.node_i[i] == left) & (self.node_i[i + 1] == left + 1)
        a, b, d_a, d_b = self.value_i[i], self.value_i[i + 1], self.derivative_i[i], self.derivative_i[i + 1]
        cubic = a + t * (d_a + t * (3 * (b - a) - 2 * d_a - d_b + t * (2 * (a - b) + d_a + d_b)))
        # Many standard deviations out the cubic can dip below zero.
        return np.where(inside, np.maximum(cubic, 0.0), 0.0)


class _Mixture:
    """Equal mixture of Gaussians in one dimension, whatever scales its components have.

    They are tabulated octave by octave: one grid would be too coarse for the narrowest or too long for the widest.
    """

    def __init__(self, mean_n: np.ndarray, sd_n: np.ndarray) -> None:
        self._n = len(mean_n)
        exponent_n = np.frexp(sd_n)[1]
        self._lattices = {
            int(e): _Lattice.of(mean_n[exponent_n == e], sd_n[exponent_n == e], int(e)) for e in np.unique(exponent_n)
        }

    def density(self, x: np.ndarray) -> np.ndarray:
        """Density at points near some component's mean, of the shape of ``x``."""
        return np.sum([lattice(x) for lattice in self._lattices.values()], axis=0) / self._n

    def negative_entropy(self) -> float:
        """Integral of ``q log q``, in nats, by Gauss-Legendre quadrature in each interval of the partition."""
        node_j, weight_j = np.polynomial.legendre.leggauss(4)
        total = 0.0
        for spacing, left_i in self._partition():
            q_ij = self.density((left_i[:, None] + 0.5 * (1 + node_j)) * spacing)
            total += 0.5 * spacing * float((xlogy(q_ij, q_ij) @ weight_j).sum())
        return total

    def _partition(self) -> list[tuple[float, np.ndarray]]:
        """Intervals that hold all mass, each as short as the narrowest component that reaches it demands."""
        partition, held, last = [], np.empty(0, dtype=np.int64), max(self._lattices)
        # Octaves from fine to coarse. Intervals in a finer octave, completed to whole intervals of this octave, are left out.
        for exponent in range(min(self._lattices), last + 1):
            spacing = float(np.ldexp(1.0 / _INTERVALS_PER_SD, exponent - 1))
            lattice = self._lattices.get(exponent)
            wanted = held if lattice is None else np.union1d(held, lattice.node_i)
            parents = np.unique(wanted >> 1)
            if exponent < last:
                wanted = (2 * parents[:, None] + np.arange(2)).ravel()
            partition.append((spacing, np.setdiff1d(wanted, held, assume_unique=True)))
            held = parents
        return partition


class _JointMixture:
    """Log densities of the aggregated posterior: of all factors together, and of all but one.

    With precisions ``a_n = 1 / variance_n``, and the direction d_k along which only factor k changes, factor k given the
    others is Gaussian under ``q(f|n)``, with precision ``P_nk = sum_i d_ik^2 a_ni`` and, off its mean,
    ``sum_i d_ik a_ni (z_i - mean_ni) / P_nk``. The density of the others is the joint one of z over that of the
    conditional. All of that is a matrix product with z and its squares.
    """

    def __init__(self, mean_nk: np.ndarray, variance_nk: np.ndarray, direction_kk: np.ndarray) -> None:
        # The expanded squares cancel less near the origin.
        self._origin_k = mean_nk.mean(axis=0)
        mean_nk = mean_nk - self._origin_k
        precision_nk = 1 / variance_nk
        constant_n = -0.5 * (mean_nk**2 * precision_nk + np.log(variance_nk) + _LOG_2PI).sum(axis=1)
        self._joint_nj = np.column_stack([-0.5 * precision_nk, mean_nk * precision_nk, constant_n])
        self._mean_nk, self._precision_nk, self._direction_kk = mean_nk, precision_nk, direction_kk
        self._conditional_nk = precision_nk @ direction_kk**2

    def log_density(self, z_ck: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log of q(z) at some points, shape (points,), and of q(all factors but k) times the volume, (points, factors)."""
        z_ck = z_ck - self._origin_k
        z_cj = np.column_stack([z_ck**2, z_ck, np.ones(len(z_ck))])
        n_cells, n_factors = self._mean_nk.shape
        log_sum_ck = np.full((len(z_ck), 1 + n_factors), -np.inf)
        for start in range(0, n_cells, _BLOCK):
            at = slice(start, start + _BLOCK)
            joint_cn = z_cj @ self._joint_nj[at].T
            log_sum_ck[:, 0] = np.logaddexp(log_sum_ck[:, 0], _log_sum_exp(joint_cn.copy()))
            for k in range(n_factors):
                # Squared, the deviation in standard deviations over sqrt(2) is minus the exponent of the conditional.
                gradient_ni = self._precision_nk[at] * self._direction_kk[:, k]
                gradient_ni /= np.sqrt(2 * self._conditional_nk[at, k, None])
                others_cn = z_ck @ gradient_ni.T
                others_cn -= (gradient_ni * self._mean_nk[at]).sum(axis=1)
                others_cn *= others_cn
                others_cn += joint_cn
                others_cn += 0.5 * (_LOG_2PI - np.log(self._conditional_nk[at, k]))
                log_sum_ck[:, k + 1] = np.logaddexp(log_sum_ck[:, k + 1], _log_sum_exp(others_cn))
        log_sum_ck -= np.log(n_cells)
        return log_sum_ck[:, 0], log_sum_ck[:, 1:]


def _log_sum_exp(value_cn: np.ndarray) -> np.ndarray:
    """Log of the row sums of exp, in place: scipy's makes copies that take longer than the sum."""
    largest_c = value_cn.max(axis=1)
    value_cn -= largest_c[:, None]
    return largest_c + np.log(np.exp(value_cn, out=value_cn).sum(axis=1))
