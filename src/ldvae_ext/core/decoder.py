"""LinearDecoder: the decoder of an LDVAE as a value that a person can hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import expit

from ldvae_ext._validate import check_one_of, listed
from ldvae_ext.core._arrays import as_numbers, check_shape, checked, names_array, per_cell
from ldvae_ext.core._decode import put_scale
from ldvae_ext.core._design import Covariate, checked_covariates, design_matrix, level_codes
from ldvae_ext.core._storage import FromArrays
from ldvae_ext.core._tables import Tables
from ldvae_ext.core._views import HEADS, DecoderViews
from ldvae_ext.core.fold import RawLinear
from ldvae_ext.core.posterior import deterministic_latent

LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
LATENT_DISTRIBUTIONS = ("normal", "ln")
LINKS = ("softmax", "softplus")


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearDecoder(DecoderViews, FromArrays):
    """An affine map from the latent space to the log-rates of genes, with the other parameters of the likelihood.

    For a cell of batch ``b`` with latent ``z``, covariates ``c`` and library size ``l`` the decoder of an LDVAE in
    evaluation mode is::

        logits = weight_gk @ z + intercept_bg[b] + covariate_cg.T @ c,   scale = softmax(logits),   rate = l * scale

    (Svensson et al. 2020, 10.1093/bioinformatics/btaa169; batch norm folded in, see
    :meth:`ldvae_ext.core.RawLinear.fold`). With size factors the link is ``softplus`` and ``l`` the size factor, as in
    ``scvi.model.SCVI``. All arrays are float64 and read-only.

    Parameters
    ----------
    weight_gk
        Folded loadings, shape (genes, factors), in log-rate per unit of latent (under softplus: in its argument).
    intercept_bg
        Folded intercept of each batch, shape (batches, genes), in log-rate.
    genes, batches, factors
        Names along the axes; unique.
    likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    dispersion
        ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``.
    theta_bg
        Inverse dispersion of the negative binomial, in counts; the variance is ``rate + rate^2 / theta``. The standard
        deviation under ``"normal"``. Shape (1, genes) for ``"gene"``, (batches, genes) for ``"gene-batch"``, (labels, genes)
        for ``"gene-label"``; None under ``"poisson"`` and for ``"gene-cell"``.
    latent_distribution
        ``"normal"``, or ``"ln"``: z = softmax(u) is on the simplex.
    link
        ``"softmax"`` or ``"softplus"``.
    covariates
        Covariates other than the batch, each a :class:`ldvae_ext.core.Covariate`.
    covariate_cg
        Effect of each level of a categorical covariate, or of one unit of a continuous one, on the logits; shape (columns of
        the covariates, genes). None without covariates.
    labels
        Names of the labels; only for ``"gene-label"``.
    dropout_weight_gk, dropout_intercept_bg, dropout_covariate_cg
        The same for the logits of zero inflation; only under ``"zinb"``.
    dispersion_weight_gk, dispersion_intercept_bg, dispersion_covariate_cg
        The same for the log of theta; only for ``"gene-cell"``.
    raw, raw_dropout
        Parts of the network from which the folded arrays were computed; None if there are none.

    Examples
    --------
    >>> from ldvae_ext.core import LinearDecoder
    >>> loadings = [[0], [np.log(3)]]
    >>> decoder = LinearDecoder.from_loadings(loadings, [0, 0], genes=["a", "b"])
    >>> decoder.rate([[0], [1]], library=100)
    array([[50., 50.],
           [25., 75.]])
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
    link: str = "softmax"
    covariates: tuple[Covariate, ...] = ()
    covariate_cg: np.ndarray | None = None
    labels: np.ndarray | None = None
    dropout_weight_gk: np.ndarray | None = None
    dropout_intercept_bg: np.ndarray | None = None
    dropout_covariate_cg: np.ndarray | None = None
    dispersion_weight_gk: np.ndarray | None = None
    dispersion_intercept_bg: np.ndarray | None = None
    dispersion_covariate_cg: np.ndarray | None = None
    raw: RawLinear | None = None
    raw_dropout: RawLinear | None = None

    def __post_init__(self) -> None:
        check_one_of("likelihood", self.likelihood, LIKELIHOODS)
        check_one_of("dispersion", self.dispersion, DISPERSIONS)
        check_one_of("latent_distribution", self.latent_distribution, LATENT_DISTRIBUTIONS)
        check_one_of("link", self.link, LINKS)
        object.__setattr__(self, "covariates", checked_covariates(self.covariates))
        self._freeze("weight_gk", (None, None))
        n_genes, n_factors = self.weight_gk.shape
        self._freeze("intercept_bg", (None, n_genes))
        n_batches, n_columns = len(self.intercept_bg), sum(c.n_columns for c in self.covariates)
        for name, length in (("genes", n_genes), ("batches", n_batches), ("factors", n_factors)):
            object.__setattr__(self, name, names_array(getattr(self, name), length, name))
        has_theta, per_cell = self.likelihood != "poisson", self.dispersion == "gene-cell"
        self._expect("theta_bg", has_theta and not per_cell)
        self._expect("labels", has_theta and self.dispersion == "gene-label")
        if self.labels is not None:
            object.__setattr__(self, "labels", names_array(self.labels, len(self.labels), "labels"))
        n_rows = {"gene-batch": n_batches, "gene-label": 0 if self.labels is None else len(self.labels)}
        self._freeze("theta_bg", (n_rows.get(self.dispersion, 1), n_genes), positive=True)
        for head, present in zip(HEADS, (True, self.likelihood == "zinb", has_theta and per_cell), strict=True):
            self._expect(f"{head}weight_gk", present)
            self._expect(f"{head}intercept_bg", present)
            self._expect(f"{head}covariate_cg", present and n_columns > 0)
            self._freeze(f"{head}weight_gk", (n_genes, n_factors))
            self._freeze(f"{head}intercept_bg", (n_batches, n_genes))
            self._freeze(f"{head}covariate_cg", (n_columns, n_genes))

    def _expect(self, name: str, present: bool) -> None:
        if (getattr(self, name) is not None) != present:
            kind = (
                f"`likelihood={self.likelihood!r}`, `dispersion={self.dispersion!r}`, {len(self.covariates)} covariates"
            )
            msg = f"`{name}` must {'' if present else 'not '}be given with {kind}."
            raise ValueError(msg)

    def __repr__(self) -> str:
        return (
            f"LinearDecoder({len(self.genes)} genes x {len(self.factors)} factors, {len(self.batches)} batches, "
            f"{f'{len(self.covariates)} covariates, ' if self.covariates else ''}"
            f"likelihood={self.likelihood!r}, dispersion={self.dispersion!r}, "
            f"latent_distribution={self.latent_distribution!r}{", link='softplus'" if self.link == 'softplus' else ''})"
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
        return level_codes(self.batches, batch, n_cells)

    @cached_property
    def _tables(self) -> Tables:
        """Arrays as compiled loops want them; kept as long as the decoder is."""
        return Tables.of(self.weight_gk, self.intercept_bg, self.theta_bg)

    def __getstate__(self) -> dict[str, Any]:
        # Tables are made again where they are needed.
        return {name: value for name, value in self.__dict__.items() if name != "_tables"}

    def _latent(self, z_nk: Any) -> np.ndarray:
        columns = getattr(z_nk, "columns", None)
        if columns is not None and [str(name) for name in columns] != self.factors.tolist():
            msg = f"The columns of `z` must be {listed(self.factors)}, in this order; got {listed(columns)}."
            raise ValueError(msg)
        z_nk = as_numbers(z_nk, "z")
        if z_nk.ndim != 2 or z_nk.shape[1] != len(self.factors):
            msg = f"`z` must have shape (cells, {len(self.factors)}); got {z_nk.shape}."
            raise ValueError(msg)
        return z_nk

    def _given(
        self, z_nk: Any, batch: Any, covariates: Any, library: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Latents, batch codes, design of the covariates and library sizes of cells, checked; see :meth:`rate`."""
        z_nk = self._latent(z_nk)
        batch_n, design_nc = self.batch_codes(batch, len(z_nk)), None
        if self.covariates or covariates is not None:
            design_nc = design_matrix(self.covariates, covariates, len(z_nk))
        return z_nk, batch_n, design_nc, per_cell(library, len(z_nk), "library")

    def _affine(self, head: str, z_nk: Any, batch: Any, covariates: Any) -> np.ndarray:
        z_nk = self._latent(z_nk)
        weight_gk, intercept_bg = getattr(self, f"{head}weight_gk"), getattr(self, f"{head}intercept_bg")
        out_ng = z_nk @ weight_gk.T + intercept_bg[self.batch_codes(batch, len(z_nk))]
        if self.covariates or covariates is not None:
            design_nc = design_matrix(self.covariates, covariates, len(z_nk))
            if self.covariates:
                out_ng += design_nc @ getattr(self, f"{head}covariate_cg")
        return out_ng

    def logits(self, z_nk: Any, batch: Any = None, covariates: Any = None) -> np.ndarray:
        """``z @ weight.T + intercept[batch]`` and the effects of covariates, in log-rate up to a constant per cell.

        Parameters
        ----------
        z_nk, batch, covariates
            See :meth:`scale`.

        Returns
        -------
        Shape (cells, genes), float64.
        """
        return self._affine("", z_nk, batch, covariates)

    def apply_link(self, logits_ng: np.ndarray) -> np.ndarray:
        """Scale of given logits: their softmax over genes, or softplus.

        Parameters
        ----------
        logits_ng
            Shape (cells, genes).
        """
        if self.link == "softmax":
            check_shape(logits_ng, (None, len(self.genes)), "logits_ng")
            scale_ng = logits_ng - logits_ng.max(axis=1, keepdims=True)
            np.exp(scale_ng, out=scale_ng)
            scale_ng /= scale_ng.sum(axis=1, keepdims=True)
            return scale_ng
        # torch's softplus, which is the identity beyond 20.
        return np.where(logits_ng > 20.0, logits_ng, np.logaddexp(0.0, logits_ng))

    def scale(self, z_nk: Any, batch: Any = None, covariates: Any = None) -> np.ndarray:
        """Share of each gene in a cell's expression: the softmax of :meth:`logits` (softplus with size factors).

        Parameters
        ----------
        z_nk
            Latents, shape (cells, factors); under ``"ln"`` points of the simplex.
        batch
            See :meth:`batch_codes`.
        covariates
            A mapping or DataFrame (which may hold more) from the name of each covariate to its value, one for all cells or
            one for each: a level, by name or code as for ``batch``, or a number. None if the decoder has none.

        Returns
        -------
        Shape (cells, genes), float64; rows sum to 1 under softmax. ``px.scale`` of scvi-tools.
        """
        return self.rate(z_nk, batch, covariates, library=1.0)

    def rate(self, z_nk: Any, batch: Any = None, covariates: Any = None, *, library: Any) -> np.ndarray:
        """Mean counts, ``library * scale``.

        Parameters
        ----------
        z_nk, batch, covariates
            See :meth:`scale`.
        library
            Library size in counts, or size factor under softplus: one, or one for each cell.

        Returns
        -------
        Shape (cells, genes), float64. ``px.mu`` of scvi-tools (``px.rate`` under ``"poisson"``).
        """
        cells = self._given(z_nk, batch, covariates, library)
        out_ng = np.empty((len(cells[0]), len(self.genes)))
        put_scale(self, out_ng, *cells)
        return out_ng

    def dropout_logits(self, z_nk: Any, batch: Any = None, covariates: Any = None) -> np.ndarray:
        """Logits of zero inflation; only under ``"zinb"``.

        Parameters
        ----------
        z_nk, batch, covariates
            See :meth:`scale`.

        Returns
        -------
        Shape (cells, genes), float64. ``px.zi_logits`` of scvi-tools.

        Raises
        ------
        ValueError
            Under another likelihood.
        """
        if self.likelihood != "zinb":
            msg = f"Only `likelihood='zinb'` has dropout logits; this decoder has {self.likelihood!r}."
            raise ValueError(msg)
        return self._affine("dropout_", z_nk, batch, covariates)

    def theta(
        self, batch: Any = None, n_cells: int = 1, *, label: Any = None, z_nk: Any = None, covariates: Any = None
    ) -> np.ndarray:
        """Inverse dispersion of the negative binomial, in counts; the standard deviation under ``"normal"``.

        Parameters
        ----------
        batch, n_cells
            See :meth:`batch_codes`; not needed under ``"gene"``.
        label
            One label or one for each cell, by name or code; needed under ``"gene-label"`` only.
        z_nk, covariates
            See :meth:`scale`; needed under ``"gene-cell"`` only.

        Returns
        -------
        Shape (1, genes) under ``"gene"``, (cells, genes) otherwise.

        Raises
        ------
        ValueError
            Under ``"poisson"``, which has none.
        """
        if self.dispersion == "gene-cell" and self.likelihood != "poisson":
            if z_nk is None:
                msg = "`z_nk` is needed, since the dispersion depends on the cell (`dispersion='gene-cell'`)."
                raise ValueError(msg)
            return np.exp(self._affine("dispersion_", z_nk, batch, covariates))
        if self.theta_bg is None:
            msg = "A Poisson likelihood has no dispersion."
            raise ValueError(msg)
        if self.labels is not None:
            return self.theta_bg[level_codes(self.labels, label, n_cells, "label")]
        return self.theta_bg if self.dispersion == "gene" else self.theta_bg[self.batch_codes(batch, n_cells)]

    def gene_information(self) -> np.ndarray:
        """Share of each gene in the Fisher information of the counts about each factor, for a cell at the prior mean.

        The Fisher information of a cell's counts, given their total n, about ``z_k`` is ``n Var_rho(L_k)``, the
        variance of the loadings under the expression ``rho``; gene g contributes ``rho_g (L_gk - E_rho[L_k])^2``. Large
        loadings of genes with low expression contribute little information, and are estimated badly. (Counts are taken as
        multinomial here, and as Poisson under softplus, with contributions ``rho_g (d log rho_g / d z_k)^2``; overdispersion
        is left out.) ``rho`` is the scale at z = 0 (u = 0 under ``"ln"``), averaged over batches, at the
        mean of a categorical covariate's levels and 0 of a continuous one.

        Returns
        -------
        Shape (genes, factors), float64. Absolute values of each column sum to 1. The sign is positive if the gene's share
        of expression increases with the factor.
        """
        rho_g, gradient_gk = self._gradient_at_the_prior_mean()
        information_gk = rho_g[:, None] * gradient_gk * np.abs(gradient_gk)
        total_k = np.abs(information_gk).sum(axis=0)
        return np.divide(information_gk, total_k, out=np.zeros_like(information_gk), where=total_k > 0)

    def gene_information_error(self, error_gk: np.ndarray) -> np.ndarray:
        """Standard errors of :meth:`gene_information` from those of the loadings, to first order in each gene's own loading.

        The derivative of a share I by its loading L is ``2 I (1 - I - rho_g) / (L - E_rho[L])`` under softmax, ``2 I (1 - I) / L``
        under softplus.

        Parameters
        ----------
        error_gk
            Standard errors of the loadings, shape (genes, factors).

        Returns
        -------
        Shape (genes, factors), float64.
        """
        error_gk = checked(error_gk, self.weight_gk.shape, "error_gk", finite=False)
        rho_g, gradient_gk = self._gradient_at_the_prior_mean()
        share_gk = np.abs(self.gene_information())
        remaining_gk, relative_gk = 1 - share_gk, self.weight_gk
        if self.link == "softmax":
            remaining_gk, relative_gk = remaining_gk - rho_g[:, None], gradient_gk
        derivative_gk = np.divide(
            2 * share_gk * remaining_gk, np.abs(relative_gk), out=np.zeros_like(share_gk), where=share_gk > 0
        )
        return np.abs(derivative_gk) * error_gk

    def _gradient_at_the_prior_mean(self) -> tuple[np.ndarray, np.ndarray]:
        """Expression at the prior mean and the gradient of its log, which is the loading less its mean under softmax."""
        origin_k = deterministic_latent(np.zeros((1, len(self.factors))), self.latent_distribution)[0]
        logits_bg = self.intercept_bg + self.weight_gk @ origin_k
        if self.covariate_cg is not None:
            levels = [
                np.zeros(1) if c.levels is None else np.full(c.n_columns, 1 / c.n_columns) for c in self.covariates
            ]
            logits_bg = logits_bg + np.concatenate(levels) @ self.covariate_cg
        rho_g = self.apply_link(logits_bg).mean(axis=0)
        weight_gk = self.centered().weight_gk
        if self.link == "softmax":
            gradient_gk = weight_gk - rho_g @ weight_gk
        else:
            gradient_gk = weight_gk * (expit(logits_bg).mean(axis=0) / rho_g)[:, None]
        return rho_g, gradient_gk
