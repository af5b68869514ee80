"""The network of an LDVAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from scvi.module import LDVAE as ScviLDVAE
from scvi.module._constants import MODULE_KEYS


class CellPosterior(NamedTuple):
    """What the encoder says of a minibatch, without sampling."""

    mean: torch.Tensor
    """Posterior means (of u under ``"ln"``), shape (cells, latents)."""
    variance: torch.Tensor
    """Posterior variances, same shape."""
    log_library: torch.Tensor
    """Log of the library size: observed, or the posterior mean of the log library; shape (cells,)."""


class LDVAEModule(ScviLDVAE):
    """scvi-tools' network of the linearly decoded VAE (``scvi.module.LDVAE``), same parameters and same random draws."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside, and the modes of all layers as they were afterwards."""
        were_training = [layer for layer in self.modules() if layer.training]
        self.eval()
        try:
            yield
        finally:
            for layer in were_training:
                layer.training = True

    @torch.inference_mode()
    def posterior(self, tensors: dict[str, torch.Tensor]) -> CellPosterior:
        """Posterior of the cells of a minibatch; deterministic, and without touching torch's random state.

        Parameters
        ----------
        tensors
            A minibatch as scvi-tools' data loaders make it, minified or not.
        """
        on_gpu = [self.device] if self.device.type == "cuda" else []
        # scvi's inference also draws a sample, which would move the caller's random state.
        with self.evaluating(), torch.random.fork_rng(devices=on_gpu):
            out = self.inference(**self._get_inference_input(tensors))
        qz, ql = out[MODULE_KEYS.QZ_KEY], out[MODULE_KEYS.QL_KEY]
        log_library = out[MODULE_KEYS.LIBRARY_KEY] if ql is None else ql.loc
        return CellPosterior(qz.loc, qz.scale.square(), log_library.squeeze(-1))
