"""scvi-tools' getters that draw from posteriors: its numbers to the bit, without the parts that they do not need.

Counts are gathered as CSR rows and their logarithms taken before they are made dense; the encoder of the library, whose result is not
returned, makes its draws alone; and no distribution of the counts is built.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.nn import Encoder
from scvi.utils import track

from ldvae_ext.backends.counts import Counts
from ldvae_ext.backends.layers import is_plain, replaced
from ldvae_ext.backends.loader import CountsLoader, can_gather
from ldvae_ext.model._axes import transform_batch_codes
from ldvae_ext.model._base import LDVAEBase

# Methods of scvi-tools that are passed over.
_METHODS = ("forward", "inference", "generative", "_get_inference_input", "_regular_inference", "_get_generative_input")


def can_draw(
    model: LDVAEBase, adata: AnnData | None, dataloader: Any, data_loader_kwargs: dict[str, Any] | None
) -> bool:
    """True if scvi-tools' draws can be made here: counts in memory, a normal latent, and a network that is the package's own.

    Parameters
    ----------
    model
        The model.
    adata, dataloader, data_loader_kwargs
        Those that the caller gave.
    """
    module: Any = model.module
    if dataloader is not None or data_loader_kwargs or scvi.settings.dl_num_workers > 0 or not model.is_trained_:
        return False
    return (
        module.latent_distribution == "normal"
        and module.minified_data_type is None
        and not module.encode_covariates
        and module.device.type == "cpu"
        and replaced(module, _METHODS) is None
        and (module.use_observed_lib_size or is_plain(module.l_encoder, Encoder))
        and is_plain(module.decoder, module.decoder_cls)
        and can_gather(model.get_anndata_manager(model._validate_anndata(adata), required=True))
    )


def _minibatches(model: LDVAEBase, adata: AnnData | None, indices: Any, batch_size: int | None) -> CountsLoader:
    # With torch's own generator, from which a data loader draws a seed.
    manager = model.get_anndata_manager(model._validate_anndata(adata), required=True)
    return CountsLoader(manager, indices, batch_size or scvi.settings.batch_size)


def _posterior(module: Any, tensors: dict[str, torch.Tensor]) -> tuple[torch.distributions.Normal, torch.Tensor]:
    """Posterior of the latents of a minibatch, and a draw from it."""
    counts = Counts.of(tensors[REGISTRY_KEYS.X_KEY])
    if module.log_variational:
        # torch's own: numpy's differs in the last digit.
        counts = replace(counts, values=torch.log1p(counts.values))
    posterior, z_nk = module.z_encoder(counts.dense(), tensors[REGISTRY_KEYS.BATCH_KEY])
    _draw_library(module, len(z_nk))
    return posterior, z_nk


def _draw_library(module: Any, n_cells: int) -> None:
    """The draw of the log library, which is of no use here but moves torch's random state."""
    if not module.use_observed_lib_size:
        torch.empty(n_cells, 1).normal_()


@torch.inference_mode()
def drawn_latents(
    model: LDVAEBase, adata: AnnData | None, indices: Any, batch_size: int | None, *, give_mean: bool, return_dist: bool
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """See :meth:`LDVAE.get_latent_representation`; :func:`can_draw` must be True."""
    found: list[tuple[torch.Tensor, ...]] = []
    for tensors in _minibatches(model, adata, indices, batch_size):
        posterior, z_nk = _posterior(model.module, tensors)
        if return_dist:
            found.append((posterior.loc, posterior.scale.square()))
        else:
            found.append((posterior.loc if give_mean else z_nk,))
    mean_nk, *variance_nk = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return (mean_nk, variance_nk[0]) if return_dist else mean_nk


@torch.inference_mode()
def drawn_expression(
    model: LDVAEBase,
    adata: AnnData | None,
    indices: Any,
    transform_batch: Any,
    gene_list: Any,
    library_size: float,
    batch_size: int | None,
    return_numpy: bool | None,
    silent: bool,
) -> np.ndarray | pd.DataFrame:
    """See :meth:`LDVAE.get_normalized_expression`, with one draw for each cell; :func:`can_draw` must be True."""
    cells: Any = model._validate_anndata(adata)
    module: Any = model.module
    genes = slice(None) if gene_list is None else np.isin(np.asarray(cells.var_names), gene_list)
    codes = transform_batch_codes(model, transform_batch)
    parts = []
    for tensors in track(_minibatches(model, cells, indices, batch_size), description="Decoding", disable=silent):
        posterior, z_nk = _posterior(module, tensors)
        batch_index, library = tensors[REGISTRY_KEYS.BATCH_KEY], torch.zeros(len(z_nk), 1)
        covariates = {"cont_covs": REGISTRY_KEYS.CONT_COVS_KEY, "cat_covs": REGISTRY_KEYS.CAT_COVS_KEY}
        given = {name: tensors.get(key) for name, key in covariates.items()}
        of_batches = []
        for i, code in enumerate(codes):
            if i > 0:
                # scvi-tools encodes and draws anew for each batch.
                z_nk = posterior.rsample()
                _draw_library(module, len(z_nk))
            inputs = module.decoder_inputs(z_nk, library, batch_index, **given, transform_batch=code)
            scale_ng = module.decoder.scale(inputs.values, *inputs.categories)[..., genes]
            of_batches.append((scale_ng * library_size)[None])
        parts.append(torch.cat(of_batches, dim=0).mean(0).numpy())
    expression = np.concatenate(parts)
    if return_numpy:
        return expression
    rows = cells.obs_names if indices is None else cells.obs_names[indices]
    return pd.DataFrame(expression, columns=cells.var_names[genes], index=rows)
