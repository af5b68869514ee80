"""Importing: what a script that reads exported latents waits for, and one that trains."""

from __future__ import annotations


class Imports:
    timeout = 120

    def timeraw_tools(self) -> str:
        return "import ldvae_ext.tl"

    def timeraw_model(self) -> str:
        return "import ldvae_ext.model"
