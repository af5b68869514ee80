"""Forward and backward pass of a head of the decoder in the fused training step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ldvae_ext.backends.batch_norm import update_running_statistics
from ldvae_ext.backends.decoder_head import Folded, fold_in_training, fold_in_training_backward
from ldvae_ext.backends.layers import transposed


class HeadLayers:
    """The layers of a head of the decoder.

    Parameters
    ----------
    head
        The head.
    """

    def __init__(self, head: Any) -> None:
        self.linear, self.norm = head.fc_layers[0][:2]
        self.parameters = self.current()
        """In the order of the gradients of :meth:`HeadPass.backward`."""

    def current(self) -> list[torch.Tensor]:
        """The parameters that the layers have now."""
        values = [self.linear.weight, self.linear.bias]
        values += [] if self.norm is None else [self.norm.weight, self.norm.bias]
        return [value for value in values if value is not None]


class HeadPass:
    """Forward and backward pass of a head of the decoder as an affine map of its inputs.

    Parameters
    ----------
    layers
        Its layers.
    input_np
        Its inputs, shape (cells, inputs).
    """

    def __init__(self, layers: HeadLayers, input_np: np.ndarray) -> None:
        self._linear, self._norm = layers.linear, layers.norm
        weight_pg = transposed(self._linear.weight)
        bias = None if self._linear.bias is None else self._linear.bias.detach()
        self._folded: Folded | None = None
        self._frozen: _FrozenNorm | None = None
        if self._norm is None:
            intercept_g = np.zeros(weight_pg.shape[1], np.float32) if bias is None else bias.numpy()
            self.map = weight_pg, intercept_g
            return
        gamma_g, beta_g = self._norm.weight.detach().numpy(), self._norm.bias.detach().numpy()
        if not self._norm.training:
            self._frozen = frozen = _FrozenNorm.of(self._norm, weight_pg, bias)
            self.map = weight_pg * frozen.scale_g, beta_g - frozen.shift_g * frozen.scale_g
            return
        self._folded = folded = fold_in_training(input_np, weight_pg, gamma_g, beta_g, self._norm.eps)
        mean_g = torch.from_numpy(folded.mean_g)
        update_running_statistics(
            self._norm, mean_g if bias is None else mean_g + bias, torch.from_numpy(folded.variance_g), len(input_np)
        )
        self.map = folded.weight_pg, folded.intercept_g

    def backward(
        self, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray
    ) -> tuple[np.ndarray | float, list[torch.Tensor]]:
        """Gradient of the inputs through the statistics of the batch norm, and gradients of the parameters.

        Parameters
        ----------
        d_weight_pg, d_intercept_g
            Gradients of the affine map.
        """
        d_input: np.ndarray | float = 0.0
        of_norm, d_bias_g = [], d_intercept_g
        if self._folded is not None:
            d_input, d_weight_pg, d_gamma_g = fold_in_training_backward(self._folded, d_weight_pg, d_intercept_g)
            of_norm, d_bias_g = [d_gamma_g, d_intercept_g], np.zeros_like(d_intercept_g)
        elif self._frozen is not None:
            d_gamma_g = self._frozen.d_gamma(d_weight_pg, d_intercept_g)
            of_norm, d_bias_g = [d_gamma_g, d_intercept_g], d_intercept_g * self._frozen.scale_g
            d_weight_pg = d_weight_pg * self._frozen.scale_g
        of_bias = [] if self._linear.bias is None else [d_bias_g]
        return d_input, [torch.from_numpy(value) for value in (d_weight_pg.T, *of_bias, *of_norm)]


class _FrozenNorm(NamedTuple):
    """A batch norm in evaluation mode after a linear layer: ``(x @ weight - shift) * scale + beta``."""

    weight_pg: np.ndarray
    shift_g: np.ndarray
    inverse_g: np.ndarray
    scale_g: np.ndarray

    @classmethod
    def of(cls, norm: Any, weight_pg: np.ndarray, bias_g: torch.Tensor | None) -> _FrozenNorm:
        inverse_g = (1 / torch.sqrt(norm.running_var + norm.eps)).numpy()
        shift_g = norm.running_mean if bias_g is None else norm.running_mean - bias_g
        return cls(weight_pg, shift_g.numpy(), inverse_g, inverse_g * norm.weight.detach().numpy())

    def d_gamma(self, d_weight_pg: np.ndarray, d_intercept_g: np.ndarray) -> np.ndarray:
        """Gradient of gamma from those of the affine map."""
        d_scale_g = (d_weight_pg * self.weight_pg).sum(axis=0) - d_intercept_g * self.shift_g
        return d_scale_g * self.inverse_g
