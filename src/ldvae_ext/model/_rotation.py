"""Rotated factors: a view of a model on other axes of its latent space."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._validate import check_one_of
from ldvae_ext.core import LinearDecoder, kl_per_dimension
from ldvae_ext.core._views import check_rotatable
from ldvae_ext.core.rotation import CONSENSUS, METHODS, Rotation, loading_varimax, score_varimax, with_signs
from ldvae_ext.model._cells import CellStream, stream_cells
from ldvae_ext.model._decoding import DecodingMixin
from ldvae_ext.model._deviance import deviance_rotation

# More cells would not change the axes that scores are far from 0 along.
_MANY_CELLS = 20_000


class RotationMixin(DecodingMixin):
    """Rotation of the latents, and what is read through it."""

    def rotate(
        self,
        method: Literal["varimax", "score-varimax", "deviance", "none"] = "varimax",
        adata: AnnData | None = None,
        indices: Any = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        """Look at the model on other axes of its latent space: factors ``F_0``, ``F_1``, ... instead of latents ``Z_0``, ... .

        Neither the prior N(0, I) nor the likelihood knows axes: with an orthogonal R, factors ``f = R'z`` and loadings ``L R``
        decode to the same expression, and the divergence of a cell's posterior from the prior is the same. Which axes training
        ends on is mostly chance; a rotation chooses them by a rule, so that two trainings can agree. A cell's posterior
        N(m, diag(v)) becomes N(R'm, R'diag(v)R), with correlated factors.

        The rotation is a view. It is saved and loaded with the model, and the export, ablations, explained deviance,
        population loadings, ``differential_expression(factors=...)``, :meth:`get_factor_stats` and all that is read from an export
        speak of factors while it is in force. What scvi-tools' own methods return stays as it is, so do :meth:`decode` and
        :meth:`get_latent_kl`, and :meth:`get_loadings` and :meth:`get_decoder` unless they are asked for rotated factors. Posterior
        means of the factors are ``get_latent_representation() @ model.rotation.matrix_kk``; the export holds them. A training that
        changes the loadings ends it.

        Parameters
        ----------
        method
            * ``"varimax"``: each factor has large loadings in few genes (folded loadings, centred over genes). For reading.
            * ``"score-varimax"``: each factor is far from its mean in few cells (posterior means, centred over cells). More alike
              between trainings on different cells, less aligned with cell types.
            * ``"deviance"``: the first j factors explain the counts about as well as any j axes of this model, for all j: the
              Fisher-weighted principal axes, refined for the likelihood of cells cut off after a random number of factors (a local
              optimum). For a scree, or to keep some of the factors. Needs counts.
            * ``"none"``: the network's own axes.
        adata, indices
            Cells that decide order and, but for ``"varimax"``, axes; the model's own if None.
        batch_size
            Cells per minibatch; ``scvi.settings.batch_size`` if None.

        Raises
        ------
        ValueError
            Under ``latent_distribution="ln"``: softmax(R'u) is no rotation of softmax(u); for an unknown method; without data, or
            for ``"deviance"`` without counts.

        Notes
        -----
        Under the first two, factors are numbered by the mean divergence of their marginal posteriors from the prior, largest
        first; under ``"deviance"`` in the order of the rotation. Each points to its longer tail of genes
        (:meth:`ldvae_ext.core.LinearDecoder.signs`). Varimax: Kaiser (1958); for sparse factors Rohe & Zeng (2020),
        arXiv:2004.05387.
        """
        if isinstance(method, AnnData):
            msg = "`method` must be the name of a rotation; got an AnnData, which `adata=` takes."
            raise TypeError(msg)
        check_one_of("method", method, (*METHODS, "none"))
        if method == "none":
            self.rotation_ = None
            return
        check_rotatable(self.module.latent_distribution)
        if method == "deviance":
            self._check_has_counts("rotate('deviance')")
            matrix_kk = deviance_rotation(self, adata, indices, batch_size)
            self._see_through(Rotation(matrix_kk=matrix_kk, method=method))
            return
        mean_nk, variance_nk = self._posterior_of(adata, indices, batch_size)
        if method == "varimax":
            matrix_kk = loading_varimax(self.get_decoder())
        else:
            step = -(-len(mean_nk) // _MANY_CELLS)
            matrix_kk = score_varimax(mean_nk[::step])
        rotation = Rotation(matrix_kk=matrix_kk, method=method)
        kl_k = kl_per_dimension(mean_nk @ matrix_kk, rotation.variance(variance_nk)).mean(axis=0)
        self._see_through(rotation.arranged(np.argsort(-kl_k, kind="stable"), 1))

    def _see_through(self, rotation: Rotation) -> None:
        """Put a rotation in force, with canonical signs."""
        self.rotation_ = {"matrix": with_signs(self.get_decoder(), rotation.matrix_kk), "method": rotation.method}

    def _posterior_of(
        self, adata: AnnData | None, indices: Any, batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means and variances of cells, on the network's axes."""
        with stream_cells(self, adata, indices, batch_size) as cells:
            parts = [(chunk.mean.astype(np.float64), chunk.variance) for chunk in cells.chunks]
        if not parts:
            msg = "There are no cells to look at."
            raise ValueError(msg)
        mean_nk, variance_nk = (np.concatenate(part) for part in zip(*parts, strict=True))
        return mean_nk, variance_nk

    def get_loadings(self, *, canonical: bool = False, rotated: bool | None = None) -> pd.DataFrame:
        """Loadings of the decoder: by default its weights, as LinearSCVI returns them.

        Parameters
        ----------
        canonical
            False: in the network's gauge, sign and order. True: as exported, that is centred over genes (the softmax ignores a
            constant), turned so that the sum of cubes over genes is positive (a factor points to its longer tail of genes;
            :meth:`ldvae_ext.core.LinearDecoder.signs`), latents by descending mean KL of the model's cells, factors of a rotation
            as they are numbered.
        rotated
            Whether to see them through the rotation that is in force. None: with ``canonical=True`` if there is one.

        Returns
        -------
        Genes x latents (``Z_0``, ...) or factors (``F_0``, ...), in log-rate per unit of latent, folded with the batch norm. For what a
        decoder needs besides, see :meth:`get_decoder`.

        Raises
        ------
        ValueError
            If a rotation is asked for and none is in force, or the model has no data to order latents by.
        """
        if not canonical and not rotated:
            return super().get_loadings()
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
        """
        rotated = (canonical and self.rotation is not None) if rotated is None else rotated
        if rotated and self.rotation is None:
            msg = "`rotated`: no rotation is in force; `rotate()` puts one in force."
            raise ValueError(msg)
        decoder = self._factor_decoder() if rotated else super().get_decoder()
        if not canonical:
            return decoder
        order = np.arange(self.n_latent)
        if not rotated and not self.is_ordered_:
            mean_nk, variance_nk = self._posterior_of(None, None, None)
            order = np.argsort(-kl_per_dimension(mean_nk, variance_nk).mean(axis=0), kind="stable")
        return decoder.reordered(order, self._canonical_signs(decoder)[order]).centered()

    def _canonical_signs(self, decoder: LinearDecoder) -> np.ndarray:
        """Towards the longer tail of genes, or as the consensus has it."""
        is_consensus = self.rotation is not None and self.rotation.method == CONSENSUS
        return np.ones(self.n_latent, dtype=np.int64) if is_consensus else decoder.signs()

    def _factor_decoder(self) -> LinearDecoder:
        """The decoder on the axes that are looked at."""
        decoder = super().get_decoder()
        return decoder if self.rotation is None else decoder.rotated(self.rotation.matrix_kk, self.rotation.names)

    def _factor_stream(
        self, adata: AnnData | None, indices: Any, batch_size: int | None, dataloader: Any = None
    ) -> AbstractContextManager[CellStream]:
        """Cells on the axes that are looked at."""
        return stream_cells(self, adata, indices, batch_size, dataloader, rotation=self.rotation)
