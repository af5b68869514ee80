"""Folding a linear layer and its batch norm into one matrix, one intercept per batch and the effects of covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ldvae_ext._validate import check_positive_int, listed
from ldvae_ext.core._arrays import read_only
from ldvae_ext.core._design import Covariate


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm:
    """Statistics and parameters of a batch norm in evaluation mode.

    ``h = gamma * (a - running_mean) / sqrt(running_var + eps) + beta``, each array of shape (genes,), in log-rate.

    Examples
    --------
    >>> from ldvae_ext.core import BatchNorm
    >>> one, zero = np.ones(2), np.zeros(2)
    >>> BatchNorm(
    ...     running_mean=zero, running_var=4 * one, gamma=one, beta=zero, eps=0.0
    ... ).slope
    array([0.5, 0.5])
    """

    running_mean: np.ndarray
    running_var: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eps: float

    def __post_init__(self) -> None:
        for field in fields(self)[:4]:
            object.__setattr__(
                self, field.name, read_only(getattr(self, field.name), (np.size(self.gamma),), field.name)
            )
        if not (self.running_var + self.eps > 0).all():
            msg = f"`running_var` must be positive, with `eps`; got {self.running_var.min():g} and {self.eps:g}."
            raise ValueError(msg)

    @property
    def slope(self) -> np.ndarray:
        """``gamma / sqrt(running_var + eps)``, shape (genes,)."""
        return self.gamma / np.sqrt(self.running_var + self.eps)


def fold_batch_norm(
    weight_gp: np.ndarray, bias_g: np.ndarray, batch_norm: BatchNorm | None
) -> tuple[np.ndarray, np.ndarray]:
    """A linear layer and its batch norm in evaluation mode as one affine map.

    ``batch_norm(W x + b) = S W x + S (b - running_mean) + beta`` with ``S = diag(gamma / sqrt(running_var + eps))``.

    Parameters
    ----------
    weight_gp
        Weight of the linear layer, shape (outputs, inputs).
    bias_g
        Its bias, shape (..., outputs).
    batch_norm
        The batch norm; None if there is none.

    Returns
    -------
    Weight and bias of the affine map, of the same shapes.
    """
    if batch_norm is None:
        return weight_gp, bias_g
    scale_g = batch_norm.slope
    return weight_gp * scale_g[:, None], (bias_g - batch_norm.running_mean) * scale_g + batch_norm.beta


@dataclass(frozen=True, eq=False, kw_only=True)
class RawLinear:
    """A decoder layer of the network before folding.

    Parameters
    ----------
    weight
        Weight of the linear layer, shape (genes, columns). Columns: the latents, the continuous covariates, the batches
        (none for a single batch) and the levels of each categorical covariate (none for a single level).
    bias
        Bias of the linear layer, shape (genes,), or None.
    batch_norm
        The batch norm after the linear layer, or None.
    batch_embedding
        Input of the batch columns for each batch, shape (batches, columns); None for one-hot vectors.

    Examples
    --------
    >>> from ldvae_ext.core import RawLinear
    >>> layer = RawLinear(weight=np.array([[1, 0, 5], [2, 1, 7]]))
    >>> weight_gk, intercept_bg, _ = layer.fold(n_latent=1)  # and two batches
    >>> intercept_bg
    array([[0., 1.],
           [5., 7.]])
    """

    weight: np.ndarray
    bias: np.ndarray | None = None
    batch_norm: BatchNorm | None = None
    batch_embedding: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", read_only(self.weight, (None, None), "weight"))
        if self.bias is not None:
            object.__setattr__(self, "bias", read_only(self.bias, (len(self.weight),), "bias"))
        if self.batch_embedding is not None:
            object.__setattr__(
                self, "batch_embedding", read_only(self.batch_embedding, (None, None), "batch_embedding")
            )

    def fold(self, n_latent: int, covariates: Sequence[Covariate] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight, intercepts and covariate effects of the layer in evaluation mode, which is an affine map.

        With ``S = diag(gamma / sqrt(running_var + eps))`` (the identity without batch norm), the network computes
        ``S (W_z z + W_b + W_c c + bias - running_mean) + beta`` for batch ``b`` and covariates ``c``, hence::

            weight = S W_z,    intercept[b] = S (W_b + bias - running_mean) + beta,    effect = S W_c.

        Parameters
        ----------
        n_latent
            Number of latents.
        covariates
            The covariates, continuous ones first, as in the network.

        Returns
        -------
        ``weight_gk`` of shape (genes, latents), ``intercept_bg`` of shape (batches, genes) and ``covariate_cg`` of shape
        (columns of the covariates, genes), float64, in log-rate.
        """
        check_positive_int("n_latent", n_latent)
        n_continuous = sum(covariate.levels is None for covariate in covariates)
        sizes = [c.n_columns if c.n_columns > 1 else 0 for c in covariates if c.levels is not None]
        first_batch, first_level = n_latent + n_continuous, self.weight.shape[1] - sum(sizes)
        if first_batch > first_level:
            msg = (
                f"`n_latent` and the covariates must have at most the {self.weight.shape[1]} columns of the layer; got {n_latent} "
                f"and {n_continuous + sum(sizes)}."
            )
            raise ValueError(msg)
        columns_gb = self.weight[:, first_batch:first_level]

        effects = [self.weight[:, n_latent:first_batch].T]
        start = first_level
        for size in sizes:
            # A covariate with one level has no column, and no effect.
            effects.append(self.weight[:, start : start + size].T if size else np.zeros((1, len(self.weight))))
            start += size

        if self.batch_embedding is not None:
            shift_bg = self.batch_embedding @ columns_gb.T
        else:
            shift_bg = columns_gb.T.copy() if columns_gb.shape[1] else np.zeros((1, len(self.weight)))
        if self.bias is not None:
            shift_bg += self.bias
        weight_gk, intercept_bg = fold_batch_norm(self.weight[:, :n_latent], shift_bg, self.batch_norm)
        effect_cg = np.concatenate(effects)
        return weight_gk, intercept_bg, effect_cg if self.batch_norm is None else effect_cg * self.batch_norm.slope

    def to_arrays(self) -> dict[str, Any]:
        """Parts that are not None, as a flat dictionary."""
        out: dict[str, Any] = {"weight": self.weight}
        for name in ("bias", "batch_embedding"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        if self.batch_norm is not None:
            out.update({field.name: getattr(self.batch_norm, field.name) for field in fields(BatchNorm)})
        return out

    @classmethod
    def from_arrays(cls, arrays: Any, prefix: str = "") -> RawLinear | None:
        """Inverse of :meth:`to_arrays`, for keys with a prefix; None if they are missing.

        Parameters
        ----------
        arrays
            A mapping.
        prefix
            Start of its keys.
        """
        if f"{prefix}weight" not in arrays:
            return None
        batch_norm = None
        if f"{prefix}gamma" in arrays:
            missing = [field.name for field in fields(BatchNorm) if f"{prefix}{field.name}" not in arrays]
            if missing:
                msg = f"`arrays` hold a part of a batch norm: {listed(missing)} missing."
                raise ValueError(msg)
            parts = {field.name: arrays[f"{prefix}{field.name}"] for field in fields(BatchNorm)}
            if np.ndim(parts["eps"]) > 0:
                msg = f"`{prefix}eps` must be one number; got an array {np.shape(parts['eps'])}."
                raise ValueError(msg)
            batch_norm = BatchNorm(**{**parts, "eps": float(parts["eps"])})
        given = {name: arrays.get(f"{prefix}{name}") for name in ("weight", "bias", "batch_embedding")}
        return cls(**given, batch_norm=batch_norm)
