"""The torch layer."""

from __future__ import annotations

from ldvae_ext.module._ldvae import LDVAEModule

__all__ = ["LDVAEModule"]
