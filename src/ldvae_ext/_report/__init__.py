"""The HTML report of an export."""

from __future__ import annotations

from ldvae_ext._report._build import report

__all__ = ["report"]
