"""The backend ``"scvi"``: scvi-tools' own forward pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from scvi.module.base import LossOutput

from ldvae_ext.backends.base import Backend
from ldvae_ext.backends.inference import with_dense_counts


class ScviBackend(Backend):
    """scvi-tools' ``inference``, ``generative`` and ``loss``, for every network and device."""

    name: ClassVar[str] = "scvi"

    def obstacle(self, module: Any, device: str) -> str | None:
        """None: there is no network that it cannot compute.

        Parameters
        ----------
        module, device
            As in :meth:`Backend.obstacle`.
        """
        return None

    def loss(self, module: Any, tensors: dict[str, torch.Tensor], kl_weight: Any) -> LossOutput:
        """See :meth:`Backend.loss`.

        Parameters
        ----------
        module, tensors, kl_weight
            As there; the network may be compiled by ``torch.compile``.
        """
        _, _, losses = module(with_dense_counts(tensors), loss_kwargs={"kl_weight": kl_weight})
        return losses
