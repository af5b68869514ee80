"""LinearDecoder: the decoder of an LDVAE as a value that a person can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from ldvae_ext._validate import check_one_of, listed
from ldvae_ext.core._arrays import names_array, read_only
from ldvae_ext.core._batches import batch_codes
from ldvae_ext.core.fold import RawLinear
from ldvae_ext.core.posterior import deterministic_latent

LIKELIHOODS = ("nb", "zinb", "poisson")
DISPERSIONS = ("gene", "gene-batch")
LATENT_DISTRIBUTIONS = ("normal", "ln")


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearDecoder:
    """An affine map from the latent space to the log-rates of genes, with what a likelihood needs besides.

    For a cell of batch ``b`` with latent ``z`` and library size ``l`` the decoder of an LDVAE in evaluation mode is::

        logits = weight_gk @ z + intercept_bg[b],   scale = softmax(logits),   rate = l * scale

    (Svensson et al. 2020, 10.1093/bioinformatics/btaa169; batch norm folded in, see
    :meth:`ldvae_ext.core.RawLinear.fold`). All arrays are float64 and read-only.

    Parameters
    ----------
    weight_gk
        Folded loadings, shape (genes, factors), in log-rate per unit of latent.
    intercept_bg
        Folded intercept of each batch, shape (batches, genes), in log-rate.
    genes, batches, factors
        Names along the axes; unique.
    likelihood
        ``"nb"``, ``"zinb"`` or ``"poisson"``.
    dispersion
        ``"gene"`` or ``"gene-batch"``.
    theta_bg
        Inverse dispersion of the negative binomial, in counts: shape (1, genes) for ``"gene"``, (batches, genes) for
        ``"gene-batch"``; None under ``"poisson"``. The variance is ``rate + rate^2 / theta``.
    latent_distribution
        ``"normal"``, or ``"ln"``, where z = softmax(u) lies on the simplex.
    dropout_weight_gk, dropout_intercept_bg
        The same for the logits of zero inflation; only under ``"zinb"``.
    raw, raw_dropout
        The parts of the network that the folded arrays came from, where there are any.
    """

    weight_gk: np.ndarray
    intercept_bg: np.ndarray
    genes: np.ndarray
    batches: np.ndarray
    factors: np.ndarray
    likelihood: str = "nb"
    dispersion: str = "gene"
    theta_bg: np.ndarray | None = None
    latent_distribution: str = "normal"
    dropout_weight_gk: np.ndarray | None = None
    dropout_intercept_bg: np.ndarray | None = None
    raw: RawLinear | None = None
    raw_dropout: RawLinear | None = None

    def __post_init__(self) -> None:
        check_one_of("likelihood", self.likelihood, LIKELIHOODS)
        check_one_of("dispersion", self.dispersion, DISPERSIONS)
        check_one_of("latent_distribution", self.latent_distribution, LATENT_DISTRIBUTIONS)
        self._freeze("weight_gk", (None, None))
        n_genes, n_factors = self.weight_gk.shape
        self._freeze("intercept_bg", (None, n_genes))
        n_batches = len(self.intercept_bg)
        for name, length in (("genes", n_genes), ("batches", n_batches), ("factors", n_factors)):
            object.__setattr__(self, name, names_array(getattr(self, name), length, name))
        self._expect("theta_bg", self.likelihood != "poisson")
        self._freeze("theta_bg", (n_batches if self.dispersion == "gene-batch" else 1, n_genes))
        self._expect("dropout_weight_gk", self.likelihood == "zinb")
        self._expect("dropout_intercept_bg", self.likelihood == "zinb")
        self._freeze("dropout_weight_gk", (n_genes, n_factors))
        self._freeze("dropout_intercept_bg", (n_batches, n_genes))

    def _freeze(self, name: str, shape: tuple[int | None, ...]) -> None:
        if getattr(self, name) is not None:
            object.__setattr__(self, name, read_only(getattr(self, name), shape, name))

    def _expect(self, name: str, present: bool) -> None:
        if (getattr(self, name) is not None) != present:
            msg = f"`{name}` must {'' if present else 'not '}be given with `likelihood={self.likelihood!r}`."
            raise ValueError(msg)

    def __repr__(self) -> str:
        return (
            f"LinearDecoder({len(self.genes)} genes x {len(self.factors)} factors, {len(self.batches)} batches, "
            f"likelihood={self.likelihood!r}, dispersion={self.dispersion!r}, "
            f"latent_distribution={self.latent_distribution!r})"
        )

    def batch_codes(self, batch: Any, n_cells: int) -> np.ndarray:
        """Row of ``intercept_bg`` for each cell.

        Parameters
        ----------
        batch
            None (only with a single batch), one batch for all cells, or one for each cell. Strings and the values of a
            pandas categorical are names, integers are codes, 0-based, in the order of ``batches``.
        n_cells
            Number of cells.

        Returns
        -------
        Shape (cells,), int64.

        Raises
        ------
        ValueError
            If a batch is needed or unknown, or if integers are given where batches are named by other integers than
            their codes, so that 1 could mean either.
        """
        return batch_codes(self.batches, batch, n_cells)

    def _latent(self, z_nk: Any) -> np.ndarray:
        columns = getattr(z_nk, "columns", None)
        if columns is not None and [str(name) for name in columns] != self.factors.tolist():
            msg = f"The columns of `z` must be {listed(self.factors)}, in this order; got {listed(columns)}."
            raise ValueError(msg)
        z_nk = np.asarray(z_nk, dtype=np.float64)
        if z_nk.ndim != 2 or z_nk.shape[1] != len(self.factors):
            msg = f"`z` must have shape (cells, {len(self.factors)}); got {z_nk.shape}."
            raise ValueError(msg)
        return z_nk

    def logits(self, z_nk: Any, batch: Any = None) -> np.ndarray:
        """``z @ weight.T + intercept[batch]``, in log-rate up to a constant per cell.

        Parameters
        ----------
        z_nk, batch
            See :meth:`scale`.

        Returns
        -------
        Shape (cells, genes), float64.
        """
        z_nk = self._latent(z_nk)
        return z_nk @ self.weight_gk.T + self.intercept_bg[self.batch_codes(batch, len(z_nk))]

    def scale(self, z_nk: Any, batch: Any = None) -> np.ndarray:
        """Share of each gene in a cell's expression: the softmax of :meth:`logits`.

        Parameters
        ----------
        z_nk
            Latents, shape (cells, factors); under ``"ln"`` points of the simplex.
        batch
            See :meth:`batch_codes`.

        Returns
        -------
        Shape (cells, genes), float64; rows sum to 1. ``px.scale`` of scvi-tools.
        """
        return softmax(self.logits(z_nk, batch), axis=1)

    def rate(self, z_nk: Any, batch: Any = None, *, library: Any) -> np.ndarray:
        """Mean counts, ``library * scale``.

        Parameters
        ----------
        z_nk, batch
            See :meth:`scale`.
        library
            Library size in counts: one, or one for each cell.

        Returns
        -------
        Shape (cells, genes), float64. ``px.mu`` of scvi-tools (``px.rate`` under ``"poisson"``).
        """
        scale_ng = self.scale(z_nk, batch)
        return scale_ng * np.broadcast_to(np.asarray(library, dtype=np.float64).ravel(), (len(scale_ng),))[:, None]

    def dropout_logits(self, z_nk: Any, batch: Any = None) -> np.ndarray:
        """Logits of zero inflation; only under ``"zinb"``.

        Parameters
        ----------
        z_nk, batch
            See :meth:`scale`.

        Returns
        -------
        Shape (cells, genes), float64. ``px.zi_logits`` of scvi-tools.

        Raises
        ------
        ValueError
            Under another likelihood.
        """
        if self.dropout_weight_gk is None or self.dropout_intercept_bg is None:
            msg = f"Only `likelihood='zinb'` has dropout logits; this decoder has {self.likelihood!r}."
            raise ValueError(msg)
        z_nk = self._latent(z_nk)
        return z_nk @ self.dropout_weight_gk.T + self.dropout_intercept_bg[self.batch_codes(batch, len(z_nk))]

    def theta(self, batch: Any = None, n_cells: int = 1) -> np.ndarray:
        """Inverse dispersion of the negative binomial, in counts.

        Parameters
        ----------
        batch, n_cells
            See :meth:`batch_codes`; not needed under ``"gene"``.

        Returns
        -------
        Shape (1, genes) under ``"gene"``, (cells, genes) under ``"gene-batch"``.

        Raises
        ------
        ValueError
            Under ``"poisson"``, which has none.
        """
        if self.theta_bg is None:
            msg = "A Poisson likelihood has no dispersion."
            raise ValueError(msg)
        return self.theta_bg if self.dispersion == "gene" else self.theta_bg[self.batch_codes(batch, n_cells)]

    def signs(self) -> np.ndarray:
        """The canonical sign of each factor, +1 or -1, shape (factors,).

        A factor points to its longer tail of genes: the sum of cubes of its gene-centred loadings is positive. Cubes
        weigh many genes rather than the single largest loading, which in rarely seen genes is mostly noise. Under
        ``"ln"`` all signs are +1, since -z is no point of the simplex.
        """
        if self.latent_distribution == "ln":
            return np.ones(len(self.factors), dtype=np.int64)
        centred_gk = self.weight_gk - self.weight_gk.mean(axis=0)
        cubes_k = (centred_gk * centred_gk * centred_gk).sum(axis=0)
        return np.where(cubes_k < 0, -1, 1)

    def centered(self) -> LinearDecoder:
        """The same decoder in the canonical gauge: loadings and intercepts sum to zero over genes.

        The softmax ignores a constant added to all genes of a cell, so each column of the loadings and each
        intercept is free up to one. Under ``"ln"``, where z sums to 1, a vector added to all columns and taken from
        the intercepts changes nothing either; there the loadings also sum to zero over factors.
        """
        weight_gk = self.weight_gk - self.weight_gk.mean(axis=0)
        intercept_bg = self.intercept_bg - self.intercept_bg.mean(axis=1, keepdims=True)
        if self.latent_distribution == "ln":
            common_g = weight_gk.mean(axis=1)
            weight_gk, intercept_bg = weight_gk - common_g[:, None], intercept_bg + common_g
        return replace(self, weight_gk=weight_gk, intercept_bg=intercept_bg)

    def reordered(
        self, order: Sequence[int] | np.ndarray, signs: Sequence[int] | np.ndarray | None = None
    ) -> LinearDecoder:
        """The same decoder with its factors permuted and, where asked for, turned.

        ``decoder.reordered(order, signs).scale(z[:, order] * signs)`` equals ``decoder.scale(z)``. The raw parts stay
        in the network's order.

        Parameters
        ----------
        order
            A permutation: position of each new factor among the present ones.
        signs
            +1 or -1 for each new factor.
        """
        order = np.asarray(order)
        signs = np.ones(len(order), dtype=np.int64) if signs is None else np.asarray(signs)
        if not np.array_equal(np.sort(order), np.arange(len(self.factors))):
            msg = f"`order` must be a permutation of 0 to {len(self.factors) - 1}; got {order.tolist()}."
            raise ValueError(msg)
        if signs.shape != order.shape or not np.isin(signs, (-1, 1)).all():
            msg = f"`signs` must be +1 or -1 for each factor; got {signs.tolist()}."
            raise ValueError(msg)
        if self.latent_distribution == "ln" and (signs < 0).any():
            msg = "A factor of a logistic-normal latent cannot be turned: -z is no point of the simplex."
            raise ValueError(msg)
        dropout = self.dropout_weight_gk
        return replace(
            self,
            weight_gk=self.weight_gk[:, order] * signs,
            dropout_weight_gk=None if dropout is None else dropout[:, order] * signs,
            factors=self.factors[order],
        )

    def with_genes_in_order(self, order: np.ndarray) -> LinearDecoder:
        """The same decoder with its genes permuted; the raw parts are left out, since they belong to the network.

        Parameters
        ----------
        order
            A permutation: position of each new gene among the present ones.
        """
        if not np.array_equal(np.sort(order), np.arange(len(self.genes))):
            msg = f"`order` must be a permutation of 0 to {len(self.genes) - 1}."
            raise ValueError(msg)
        if np.array_equal(order, np.arange(len(order))):
            return self
        along_first = {
            n: v[order] for n in ("weight_gk", "dropout_weight_gk", "genes") if (v := getattr(self, n)) is not None
        }
        along_last = {
            n: v[:, order]
            for n in ("intercept_bg", "dropout_intercept_bg", "theta_bg")
            if (v := getattr(self, n)) is not None
        }
        return replace(self, **along_first, **along_last, raw=None, raw_dropout=None)

    def gene_information(self) -> np.ndarray:
        """Share of each gene in what the counts say about each factor, for a cell at the prior mean.

        The Fisher information of a cell's counts, given their total n, about ``z_k`` is ``n Var_rho(L_k)``, the
        variance of the loadings under the expression ``rho``; gene g contributes ``rho_g (L_gk - E_rho[L_k])^2``. Large
        loadings of genes that are hardly expressed say little about a cell, and are known badly. (Counts are taken for
        multinomial here; over-dispersion is left out.) ``rho`` is the scale at z = 0 (u = 0 under ``"ln"``), averaged over
        batches.

        Returns
        -------
        Shape (genes, factors), float64; each column sums to 1, absolutely. The sign says whether the gene's share of
        expression rises or falls with the factor.
        """
        weight_gk = self.centered().weight_gk
        origin = deterministic_latent(np.zeros((len(self.batches), len(self.factors))), self.latent_distribution)
        rho_g = self.scale(origin, self.batches).mean(axis=0)
        slope_gk = weight_gk - rho_g @ weight_gk
        information_gk = rho_g[:, None] * slope_gk * np.abs(slope_gk)
        total_k = np.abs(information_gk).sum(axis=0)
        return np.divide(information_gk, total_k, out=np.zeros_like(information_gk), where=total_k > 0)

    def to_arrays(self) -> dict[str, Any]:
        """A flat dictionary of arrays, strings and numbers, without None: what ``.npz`` and ``adata.uns`` can hold."""
        out: dict[str, Any] = {}
        for name in _PLAIN:
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        for name, raw in (("raw", self.raw), ("raw_dropout", self.raw_dropout)):
            if raw is not None:
                out.update({f"{name}_{part}": value for part, value in raw.to_arrays().items()})
        return out

    @classmethod
    def from_arrays(cls, arrays: Any) -> LinearDecoder:
        """The decoder that :meth:`to_arrays` took apart, also after h5ad, zarr or ``.npz``."""
        missing = sorted({"weight_gk", "intercept_bg", "genes", "batches", "factors"} - set(arrays))
        if missing:
            msg = f"These arrays hold no decoder: {listed(missing)} missing."
            raise ValueError(msg)
        values = {name: arrays[name] for name in _PLAIN if name in arrays}
        for name in ("likelihood", "dispersion", "latent_distribution"):
            if name in values:
                values[name] = str(values[name])
        return cls(
            **values,
            raw=RawLinear.from_arrays(arrays, "raw_"),
            raw_dropout=RawLinear.from_arrays(arrays, "raw_dropout_"),
        )

    def save(self, path: str | Path) -> None:
        """Write the decoder to one ``.npz`` file, without pickle."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.to_arrays())

    @classmethod
    def load(cls, path: str | Path) -> LinearDecoder:
        """Read a decoder that :meth:`save` wrote; nothing is unpickled."""
        with np.load(Path(path), allow_pickle=False) as arrays:
            return cls.from_arrays({name: arrays[name] for name in arrays.files})


_PLAIN = (
    "weight_gk",
    "intercept_bg",
    "genes",
    "batches",
    "factors",
    "likelihood",
    "dispersion",
    "theta_bg",
    "latent_distribution",
    "dropout_weight_gk",
    "dropout_intercept_bg",
)
