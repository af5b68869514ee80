"""The model layer: scvi-tools' API."""

from __future__ import annotations

from ldvae_ext.model._ldvae import LDVAE

__all__ = ["LDVAE"]
