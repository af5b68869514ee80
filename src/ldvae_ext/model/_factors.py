"""Differential expression through some of the factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from ldvae_ext._scvi import MODULE_KEYS
from ldvae_ext._validate import factor_indices
from ldvae_ext.core.rotation import Rotation
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.module import LDVAEModule


class FactorsMixin(LDVAEBase):
    """What differs between groups of cells, through which factors."""

    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        group1: list[str] | None = None,
        group2: str | None = None,
        idx1: list[int] | list[bool] | str | None = None,
        idx2: list[int] | list[bool] | str | None = None,
        mode: Literal["vanilla", "change"] = "vanilla",
        delta: float = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool | None = None,
        batchid1: list[str] | None = None,
        batchid2: list[str] | None = None,
        fdr_target: float = 0.05,
        silent: bool = False,
        weights: Literal["uniform", "importance"] | None = "uniform",
        filter_outlier_cells: bool = False,
        importance_weighting_kwargs: dict | None = None,
        dataloader: Any = None,
        *,
        factors: Any = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Differential expression between groups of cells, through all factors or through some of them.

        Without ``factors`` scvi-tools' own. With them, the expression that is compared is decoded from those factors alone:
        the others are held at the prior mean, z = 0 (u = 0 under ``latent_distribution="ln"``, where z = softmax(u)), in
        every cell. What is then found differs between the groups because of these factors, be it in their mean or in their
        spread. Cells, draws from their posteriors and importance weights are those of the whole model: with the same
        seeds and ``batch_correction`` all factors give what ``factors=None`` gives, and two sets of factors are compared draw
        by draw.

        Besides the factors, batch and covariates move the expression. With ``batch_correction=True`` both groups are decoded
        in each of the batches in turn, and the batch makes no difference: with ``factors=[]`` nothing differs. The covariates
        of a cell stay its own, and groups that differ in them differ in their expression, also with ``factors=[]``.

        Parameters
        ----------
        adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats, batchid1, batchid2, fdr_target, silent
            As in :meth:`scvi.model.LinearSCVI.differential_expression`.
        weights, importance_weighting_kwargs, dataloader, **kwargs
            As there. Importance weights are by the likelihood of the counts given all factors.
        batch_correction
            Whether both groups are decoded in the same batches, rather than each cell in its own. If None, only with
            ``factors``.
        filter_outlier_cells
            Whether outliers are left out; they are sought among the latents with all their factors.
        factors
            Factors through which groups may differ: names (``"Z_3"``; ``"F_3"`` while a rotation is in force) or positions. None: all of them, and no change of
            ``batch_correction``. An empty list: none of them.

        Returns
        -------
        A row for each gene and comparison, as in scvi-tools: ``proba_de``, ``bayes_factor``, ``lfc_mean``,
        ``is_de_fdr_0.05``, ... in ``mode="change"``; ``proba_m1``, ``bayes_factor``, ... in ``"vanilla"``. ``scale1`` and
        ``scale2`` are mean shares of expression decoded from ``factors``; statistics of the counts (``raw_mean1``, ...) are
        of the counts as they are.

        Raises
        ------
        ValueError
            If a factor or group does not exist, or cells from ``dataloader`` would have to be decoded in other batches than
            their own, which scvi-tools does not do.
        KeyError
            If ``groupby`` is no column of ``adata.obs``.
        """
        if batch_correction is None:
            batch_correction = factors is not None
        arguments = (
            adata,
            groupby,
            group1,
            group2,
            idx1,
            idx2,
            mode,
            delta,
            batch_size,
            all_stats,
            batch_correction,
            batchid1,
            batchid2,
            fdr_target,
            silent,
            weights,
            filter_outlier_cells,
            importance_weighting_kwargs,
            dataloader,
        )
        if factors is None:
            return super().differential_expression(*arguments, **kwargs)
        if batch_correction and adata is None and self.adata is None and self.module.n_batch > 1:
            msg = (
                "`factors` compares groups in the same batches, but cells from a `dataloader` are decoded in their own; "
                "`batch_correction=False` takes differences between batches into account."
            )
            raise ValueError(msg)
        with _expression_of(self.module, _positions(factors, self.factor_names), self.rotation):
            return super().differential_expression(*arguments, **kwargs)


def _positions(factors: Any, names: list[str]) -> np.ndarray:
    """Positions of factors given by name or position, possibly none of them."""
    given = [factors] if isinstance(factors, (str, int, np.integer)) else list(factors)
    return factor_indices(given, names, argument="factors") if given else np.empty(0, dtype=np.int64)


@contextmanager
def _expression_of(module: LDVAEModule, kept: np.ndarray, rotation: Rotation | None) -> Iterator[None]:
    """Inside, the expression that the network's forward pass gives is decoded from some latents, the others at 0.

    Only what ``get_normalized`` of the counts' distribution returns is exchanged. Draws, the latents among the outputs and
    the parameters and likelihood of the distribution are those of all latents, so importance weights are, too.
    """
    is_logistic, transformation = module.latent_distribution == "ln", module.z_encoder.z_transformation
    is_kept = torch.zeros(module.n_latent, dtype=torch.bool, device=module.device)
    is_kept[torch.from_numpy(kept)] = True
    axes = None if rotation is None else torch.as_tensor(rotation.matrix_kk, dtype=torch.float32, device=module.device)
    forward_with_all, latest_u = module.forward, torch.empty(0)

    def remember_u(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal latest_u
        (latest_u,) = inputs

    def forward(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        outputs = forward_with_all(tensors, *args, **kwargs)
        if kwargs.get("compute_loss", True):
            return outputs  # a likelihood is asked for, not expression
        inference, generative = outputs
        u = latest_u if is_logistic else inference[MODULE_KEYS.Z_KEY]
        u = torch.where(is_kept, u, 0.0) if axes is None else torch.where(is_kept, u @ axes, 0.0) @ axes.T
        z = transformation(u)
        inputs = module._get_generative_input(tensors, {**inference, MODULE_KEYS.Z_KEY: z})
        restricted = module.generative(**inputs, **kwargs.get("generative_kwargs", {}))
        generative[MODULE_KEYS.PX_KEY].get_normalized = restricted[MODULE_KEYS.PX_KEY].get_normalized
        return outputs

    # u cannot be had from softmax(u), which forgets a constant. For a normal latent the transformation is no layer.
    hook = transformation.register_forward_pre_hook(remember_u) if is_logistic else None
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if hook is not None:
            hook.remove()
