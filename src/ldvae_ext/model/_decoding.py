"""The decoder in hand: as a value, for latents that the user made, and for the posterior mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._validate import listed
from ldvae_ext.core import LinearDecoder, kl_per_dimension
from ldvae_ext.core._arrays import per_cell
from ldvae_ext.core._decode import put_scale
from ldvae_ext.core._expression import check_library_size, gene_positions
from ldvae_ext.model._axes import (
    canonical_signs,
    factor_decoder,
    network_decoder,
    network_posterior,
)
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._draws import cells_to_draw, drawn_expression
from ldvae_ext.model._expression import posterior_mean_expression
from ldvae_ext.model._rotation import rotate
from ldvae_ext.model._stock import reads_cells
from ldvae_ext.model._threads import with_torch_threads


def _no_expression(
    model: LDVAEBase, *_args: Any, gene_list: Any = None, return_numpy: bool | None = None, **_kwargs: Any
) -> np.ndarray | pd.DataFrame:
    """Expression of no cells."""
    genes = network_decoder(model).genes
    genes = genes[gene_positions(genes, gene_list)]
    none = np.empty((0, len(genes)), dtype=np.float32)
    return none if return_numpy else pd.DataFrame(none, columns=genes)


class DecodingMixin(LDVAEBase):
    """Loadings, decoder and decoded expression, exact and deterministic."""

    def get_loadings(self, *, canonical: bool = False, rotated: bool | None = None) -> pd.DataFrame:
        """Loadings of the decoder: by default its weights, as LinearSCVI returns them.

        Parameters
        ----------
        canonical
            False: in the network's gauge, sign and order. True: as exported, that is centred over genes (the softmax ignores a
            constant), with signs such that the sum of cubes over genes is positive (the longer tail of genes is positive;
            :meth:`ldvae_ext.core.LinearDecoder.signs`), latents by descending mean KL of the model's cells, factors of a rotation
            as they are numbered.
        rotated
            True to return the factors of the rotation, False for the latents. None: True with ``canonical=True`` under a rotation.

        Returns
        -------
        Genes x latents (``Z_0``, ...) or factors (``F_0``, ...), in log-rate per unit of latent, with the batch norm folded in.
        :meth:`get_decoder` returns all parameters of the decoder.

        Raises
        ------
        ValueError
            If a rotation is requested without one in force, or the model has no data to order latents by.

        Examples
        --------
        >>> model.get_loadings().shape
        (765, 5)
        """
        if not canonical and not rotated:
            return pd.DataFrame(self.module.get_loadings(), index=self.get_var_names(), columns=self.latent_names)
        decoder = self.get_decoder(canonical=canonical, rotated=rotated)
        return pd.DataFrame(decoder.weight_gk, index=self.get_var_names(), columns=decoder.factors)

    def get_decoder(self, *, canonical: bool = False, rotated: bool | None = None) -> LinearDecoder:
        """The decoder as a frozen value: folded weights, an intercept for each batch, dispersion, raw parts.

        Parameters
        ----------
        canonical, rotated
            See :meth:`get_loadings`; by default the network's own axes, gauge, sign and order.

        Returns
        -------
        A :class:`ldvae_ext.core.LinearDecoder`, folded in float64. Its ``scale`` equals the ``px.scale`` of the network in
        evaluation mode to 1e-6 for the same latent, on the same axes: factors of a rotation are
        ``z @ model.rotation.matrix_kk``.

        Raises
        ------
        ValueError
            As in :meth:`get_loadings`.

        Examples
        --------
        >>> decoder = model.get_decoder()
        >>> decoder.weight_gk.shape, decoder.likelihood
        ((765, 5), 'nb')
        """
        rotated = (canonical and self.rotation is not None) if rotated is None else rotated
        if rotated and self.rotation is None:
            msg = "`rotated`: no rotation is in force; `rotate()` puts one in force."
            raise ValueError(msg)
        decoder = factor_decoder(self) if rotated else network_decoder(self)
        if not canonical:
            return decoder
        order = np.arange(self.n_latent)
        if not rotated and not self.is_ordered_:
            mean_nk, variance_nk = network_posterior(self)
            order = np.argsort(-kl_per_dimension(mean_nk, variance_nk).mean(axis=0), kind="stable")
        return decoder.reordered(order, canonical_signs(self, decoder)[order]).centered()

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
            columns ``Z_0``, ``Z_1``, ... in any order. (Exported latents may have other signs; :func:`ldvae_ext.get.decoder`
            decodes them.) Under ``latent_distribution="ln"`` points on the simplex.
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
            True to return an array, False to return a DataFrame.

        Returns
        -------
        Cells x genes, float64. The index is that of ``z`` if it is a DataFrame.

        Raises
        ------
        ValueError
            If a batch or covariate is missing or unknown, or ``z``, ``batch`` and ``covariates`` are indexed otherwise.

        Examples
        --------
        >>> expression = model.decode(np.zeros((2, 5)), library_size=1000)
        >>> expression.sum(axis=1).round(6).tolist()
        [1000.0, 1000.0]
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
        decoder = network_decoder(self)
        genes = gene_positions(decoder.genes, gene_list)
        sizes = np.asarray(library_size)
        if sizes.dtype.kind not in "iuf" or not (np.isfinite(sizes) & (sizes >= 0)).all():
            msg = f"`library_size` must hold finite numbers of at least 0; got {library_size!r}."
            raise ValueError(msg)
        per_cell(sizes, len(z), "library_size")
        given = decoder._given(z, batch, covariates, library_size)
        if not np.isfinite(given[0]).all():
            msg = f"`z` must be finite; {int((~np.isfinite(given[0])).any(axis=1).sum())} of {len(given[0])} cells are not."
            raise ValueError(msg)
        expression = np.empty((len(given[0]), len(genes)))
        put_scale(decoder, expression, *given, genes=genes)
        return expression if return_numpy else pd.DataFrame(expression, index=index, columns=decoder.genes[genes])

    @reads_cells(finite=True, empty=_no_expression)
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
            True to decode the posterior mean (softmax of the mean of u under ``latent_distribution="ln"``) instead of a
            sample.

        Returns
        -------
        Cells x genes, float32; see scvi-tools for the results of sampling. With ``n_samples_overall`` the rows are draws
        from the group of cells, without names.

        Raises
        ------
        ValueError
            If ``use_posterior_mean`` is combined with several samples or with weights, or a gene is not in the model.

        Examples
        --------
        >>> shares = model.get_normalized_expression(use_posterior_mean=True)
        >>> shares.shape
        (700, 765)
        """
        if weights == "importance" and self.module.gene_likelihood == "normal":
            msg = "`weights='importance'` weighs by the likelihood of counts; `gene_likelihood='normal'` has none."
            raise ValueError(msg)
        check_library_size(library_size)
        if importance_weighting_kwargs and weights != "importance" and not use_posterior_mean:
            msg = f"{listed(importance_weighting_kwargs)}: no argument of `get_normalized_expression`, but for `weights='importance'`."
            raise TypeError(msg)
        if gene_list is not None and not use_posterior_mean and not np.isin(self.get_var_names(), gene_list).any():
            # scvi-tools leaves out genes that the model does not have.
            msg = f"`gene_list` must name at least one of the {len(self.get_var_names())} genes of the model; got {gene_list!r}."
            raise ValueError(msg)
        library_size = library_size if isinstance(library_size, str) else float(library_size)
        is_one_draw = n_samples == 1 and n_samples_overall is None and weights in (None, "uniform")
        is_usual = not use_posterior_mean and is_one_draw and not importance_weighting_kwargs
        manager = cells_to_draw(self, adata, dataloader, data_loader_kwargs) if is_usual else None
        if manager is not None and not isinstance(library_size, str):
            return drawn_expression(
                self, manager, indices, transform_batch, gene_list, library_size, batch_size, return_numpy, silent
            )
        if not use_posterior_mean:
            # With `n_samples_overall` scvi-tools would name the draws after cells, of which there are fewer or more.
            out = super().get_normalized_expression(
                adata=adata,
                indices=indices,
                transform_batch=transform_batch,
                gene_list=gene_list,
                library_size=library_size,
                n_samples=n_samples,
                n_samples_overall=n_samples_overall,
                weights=weights,
                batch_size=batch_size,
                return_mean=return_mean,
                return_numpy=return_numpy if n_samples_overall is None else True,
                silent=silent,
                dataloader=dataloader,
                data_loader_kwargs=data_loader_kwargs,
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
        return posterior_mean_expression(
            self,
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

    def rotate(
        self,
        method: Literal["varimax", "promax", "fisher-varimax", "score-varimax", "ica", "deviance", "none"] = "varimax",
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        """Look at the model on other axes of its latent space: factors ``F_0``, ``F_1``, ... instead of latents ``Z_0``, ... .

        Factors ``f = R'z`` and loadings ``L R^-T`` decode to the same expression. The axes of a training are mostly due to chance. A
        rotation chooses them by a criterion, so that two trainings can agree. A cell's posterior N(m, diag(v)) becomes N(R'm,
        R'diag(v)R), with correlated factors. For an orthogonal R, where ``L R^-T = L R``, the prior N(0, I) and the divergence of
        the posterior from it stay the same. Under oblique axes (``"promax"``, ``"ica"``) each factor has the prior N(0, 1), and
        ``model.rotation.correlation_kk`` are their correlations.

        The rotation is a view. It is saved and loaded with the model, and the export, ablations, explained deviance,
        population loadings, ``differential_expression(factors=...)``, :meth:`get_factor_stats` and all functions on an export
        refer to factors while it is in force. Results of scvi-tools' own methods, :meth:`decode` and :meth:`get_latent_kl` do not
        change, nor do :meth:`get_loadings` and :meth:`get_decoder` unless rotated factors are requested. Posterior
        means of the factors are ``get_latent_representation() @ model.rotation.matrix_kk``; the export contains them. A training
        that changes the loadings ends the rotation.

        Parameters
        ----------
        method
            * ``"varimax"``: each factor has large loadings in few genes (folded loadings, centred over genes). For reading.
            * ``"promax"``: the same with oblique factors, which can share cells. On real counts the genes of an ensemble's factors
              agree better between disjoint halves of the cells than with varimax (*Gene programs* in the documentation).
            * ``"fisher-varimax"``: varimax of the loadings in standard errors, in which genes with many counts decide.
            * ``"score-varimax"``: each factor is far from its mean in few cells (posterior means, centred over cells).
            * ``"ica"``: posterior means of the factors are as independent as they can be (FastICA, oblique).
            * ``"deviance"``: the first j factors explain the counts about as well as any j axes of this model, for all j: the
              Fisher-weighted principal axes, refined for the likelihood of cells cut off after a random number of factors (a local
              optimum). For a scree, or to keep some of the factors. Needs counts.
            * ``"none"``: the network's own axes.
        adata, indices
            Cells that decide order and, but for ``"varimax"`` and ``"promax"``, axes; the model's own if None.
        batch_size
            Cells per minibatch; ``scvi.settings.batch_size`` if None.

        Raises
        ------
        ValueError
            Under ``latent_distribution="ln"``: softmax(R'u) is no rotation of softmax(u); for an unknown method; without data, or
            for ``"deviance"`` without counts.

        Notes
        -----
        Factors are numbered by the mean divergence of their marginal posteriors from the prior, largest first; under
        ``"deviance"`` in the order of the rotation. Each points to its longer tail of genes
        (:meth:`ldvae_ext.core.LinearDecoder.signs`). Varimax: Kaiser (1958); for sparse factors Rohe & Zeng (2020),
        arXiv:2004.05387. Promax: Hendrickson & White (1964), with power 3. FastICA: Hyvarinen (1999), 10.1109/72.761722.

        Examples
        --------
        >>> model.rotate("varimax")
        >>> model.factor_names
        ['F_0', 'F_1', 'F_2', 'F_3', 'F_4']
        """
        rotate(self, method, adata, indices, batch_size)
