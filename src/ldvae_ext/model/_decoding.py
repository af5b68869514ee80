"""The decoder in hand: as a value, for latents that the user made, and for the posterior mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.utils import track

from ldvae_ext._validate import listed
from ldvae_ext.core import LinearDecoder
from ldvae_ext.core._decode import put_scale
from ldvae_ext.core._design import design_matrix
from ldvae_ext.core._expression import check_library_size, gene_positions
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.core.rotation import Rotation
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._bridge import linear_decoder
from ldvae_ext.model._cells import stream_cells, with_positions
from ldvae_ext.model._registry import covariates_of, level_names
from ldvae_ext.model._tasks import quiet
from ldvae_ext.model._threads import with_torch_threads


class DecodingMixin(LDVAEBase):
    """Exact, deterministic decoding."""

    def get_decoder(self) -> LinearDecoder:
        """The decoder as a frozen value: folded weights, an intercept for each batch, dispersion, raw parts.

        Returns
        -------
        A :class:`ldvae_ext.core.LinearDecoder` in the network's order, sign and gauge, folded in float64. Its ``scale``
        equals the ``px.scale`` of the network in evaluation mode to 1e-6 for the same latent.
        """
        return linear_decoder(
            self.module,
            self.get_var_names(),
            level_names(self.registry, REGISTRY_KEYS.BATCH_KEY),
            self.latent_names,
            covariates_of(self.registry),
            level_names(self.registry, REGISTRY_KEYS.LABELS_KEY),
        )

    @with_torch_threads
    def decode(
        self,
        z: np.ndarray | pd.DataFrame,
        *,
        batch: Any = None,
        covariates: Any = None,
        library_size: float | np.ndarray = 1,
        gene_list: list[str] | None = None,
        return_numpy: bool = False,
    ) -> pd.DataFrame | np.ndarray:
        """Expression of cells whose latent is given: ``library_size * softmax(weight @ z + intercept[batch])``.

        Parameters
        ----------
        z
            Latents, cells x latents, with the network's signs: an array in the network's order, or a DataFrame with the
            columns ``Z_0``, ``Z_1``, ... in any order. (Exported latents are turned; :func:`ldvae_ext.get.decoder` decodes them.) Under ``latent_distribution="ln"`` points of the simplex.
        batch
            None (only with a single batch), one batch for all cells, or one for each; by name (str) or code (int).
        covariates
            A mapping or DataFrame from the name of each registered covariate to its value, one for all cells or one for
            each; see :meth:`ldvae_ext.core.LinearDecoder.scale`.
        library_size
            Counts to scale to (size factors where the model has them), one number or one for each cell. With 1, each row
            is a share of expression.
        gene_list
            Genes to return, in the model's order; all of them if None.
        return_numpy
            Whether to return an array rather than a DataFrame.

        Returns
        -------
        Cells x genes, float64. The index is that of ``z`` if it is a DataFrame.

        Raises
        ------
        ValueError
            If a batch or covariate is missing or unknown, or ``z``, ``batch`` and ``covariates`` are indexed otherwise.
        """
        index = None
        if isinstance(z, pd.DataFrame):
            for name, value in (("batch", batch), ("covariates", covariates)):
                if isinstance(value, (pd.Series, pd.DataFrame)) and not value.index.equals(z.index):
                    msg = f"`{name}` must have the index of `z`, in its order; `{name}.loc[z.index]` brings it there."
                    raise ValueError(msg)
            odd = sorted(map(str, set(z.columns) ^ set(self.latent_names)))
            if odd or len(z.columns) != self.n_latent:
                msg = f"The columns of `z` must be {listed(self.latent_names)}; missing or unknown: {listed(odd)}."
                raise ValueError(msg)
            index, z = z.index, z[self.latent_names].to_numpy()
        decoder = self.get_decoder()
        genes = gene_positions(decoder.genes, gene_list)
        given = decoder._given(z, batch, covariates, library_size)
        expression = np.empty((len(given[0]), len(genes)))
        put_scale(decoder, expression, *given, genes=genes)
        return expression if return_numpy else pd.DataFrame(expression, index=index, columns=decoder.genes[genes])

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: list[int] | None = None,
        transform_batch: Any = None,
        gene_list: list[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: Literal["uniform", "importance"] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        silent: bool = True,
        dataloader: Iterator[dict[str, Any]] | None = None,
        data_loader_kwargs: dict | None = None,
        *,
        use_posterior_mean: bool = False,
        **importance_weighting_kwargs: Any,
    ) -> np.ndarray | pd.DataFrame:
        """Decoded expression, as scvi-tools samples it or, with ``use_posterior_mean=True``, without sampling.

        The default is scvi-tools' own: with ``n_samples=1`` the decoded expression of *one random draw* from each
        cell's posterior, different at every call; with many samples an estimate of ``E[softmax(W z + b)]`` over the
        posterior. ``use_posterior_mean=True`` decodes the posterior mean, ``softmax(W E[z] + b)``: two calls are equal to
        the bit (another ``batch_size`` may round differently), and for a normal latent it is ``get_decoder().scale`` of
        ``get_latent_representation()``. Softmax is not linear, so the two differ even with infinitely many samples
        (Jensen's gap).

        Parameters
        ----------
        adata, indices, transform_batch, gene_list, library_size, batch_size, return_numpy, silent, dataloader
            As in :meth:`scvi.model.LinearSCVI.get_normalized_expression`. ``library_size="latent"`` scales each cell to
            its own library; without sampling that is exp of the posterior mean of the log library, or the observed
            total.
        n_samples, n_samples_overall, weights, return_mean, data_loader_kwargs, **importance_weighting_kwargs
            As there; only of use with sampling.
        use_posterior_mean
            Whether to decode the posterior mean (softmax of the mean of u under ``latent_distribution="ln"``) instead of
            sampling.

        Returns
        -------
        Cells x genes, float32; see scvi-tools for what sampling can return. With ``n_samples_overall`` the rows are draws
        from the group of cells, which have no names.

        Raises
        ------
        ValueError
            If ``use_posterior_mean`` comes with several samples or with weights, or a gene is unknown to the model.
        """
        if weights == "importance" and self.module.gene_likelihood == "normal":
            msg = "`weights='importance'` weighs by the likelihood of counts; `gene_likelihood='normal'` has none."
            raise ValueError(msg)
        if not use_posterior_mean:
            with self.module.evaluating(), quiet(indices, None if dataloader is None else batch_size):
                out = super().get_normalized_expression(
                    adata,
                    indices,
                    transform_batch,
                    gene_list,
                    library_size,
                    n_samples,
                    n_samples_overall,
                    weights,
                    batch_size,
                    return_mean,
                    # scvi-tools would name the draws after cells, of which there are fewer or more.
                    return_numpy if n_samples_overall is None else True,
                    silent,
                    dataloader,
                    data_loader_kwargs,
                    **importance_weighting_kwargs,
                )
            if n_samples_overall is None or return_numpy or dataloader is not None:
                return out
            names = self.get_var_names()
            return pd.DataFrame(out, columns=names if gene_list is None else names[np.isin(names, gene_list)])
        meaningless = {
            "n_samples": n_samples != 1,
            "n_samples_overall": n_samples_overall is not None,
            "weights": weights is not None,
            **dict.fromkeys(importance_weighting_kwargs, True),
        }
        for name, given in meaningless.items():
            if given:
                msg = f"`{name}` belongs to sampling; `use_posterior_mean=True` decodes the posterior mean, once."
                raise ValueError(msg)
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
            data_loader_kwargs,
        )

    @with_torch_threads
    def _posterior_mean_expression(
        self,
        adata: AnnData | None,
        indices: Any,
        transform_batch: Any,
        gene_list: list[str] | None,
        library_size: float | str,
        batch_size: int | None,
        return_numpy: bool | None,
        silent: bool,
        dataloader: Any,
        data_loader_kwargs: dict | None = None,
        edit: Callable[[EncodedCells, np.ndarray], np.ndarray] = lambda cells, _: cells.mean.astype(np.float64),
        rotation: Rotation | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Decode the posterior mean, minibatch by minibatch, or what ``edit`` makes of the cells and their positions."""
        decoder = self.get_decoder()
        decoder = decoder if rotation is None else decoder.rotated(rotation.matrix_kk, rotation.names)
        genes = gene_positions(decoder.genes, gene_list)
        check_library_size(library_size)
        codes = self._transform_batch_codes(transform_batch)

        def decode(cells: EncodedCells, position_n: np.ndarray, out_ng: np.ndarray) -> None:
            z_nk = deterministic_latent(edit(cells, position_n), decoder.latent_distribution)
            library_n = np.broadcast_to(cells.library if isinstance(library_size, str) else library_size, (len(z_nk),))
            design_nc = design_matrix(decoder.covariates, cells.covariates, len(z_nk)) if decoder.covariates else None
            for code in codes:
                batch_n = cells.batch if code is None else np.full(len(z_nk), code)
                put_scale(decoder, out_ng, z_nk, batch_n, design_nc, library_n, genes=genes, share=1 / len(codes))

        with stream_cells(self, adata, indices, batch_size, dataloader, data_loader_kwargs, rotation) as cells:
            chunks = track(cells.chunks, description="Decoding", total=cells.n_chunks, disable=silent)
            located = with_positions(chunks, cells.positions)
            if cells.obs is None:
                parts = []
                for chunk, at in located:
                    parts.append(np.zeros((len(at), len(genes)), dtype=np.float32))
                    decode(chunk, at, parts[-1])
                return np.concatenate(parts)
            out = np.zeros((len(cells.obs), len(genes)), dtype=np.float32)
            start = 0
            for chunk, at in located:
                decode(chunk, at, out[start : start + len(at)])
                start += len(at)
            return out if return_numpy else pd.DataFrame(out, index=cells.obs.index, columns=decoder.genes[genes])

    def _transform_batch_codes(self, transform_batch: Any) -> list[int | None]:
        """Codes of batches given by their value in ``adata.obs``, as scvi-tools takes them; None is a cell's own."""
        if isinstance(transform_batch, str) or not isinstance(transform_batch, Iterable):
            transform_batch = [transform_batch]
        transform_batch = list(transform_batch)
        if not transform_batch:
            msg = "`transform_batch` must name at least one batch; got none."
            raise ValueError(msg)
        known = list(level_names(self.registry, REGISTRY_KEYS.BATCH_KEY))
        for batch in transform_batch:
            if batch is not None and batch not in known:
                msg = f"`transform_batch`: {batch!r} is no batch of this model; allowed are {listed(known)}."
                raise ValueError(msg)
        return [None if batch is None else known.index(batch) for batch in transform_batch]
