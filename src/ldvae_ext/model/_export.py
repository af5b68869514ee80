"""Latents and loadings in order of information, written to AnnData."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import ldvae_ext
from ldvae_ext._keys import PCA_INFO, PCA_LATENT, PCA_LOADINGS, export_keys
from ldvae_ext._validate import check_one_of, listed, warn
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.model._cells import shared_counts_agree, stream_cells
from ldvae_ext.model._decoding import DecodingMixin
from ldvae_ext.model._training import TrainingMixin

ORDERS = ("kl", "network")


class ExportMixin(DecodingMixin, TrainingMixin):
    """The information of each latent, and the export that is ordered by it."""

    def get_latent_kl(
        self,
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        batch_size: int | None = None,
        dataloader: Any = None,
    ) -> pd.DataFrame | np.ndarray:
        """KL divergence of each cell's posterior from the prior, per latent dimension.

        ``KL = (mean^2 + variance - 1 - log variance) / 2``; its mean over cells bounds the information that a
        latent carries about the cells from above, and is 0 for one that is not used. Under ``latent_distribution="ln"`` it is that of u, where
        z = softmax(u).

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            Cells, as in :meth:`get_latent_representation`.

        Returns
        -------
        Cells x ``Z_i`` in the network's order, float64, in nats; an array if ``dataloader`` is given.
        """
        with stream_cells(self, adata, indices, batch_size, dataloader) as cells:
            kl = [kl_per_dimension(chunk.mean, chunk.variance) for chunk in cells.chunks]
            kl_nk = np.concatenate(kl) if kl else np.empty((0, self.n_latent))
            return kl_nk if cells.obs is None else pd.DataFrame(kl_nk, index=cells.obs.index, columns=self.latent_names)

    def export_to_anndata(
        self,
        adata: AnnData | None = None,
        key_added: str | None = None,
        order_by: Literal["kl", "network"] = "kl",
        *,
        as_pca: bool = False,
        overwrite: bool = False,
        batch_size: int | None = None,
    ) -> None:
        """Write latents, loadings and decoder to an AnnData, in order of information.

        Factors are named after the network's dimension (``Z_3``), sorted by their mean KL over the exported cells, and
        turned so that each points to its longer tail of genes (:meth:`ldvae_ext.core.LinearDecoder.signs`); loadings
        are centred over genes. Then ``softmax(X_ldvae @ ldvae_loadings.T + intercept)`` is the decoded expression,
        where the intercept is ``ldvae_ext.get.decoder(adata).intercept_bg`` of the cell's batch, for the genes of the model. (To
        decode the exported latents use that decoder; :meth:`decode` takes latents with the network's signs.) For the first five
        factors in scanpy: ``sc.pp.neighbors(adata, use_rep="X_ldvae", n_pcs=5)``.

        Parameters
        ----------
        adata
            Where to write; the model's own if None. Any AnnData will do that has the model's cells by name, in which
            case their posteriors are those of the model's data, or cells with counts that the model can encode. If both
            hold and the counts differ, the counts decide; where there are none to compare, a warning says so. Genes that the model does not know get NaN loadings.
        key_added
            Replaces ``ldvae`` in all keys together.
        order_by
            ``"kl"`` (descending) or ``"network"`` (as it is).
        as_pca
            Whether to write the same as a PCA too, for scanpy's PCA plots.
        overwrite
            Whether an existing PCA, or columns of ``var`` and ``obs`` with a name of the export, may be replaced.
        batch_size
            Cells per minibatch; ``scvi.settings.batch_size`` if None.

        Raises
        ------
        ValueError
            If the cells are not the model's and cannot be encoded, or if a PCA or a column of ``var`` or ``obs`` would be replaced.
            Nothing is written.

        Notes
        -----
        Writes

        * ``obsm["X_ldvae"]``: posterior means, cells x factors, float32 (softmax of those of u under ``"ln"``);
        * ``obsm["X_ldvae_var"]``: posterior variances, same order, float32 (of u under ``"ln"``);
        * ``obsm["X_ldvae_u"]``: posterior means of u, same order, float32; only under ``"ln"``;
        * ``obs["ldvae_library"]``: library size of each cell in counts, or its size factor, float64;
        * ``varm["ldvae_loadings"]``: genes x factors, float32, in log-rate;
        * ``var["ldvae"]``: True for genes of the model;
        * ``uns["ldvae"]``: ``names``, ``order`` and ``signs`` of the factors, ``statistics`` (``kl`` in nats, ``kl_share``,
          ``active_unit``: the variance of the posterior mean), ``order_by``, ``decoder`` (arrays, in the network's order),
          ``likelihood``, ``latent_distribution``, ``setup`` (names of the layer and of the columns of obs that the model was
          set up with), ``kl_weight`` at the end of training (NaN if not known), ``n_cells``,
          ``versions``;
        * with ``as_pca``: ``obsm["X_pca"]``, ``varm["PCs"]`` (0 for other genes) and ``uns["pca"]``, whose ``variance`` and
          ``variance_ratio`` hold the KL and its share, as ``params`` says.
        """
        check_one_of("order_by", order_by, ORDERS)
        keys = export_keys(key_added)
        target = self.adata if adata is None else adata
        if target is None:
            msg = "This model was loaded without data: give `adata`."
            raise ValueError(msg)
        if keys.info == PCA_INFO:
            msg = f"`key_added={key_added!r}` would replace scanpy's PCA; `as_pca=True` writes one beside the export."
            raise ValueError(msg)
        if not overwrite and keys.genes in target.var and "decoder" not in target.uns.get(keys.info, {}):
            msg = f"`adata.var[{keys.genes!r}]` exists and is no export's; choose another `key_added`, or `overwrite=True`."
            raise ValueError(msg)
        library = target.obs.get(keys.library)
        if not overwrite and library is not None and not pd.api.types.is_float_dtype(library):
            msg = f"`adata.obs[{keys.library!r}]` exists and is no library size; choose another `key_added`, or `overwrite=True`."
            raise ValueError(msg)
        if as_pca and not overwrite:
            taken = [
                k
                for k, slot in ((PCA_LATENT, target.obsm), (PCA_LOADINGS, target.varm), (PCA_INFO, target.uns))
                if k in slot
            ]
            if taken:
                msg = f"`as_pca`: {listed(taken)} would be replaced; `overwrite=True` does that."
                raise ValueError(msg)
        mean_nk, variance_nk, library_n = self._posterior_for_export(adata, batch_size)
        kl_k = kl_per_dimension(mean_nk, variance_nk).mean(axis=0)
        decoder = self.get_decoder()
        order = np.argsort(-kl_k, kind="stable") if order_by == "kl" else np.arange(self.n_latent)
        signs = decoder.signs()[order]
        canonical = decoder.reordered(order, signs).centered()
        position = pd.Index(target.var_names.astype(str)).get_indexer(decoder.genes)
        loadings = np.full((target.n_vars, self.n_latent), np.nan, dtype=np.float32)
        loadings[position[position >= 0]] = canonical.weight_gk[position >= 0]
        kl = kl_k[order]
        latent_nk = deterministic_latent(mean_nk, decoder.latent_distribution)

        target.obsm[keys.latent] = (latent_nk[:, order] * signs).astype(np.float32)
        target.obsm[keys.variance] = variance_nk[:, order].astype(np.float32)
        if decoder.latent_distribution == "ln":
            target.obsm[keys.logits] = mean_nk[:, order].astype(np.float32)
        elif keys.logits in target.obsm:
            del target.obsm[keys.logits]
        target.obs[keys.library] = library_n
        target.varm[keys.loadings] = loadings
        target.var[keys.genes] = np.isin(np.arange(target.n_vars), position)
        target.uns[keys.info] = {
            "names": canonical.factors.copy(),
            "order": order,
            "signs": signs,
            "order_by": order_by,
            "statistics": {
                "kl": kl,
                "kl_share": kl / kl.sum(),
                "active_unit": mean_nk.var(axis=0, dtype=np.float64)[order],
            },
            "decoder": decoder.to_arrays(),
            "likelihood": decoder.likelihood,
            "latent_distribution": decoder.latent_distribution,
            "setup": self._setup_keys(),
            "kl_weight": self.final_kl_weight,
            "n_cells": target.n_obs,
            "versions": {"ldvae_ext": ldvae_ext.__version__, "scvi-tools": scvi.__version__},
        }
        if as_pca:
            target.obsm[PCA_LATENT] = target.obsm[keys.latent].copy()
            target.varm[PCA_LOADINGS] = np.nan_to_num(loadings)
            target.uns[PCA_INFO] = {
                "variance": kl,
                "variance_ratio": kl / kl.sum(),
                "params": {
                    "source": f"ldvae_ext export {keys.info!r}",
                    "variance": "KL in nats",
                    "variance_ratio": "share of KL",
                },
            }

    def _setup_keys(self) -> dict[str, str]:
        """Where an AnnData holds what the decoder conditions on; only what was registered."""
        given = self.registry.get("setup_args", {})
        return {name: given[name] for name in ("layer", "batch_key", "labels_key") if given.get(name) is not None}

    def _posterior_for_export(
        self, adata: AnnData | None, batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Posterior means, variances and libraries of the cells of ``adata``, encoded or, for the model's cells, by name."""
        rows = None if adata is None or adata is self.adata else self._own_rows(adata)
        source = adata if rows is None else None
        with stream_cells(self, source, rows, batch_size) as cells:
            encoded = [(chunk.mean, chunk.variance, chunk.library.ravel()) for chunk in cells.chunks]
        if not encoded:
            msg = "There are no cells to export."
            raise ValueError(msg)
        mean_nk, variance_nk, library_n = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        return mean_nk, variance_nk, library_n

    def _own_rows(self, adata: AnnData) -> np.ndarray | None:
        """Rows of the model's data with the cells of ``adata``, or None if its counts are to be encoded."""
        if self.adata is None or not self.adata.obs_names.is_unique:
            return None
        rows = self.adata.obs_names.get_indexer(adata.obs_names)
        if (rows < 0).any():
            return None
        layer = self.get_setup_arg("layer")
        has_matrix = adata.X is not None if layer is None else layer in adata.layers
        if self.minified_data_type is not None or not has_matrix:
            confirmed = None
        else:
            confirmed = shared_counts_agree(self, adata, rows)
        # Other counts under the same names are other cells; values that are no counts, such as normalised expression,
        # say nothing about that.
        if confirmed is None:
            warn(
                f"The {adata.n_obs} cells of `adata` were taken for those of the model by their names alone, since it holds no "
                "counts that could confirm it."
            )
        return None if confirmed is False else rows
