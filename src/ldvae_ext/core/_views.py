"""Equivalent decoders: with other signs, axes, gauge, or order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from ldvae_ext.core._arrays import as_numbers, permutation
from ldvae_ext.core._design import level_codes

# Affine maps that a decoder can have: log-rate, logits of zero inflation, log of the dispersion.
HEADS = ("", "dropout_", "dispersion_")
# Condition number of oblique axes at which rounding to float32 would show in decoded expression.
_MAX_CONDITION = 1e4


class DecoderViews:
    """Methods that return a decoder with other axes or another gauge, and the same expression."""

    weight_gk: np.ndarray
    intercept_bg: np.ndarray
    covariate_cg: np.ndarray | None
    genes: np.ndarray
    factors: np.ndarray
    latent_distribution: str
    link: str
    batches: np.ndarray
    dispersion: str
    theta_bg: np.ndarray | None

    def _with(self, **parts: Any) -> Self:
        return replace(self, **parts)  # type: ignore[type-var]

    def _weights(self) -> dict[str, np.ndarray]:
        """The loadings of each affine map that there is."""
        weights = {f"{head}weight_gk": getattr(self, f"{head}weight_gk") for head in HEADS}
        return {name: weight for name, weight in weights.items() if weight is not None}

    def signs(self) -> np.ndarray:
        """The canonical sign of each factor, +1 or -1, shape (factors,).

        A factor points to its longer tail of genes: the sum of cubes of its gene-centred loadings is positive. Cubes
        weigh many genes rather than the single largest loading, which in rarely seen genes is mostly noise. Under
        ``"ln"`` all signs are +1, since -z is no point of the simplex.

        Examples
        --------
        >>> from ldvae_ext.core import LinearDecoder
        >>> loadings = [[2, -2], [-1, 1], [-1, 1]]
        >>> decoder = LinearDecoder.from_loadings(loadings, [0, 0, 0], genes=list("abc"))
        >>> decoder.signs().tolist()  # the second factor is turned round
        [1, -1]
        """
        if self.latent_distribution == "ln":
            return np.ones(len(self.factors), dtype=np.int64)
        centred_gk = self.weight_gk - self.weight_gk.mean(axis=0)
        cubes_k = (centred_gk * centred_gk * centred_gk).sum(axis=0)
        return np.where(cubes_k < 0, -1, 1)

    def centered(self) -> Self:
        """The same decoder in the canonical gauge: loadings and intercepts sum to zero over genes.

        The softmax ignores a constant added to all genes of a cell, so each column of the loadings, each intercept and
        each effect of a covariate is free up to one. Under ``"ln"``, where z sums to 1, a vector added to all columns
        and subtracted from the intercepts changes nothing either; then the loadings also sum to zero over factors. A
        softplus fixes the constant over genes, so that nothing is centred over genes there.

        Examples
        --------
        >>> loadings = decoder.centered().weight_gk
        >>> bool(np.allclose(loadings.sum(axis=0), 0))
        True
        """
        weight_gk, intercept_bg, covariate_cg = self.weight_gk, self.intercept_bg, self.covariate_cg
        if self.link == "softmax":
            weight_gk = weight_gk - weight_gk.mean(axis=0)
            intercept_bg = intercept_bg - intercept_bg.mean(axis=1, keepdims=True)
            covariate_cg = None if covariate_cg is None else covariate_cg - covariate_cg.mean(axis=1, keepdims=True)
        if self.latent_distribution == "ln":
            common_g = weight_gk.mean(axis=1)
            weight_gk, intercept_bg = weight_gk - common_g[:, None], intercept_bg + common_g
        return self._with(weight_gk=weight_gk, intercept_bg=intercept_bg, covariate_cg=covariate_cg)

    def reordered(self, order: Sequence[int] | np.ndarray, signs: Sequence[int] | np.ndarray | None = None) -> Self:
        """The same decoder with its factors permuted and, on request, with other signs.

        ``decoder.reordered(order, signs).scale(z[:, order] * signs)`` equals ``decoder.scale(z)``. The raw parts stay
        in the network's order.

        Parameters
        ----------
        order
            A permutation: position of each new factor among the present ones.
        signs
            +1 or -1 for each new factor.

        Examples
        --------
        >>> decoder.reordered([4, 3, 2, 1, 0]).factors.tolist()
        ['Z_4', 'Z_3', 'Z_2', 'Z_1', 'Z_0']
        """
        order = permutation(order, len(self.factors))
        signs = np.ones(len(order), dtype=np.int64) if signs is None else np.asarray(signs)
        if signs.shape != order.shape or not np.isin(signs, (-1, 1)).all():
            msg = f"`signs` must be +1 or -1 for each factor; got {signs.tolist()}."
            raise ValueError(msg)
        if self.latent_distribution == "ln" and (signs < 0).any():
            msg = "The sign of a factor of a logistic-normal latent cannot change: -z is not on the simplex."
            raise ValueError(msg)
        signed = {name: weight[:, order] * signs for name, weight in self._weights().items()}
        return self._with(**signed, factors=self.factors[order])

    def rotated(self, rotation_kk: np.ndarray, factors: Sequence[str] | None = None) -> Self:
        """The same decoder with other axes of its latent space.

        ``decoder.rotated(R).scale(z @ R)`` equals ``decoder.scale(z)``: with ``f = R'z`` and ``L' = L R^-T`` the product ``L z``
        stays. For an orthogonal R, ``L' = L R`` and the prior N(0, I) stays, too; else it is N(0, R'R). Every head that depends
        on the latent has the new axes. The raw parts stay on the network's axes.

        Parameters
        ----------
        rotation_kk
            Shape (latents, factors), columns of unit length: column j is factor j in the present axes.
        factors
            Names of the new factors; ``F_0``, ``F_1``, ... if None.

        Raises
        ------
        ValueError
            If columns are not of unit length or not independent, or the latent is logistic-normal, whose simplex has no other
            axes.

        Examples
        --------
        >>> rotation = ldvae_ext.core.varimax(decoder.centered().weight_gk)
        >>> rotated, z = decoder.rotated(rotation), np.ones((1, 5))
        >>> bool(np.allclose(rotated.scale(z @ rotation), decoder.scale(z)))
        True
        """
        n_factors = len(self.factors)
        check_rotatable(self.latent_distribution)
        direction_kk = inverse_axes(axes_of_factors(rotation_kk, n_factors)).T
        names = [f"F_{k}" for k in range(n_factors)] if factors is None else factors
        return self._with(
            **{name: weight @ direction_kk for name, weight in self._weights().items()}, factors=np.array(names)
        )

    def with_genes_in_order(self, order: np.ndarray) -> Self:
        """The same decoder with its genes permuted, without the raw parts, whose genes are in the network's order.

        Parameters
        ----------
        order
            A permutation: position of each new gene among the present ones.
        """
        order = permutation(order, len(self.genes))
        return self if np.array_equal(order, np.arange(len(order))) else self._genes_at(order)

    def with_genes(self, genes: Sequence[str] | np.ndarray) -> Self:
        """The decoder of some genes, in the given order, without the raw parts.

        Under softmax the expression of the others is left out: shares are relative to the sum over these genes, as if only they
        had been measured.

        Parameters
        ----------
        genes
            Names.

        Raises
        ------
        ValueError
            If a gene is not in the decoder, or occurs more than once.

        Examples
        --------
        >>> panel = decoder.with_genes(["CD79A", "LYZ", "NKG7"])
        >>> shares = panel.scale(np.zeros((1, 5)))
        >>> shares.shape, bool(np.isclose(shares.sum(), 1))
        ((1, 3), True)
        """
        if isinstance(genes, str):
            msg = f"`genes` must be several names; got {genes!r}."
            raise ValueError(msg)
        known = {name: g for g, name in enumerate(self.genes.tolist())}
        wanted = np.asarray(genes).astype(str).tolist()
        wrong = [name for name in wanted if name not in known] + [
            n for n, times in Counter(wanted).items() if times > 1
        ]
        if wrong:
            msg = f"`genes` must be different genes of the decoder; got {wrong[0]!r}."
            raise ValueError(msg)
        return self._genes_at(np.array([known[name] for name in wanted], dtype=np.int64))

    def with_batches(self, batches: Sequence[str], source: str | None = None) -> Self:
        """The same decoder for other batches, each with the intercepts of one batch, or with the mean over all of them.

        Parameters
        ----------
        batches
            Names of the new batches.
        source
            The batch whose intercepts (and dispersions) all of them have; if None, the mean of the intercepts and of the log of
            the dispersions.

        Raises
        ------
        ValueError
            If there is no such batch.

        Examples
        --------
        >>> decoder.with_batches(["new", "newer"]).batches.tolist()
        ['new', 'newer']
        """
        if isinstance(batches, str):
            msg = f"`batches` must be several names; got {batches!r}."
            raise ValueError(msg)
        rows = np.arange(len(self.batches)) if source is None else level_codes(self.batches, str(source), 1)
        names = [f"{head}intercept_bg" for head in HEADS if getattr(self, f"{head}intercept_bg") is not None]
        parts = {name: getattr(self, name)[rows].mean(axis=0) for name in names}
        if self.theta_bg is not None and self.dispersion == "gene-batch":
            parts["theta_bg"] = np.exp(np.log(self.theta_bg[rows]).mean(axis=0))
        repeated = {name: np.tile(value_g, (len(batches), 1)) for name, value_g in parts.items()}
        return self._with(**repeated, batches=np.array(batches, dtype=str), raw=None, raw_dropout=None)

    def _genes_at(self, at: np.ndarray) -> Self:
        first = ["genes", *(f"{head}weight_gk" for head in HEADS)]
        last = ["theta_bg", *(f"{head}{part}" for head in HEADS for part in ("intercept_bg", "covariate_cg"))]
        along_first = {n: v[at] for n in first if (v := getattr(self, n)) is not None}
        along_last = {n: v[:, at] for n in last if (v := getattr(self, n)) is not None}
        return self._with(**along_first, **along_last, raw=None, raw_dropout=None)


def check_rotatable(latent_distribution: str) -> None:
    """Raise if the latent space has no other axes.

    Parameters
    ----------
    latent_distribution
        ``"normal"`` or ``"ln"``.
    """
    if latent_distribution == "ln":
        msg = (
            "A logistic-normal latent cannot be rotated: z = softmax(u) is on the simplex, and the softmax of a rotated u is "
            "no rotation of z. Train with `latent_distribution='normal'` to rotate factors."
        )
        raise ValueError(msg)


def axes_of_factors(rotation_kk: Any, n_factors: int, tolerance: float = 1e-8) -> np.ndarray:
    """A matrix of axes as float64, a copy, after a check that its columns are independent and of unit length.

    Parameters
    ----------
    rotation_kk
        The matrix.
    n_factors
        Its number of rows and columns.
    tolerance
        Greatest difference of a squared length from 1.
    """
    rotation_kk = np.array(as_numbers(rotation_kk, "rotation_kk"))
    if rotation_kk.shape != (n_factors, n_factors):
        msg = f"A rotation must have shape ({n_factors}, {n_factors}); got {rotation_kk.shape}."
        raise ValueError(msg)
    if not np.isfinite(rotation_kk).all():
        msg = f"A rotation must be finite; {np.count_nonzero(~np.isfinite(rotation_kk))} of {rotation_kk.size} values are not."
        raise ValueError(msg)
    off = np.abs(np.square(rotation_kk).sum(axis=0) - 1).max(initial=0)
    if not off <= tolerance:
        msg = f"Axes of factors must have unit length; their squared lengths differ from 1 by {off:.1g}."
        raise ValueError(msg)
    condition = np.linalg.cond(rotation_kk) if n_factors else 1.0
    if not condition <= _MAX_CONDITION:
        msg = f"Axes of factors must be independent; their matrix has a condition number of {condition:.1g}."
        raise ValueError(msg)
    return rotation_kk


def is_orthogonal(rotation_kk: np.ndarray, tolerance: float = 1e-8) -> bool:
    """True if the columns of a matrix of axes are orthogonal."""
    return bool(np.abs(rotation_kk.T @ rotation_kk - np.eye(len(rotation_kk))).max(initial=0) <= tolerance)


def inverse_axes(rotation_kk: np.ndarray, tolerance: float = 1e-8) -> np.ndarray:
    """The inverse of a matrix of axes, which takes factors back to latents: its transpose if it is orthogonal."""
    return rotation_kk.T if is_orthogonal(rotation_kk, tolerance) else np.linalg.inv(rotation_kk)
