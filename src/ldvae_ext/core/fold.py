"""Folding a linear layer and its batch norm into one matrix and one intercept per batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ldvae_ext.core._arrays import read_only


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm:
    """Statistics and parameters of a batch norm in evaluation mode.

    ``h = gamma * (a - running_mean) / sqrt(running_var + eps) + beta``, each array of shape (genes,), in log-rate.
    """

    running_mean: np.ndarray
    running_var: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eps: float

    def __post_init__(self) -> None:
        for field in fields(self)[:4]:
            object.__setattr__(self, field.name, read_only(getattr(self, field.name), (len(self.gamma),), field.name))

    @property
    def slope(self) -> np.ndarray:
        """``gamma / sqrt(running_var + eps)``, shape (genes,)."""
        return self.gamma / np.sqrt(self.running_var + self.eps)


@dataclass(frozen=True, eq=False, kw_only=True)
class RawLinear:
    """A decoder layer as the network holds it, before folding.

    Parameters
    ----------
    weight
        Weight of the linear layer, shape (genes, latents + batch columns). There are no batch columns with one batch.
    bias
        Bias of the linear layer, shape (genes,), or None.
    batch_norm
        The batch norm behind the linear layer, or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None
    batch_norm: BatchNorm | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", read_only(self.weight, (None, None), "weight"))
        if self.bias is not None:
            object.__setattr__(self, "bias", read_only(self.bias, (len(self.weight),), "bias"))

    def fold(self, n_latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight and intercepts of the affine map that the layer is in evaluation mode.

        With ``S = diag(gamma / sqrt(running_var + eps))`` (the identity without batch norm), the network computes
        ``S (W_z z + W_b + bias - running_mean) + beta`` for batch ``b``, hence::

            weight = S W_z,    intercept[b] = S (W_b + bias - running_mean) + beta.

        Returns
        -------
        ``weight_gk`` of shape (genes, latents) and ``intercept_bg`` of shape (batches, genes), float64, in log-rate.
        """
        weight_gk, weight_gb = self.weight[:, :n_latent], self.weight[:, n_latent:]
        shift_bg = weight_gb.T.copy() if weight_gb.shape[1] else np.zeros((1, len(self.weight)))
        if self.bias is not None:
            shift_bg += self.bias
        if self.batch_norm is None:
            return weight_gk, shift_bg
        slope_g = self.batch_norm.slope
        return weight_gk * slope_g[:, None], (shift_bg - self.batch_norm.running_mean) * slope_g + self.batch_norm.beta

    def to_arrays(self) -> dict[str, Any]:
        """The parts that there are, as a flat dictionary."""
        out: dict[str, Any] = {"weight": self.weight}
        if self.bias is not None:
            out["bias"] = self.bias
        if self.batch_norm is not None:
            out.update({field.name: getattr(self.batch_norm, field.name) for field in fields(BatchNorm)})
        return out

    @classmethod
    def from_arrays(cls, arrays: Any, prefix: str = "") -> RawLinear | None:
        """What :meth:`to_arrays` took apart, from keys with a prefix; None if it is not there.

        Parameters
        ----------
        arrays
            A mapping.
        prefix
            What its keys begin with.
        """
        if f"{prefix}weight" not in arrays:
            return None
        batch_norm = None
        if f"{prefix}gamma" in arrays:
            parts = {field.name: arrays[f"{prefix}{field.name}"] for field in fields(BatchNorm)}
            batch_norm = BatchNorm(**{**parts, "eps": float(parts["eps"])})
        return cls(weight=arrays[f"{prefix}weight"], bias=arrays.get(f"{prefix}bias"), batch_norm=batch_norm)
