"""The interface of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from scvi.module.base import LossOutput

from ldvae_ext.backends.inference import CellPosterior, posterior_by_layers


class Backend(ABC):
    """Computation of the loss and of the posterior of a minibatch.

    A backend object is for one network, and for one training or one pass over cells: it may keep references to the
    network's layers. All backends draw the same random numbers, and give the same results up to rounding.
    """

    name: ClassVar[str]
    stores_by_columns: ClassVar[bool] = False
    """True if its steps are faster with weights that are stored column by column, see :func:`backends.layers.store_weights`."""

    @abstractmethod
    def obstacle(self, module: Any, device: str) -> str | None:
        """Reason why the backend cannot compute the loss of a network; None if it can.

        Parameters
        ----------
        module
            The network.
        device
            Type of the device that it is trained on, such as ``"cpu"``.
        """

    @abstractmethod
    def loss(self, module: Any, tensors: dict[str, torch.Tensor], kl_weight: float) -> LossOutput:
        """Loss of a minibatch with its terms, as the network's ``loss`` returns them.

        Parameters
        ----------
        module
            The network.
        tensors
            A minibatch as scvi-tools' data loaders make it; counts may be a CSR tensor.
        kl_weight
            Weight of the latents' KL divergence.
        """

    def posterior(self, module: Any, tensors: dict[str, torch.Tensor]) -> CellPosterior:
        """Posterior of the cells of a minibatch, in evaluation mode; deterministic.

        The parameters of the network must not change between two calls.

        Parameters
        ----------
        module, tensors
            As in :meth:`loss`.
        """
        return posterior_by_layers(module, tensors)
