"""The model layer: scvi-tools' API."""

from __future__ import annotations

from ldvae_ext.model._ldvae import LDVAE
from ldvae_ext.model.order import order_latents

__all__ = ["LDVAE", "order_latents"]
