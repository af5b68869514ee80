"""What a cell loses without a latent."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.utils import track

from ldvae_ext._keys import ABLATION_INFO
from ldvae_ext._validate import check_one_of, factor_indices
from ldvae_ext.core import ablation_effects
from ldvae_ext.model._cells import stream_cells
from ldvae_ext.model._decoding import DecodingMixin

MODES = ("zero", "mean")


class AblationMixin(DecodingMixin):
    """Ablation of latents: paired, without sampling, on raw counts."""

    def ablate(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        latents: Any = None,
        mode: Literal["zero", "mean"] = "zero",
        *,
        batch_size: int | None = None,
        dataloader: Any = None,
        silent: bool = True,
    ) -> AnnData:
        """Change of each cell's negative log-likelihood when one latent at a time is taken out.

        Every cell is compared with itself: ``NLL(x | latent k at a value) - NLL(x | posterior mean)``, with the same
        posterior mean, library size, dispersion and dropout logits on both sides, and nothing sampled, so two calls
        give the same numbers. Likelihoods are scvi-tools' own. See :func:`ldvae_ext.core.ablation_effects`.

        Parameters
        ----------
        adata
            Cells to ablate; the model's own if None. Unseen cells are encoded; the AnnData is not written to.
        indices
            Cells of ``adata`` to ablate, as positions or a mask.
        latents
            Latents to take out, one at a time: names (``"Z_3"``) or positions. All of them if None.
        mode
            ``"zero"``: the latent is set to 0, the prior mean (of u under ``latent_distribution="ln"``). ``"mean"``: it
            is set to its mean over all cells of ``adata``, whichever are asked for by ``indices``, so that it takes
            away what varies.
        batch_size
            Cells per minibatch; ``scvi.settings.batch_size`` if None. The result does not depend on it.
        dataloader
            Minibatches of cells, instead of ``adata``. Their names are positions, since they bring no obs. ``"mean"`` reads
            them twice.
        silent
            Whether to hide the progress bar.

        Returns
        -------
        AnnData, cells x latents in the network's order. ``X`` is float32, in nats per cell: positive where the latent
        helps to explain the cell, negative where it hurts. ``obs`` is a copy; ``uns["ldvae_ablation"]`` holds the mode.

        Raises
        ------
        ValueError
            If a latent or a mode does not exist, or the model's data are minified without counts.
        """
        self._check_has_counts("ablate")
        chosen = factor_indices(latents, self.latent_names)
        value_k = self._ablated_value(adata, mode, batch_size, dataloader)
        decoder = self.get_decoder()
        with stream_cells(self, adata, indices, batch_size, dataloader) as cells:
            chunks = track(cells.chunks, description="Ablating", total=cells.n_chunks, disable=silent)
            effects = [
                ablation_effects(
                    decoder,
                    c.counts,
                    c.mean,
                    c.library,
                    decoder.batches[c.batch],
                    value_k,
                    chosen,
                    covariates=c.covariates,
                    label=None if decoder.labels is None else decoder.labels[c.label],
                ).astype(np.float32)
                for c in chunks
            ]
            obs = None if cells.obs is None else cells.obs.copy()
        return AnnData(
            X=np.concatenate(effects) if effects else np.empty((0, len(chosen)), dtype=np.float32),
            obs=obs,
            var=pd.DataFrame(index=[self.latent_names[k] for k in chosen]),
            uns={ABLATION_INFO: {"mode": mode, "unit": "nats"}},
        )

    def get_ablated_expression(
        self,
        latents: Any,
        mode: Literal["zero", "mean"] = "zero",
        adata: AnnData | None = None,
        indices: Any = None,
        transform_batch: Any = None,
        gene_list: list[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        batch_size: int | None = None,
        return_numpy: bool | None = None,
        silent: bool = True,
        dataloader: Any = None,
    ) -> np.ndarray | pd.DataFrame:
        """Decoded expression with latents taken out, all of them at once.

        What ``get_normalized_expression(use_posterior_mean=True)`` would be without them.

        Parameters
        ----------
        latents
            Latents to take out together: names (``"Z_3"``) or positions.
        mode
            What they are set to; see :meth:`ablate`.
        adata, indices, transform_batch, gene_list, library_size, batch_size, return_numpy, silent, dataloader
            As in :meth:`get_normalized_expression`.

        Returns
        -------
        Cells x genes, float32.
        """
        chosen = factor_indices(latents, self.latent_names)
        value_k = self._ablated_value(adata, mode, batch_size, dataloader)

        def without(mean_nk: np.ndarray) -> np.ndarray:
            mean_nk[:, chosen] = value_k[chosen]
            return mean_nk

        return self._posterior_mean_expression(
            adata,
            indices,
            transform_batch,
            gene_list,
            library_size,
            batch_size,
            return_numpy,
            silent,
            dataloader,
            edit=without,
        )

    def _ablated_value(
        self, adata: AnnData | None, mode: str, batch_size: int | None, dataloader: Any = None
    ) -> np.ndarray:
        """What each latent is set to, shape (latents,), float64."""
        check_one_of("mode", mode, MODES)
        total_k, n_cells = np.zeros(self.n_latent), 0
        if mode == "mean":
            with stream_cells(self, adata, None, batch_size, dataloader) as cells:
                for chunk in cells.chunks:
                    total_k += chunk.mean.sum(axis=0, dtype=np.float64)
                    n_cells += len(chunk.mean)
        return total_k / max(1, n_cells)
