"""scvi-tools' getters that draw from posteriors: its numbers to the bit, without the parts that they do not need.

Logarithms are taken of counts above 0 alone; the encoder of the library, whose result is not
returned, makes its draws alone; and no distribution of the counts is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager
from scvi.nn import Encoder
from scvi.utils import track

from ldvae_ext.backends.counts import Counts
from ldvae_ext.backends.layers import is_plain, replaced
from ldvae_ext.backends.loader import CountsDataset, can_gather
from ldvae_ext.model._axes import transform_batch_codes
from ldvae_ext.model._base import LDVAEBase

# Methods of scvi-tools that are passed over.
_METHODS = ("forward", "inference", "generative", "_get_inference_input", "_regular_inference", "_get_generative_input")


def cells_to_draw(
    model: LDVAEBase, adata: AnnData | None, dataloader: Any, data_loader_kwargs: dict[str, Any] | None
) -> AnnDataManager | None:
    """Manager of the cells, if scvi-tools' draws can be made here; else None.

    That needs counts in memory, a normal latent, and a network that is the package's own.

    Parameters
    ----------
    model
        The model.
    adata, dataloader, data_loader_kwargs
        Those that the caller gave.
    """
    module: Any = model.module
    if dataloader is not None or data_loader_kwargs or scvi.settings.dl_num_workers > 0 or not model.is_trained_:
        return None
    if (
        module.latent_distribution != "normal"
        or module.minified_data_type is not None
        or module.encode_covariates
        or module.device.type != "cpu"
        or replaced(module, _METHODS) is not None
        or not (module.use_observed_lib_size or is_plain(module.l_encoder, Encoder))
        or not is_plain(module.decoder, module.decoder_cls)
    ):
        return None
    manager = model.get_anndata_manager(model._validate_anndata(adata), required=True)
    return manager if can_gather(manager) else None


class _Minibatches:
    """Minibatches in scvi-tools' order, their counts as an array that is used again for the next one.

    Parameters
    ----------
    module
        The network.
    manager, indices, batch_size
        The cells; all of them, and scvi-tools' size, if None.
    """

    def __init__(self, module: Any, manager: AnnDataManager, indices: Any, batch_size: int | None) -> None:
        self._module = module
        self._cells = CountsDataset(manager, np.arange(manager.adata.n_obs) if indices is None else np.asarray(indices))
        self._size = batch_size or scvi.settings.batch_size

    def __len__(self) -> int:
        return -(-len(self._cells) // self._size)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.distributions.Normal, torch.Tensor]]:
        """Minibatches with the posterior of the latents, and a draw from it."""
        # A data loader of torch draws the seed of its workers, also without any.
        torch.empty((), dtype=torch.int64).random_()
        dense_ng = np.zeros((self._size, self._module.n_input), np.float32)
        for start in range(0, len(self._cells), self._size):
            arrays = self._cells[range(start, min(start + self._size, len(self._cells)))]
            tensors = {key: torch.as_tensor(value) for key, value in arrays.items()}
            counts = Counts.of(tensors[REGISTRY_KEYS.X_KEY])
            # torch's own: numpy's differs in the last digit.
            seen = replace(counts, values=torch.log1p(counts.values)) if self._module.log_variational else counts
            at = counts.positions.numpy()
            dense_ng.reshape(-1)[at] = seen.arrays[2]
            x_ng = torch.from_numpy(dense_ng[: counts.n_cells])
            posterior, z_nk = self._module.z_encoder(x_ng, tensors[REGISTRY_KEYS.BATCH_KEY])
            dense_ng.reshape(-1)[at] = 0
            draw_library(self._module, counts.n_cells)
            yield tensors, posterior, z_nk


def draw_library(module: Any, n_cells: int) -> None:
    """The draw of the log library, which is of no use here but moves torch's random state."""
    if not module.use_observed_lib_size:
        torch.empty(n_cells, 1).normal_()


@torch.inference_mode()
def drawn_latents(
    module: Any,
    manager: AnnDataManager,
    indices: Any,
    batch_size: int | None,
    *,
    give_mean: bool,
    return_dist: bool,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """See :meth:`LDVAE.get_latent_representation`, and :func:`cells_to_draw`."""
    found: list[tuple[torch.Tensor, ...]] = []
    for _, posterior, z_nk in _Minibatches(module, manager, indices, batch_size):
        if return_dist:
            found.append((posterior.loc, posterior.scale.square()))
        else:
            found.append((posterior.loc if give_mean else z_nk,))
    mean_nk, *variance_nk = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return (mean_nk, variance_nk[0]) if return_dist else mean_nk


@torch.inference_mode()
def drawn_expression(
    model: LDVAEBase,
    manager: AnnDataManager,
    indices: Any,
    transform_batch: Any,
    gene_list: Any,
    library_size: float,
    batch_size: int | None,
    return_numpy: bool | None,
    silent: bool,
) -> np.ndarray | pd.DataFrame:
    """See :meth:`LDVAE.get_normalized_expression`, with one draw for each cell, and :func:`cells_to_draw`."""
    cells: Any = manager.adata
    module: Any = model.module
    genes = slice(None) if gene_list is None else np.isin(np.asarray(cells.var_names), gene_list)
    codes = transform_batch_codes(model, transform_batch)
    parts = []
    minibatches = _Minibatches(module, manager, indices, batch_size)
    for tensors, posterior, z_nk in track(minibatches, description="Decoding", disable=silent):
        batch_index, library = tensors[REGISTRY_KEYS.BATCH_KEY], torch.zeros(len(z_nk), 1)
        covariates = {"cont_covs": REGISTRY_KEYS.CONT_COVS_KEY, "cat_covs": REGISTRY_KEYS.CAT_COVS_KEY}
        given = {name: tensors.get(key) for name, key in covariates.items()}
        of_batches = []
        for i, code in enumerate(codes):
            if i > 0:
                # scvi-tools encodes and draws anew for each batch.
                z_nk = posterior.rsample()
                draw_library(module, len(z_nk))
            inputs = module.decoder_inputs(z_nk, library, batch_index, **given, transform_batch=code)
            scale_ng = module.decoder.scale(inputs.values, *inputs.categories)[..., genes]
            of_batches.append((scale_ng * library_size)[None])
        parts.append(torch.cat(of_batches, dim=0).mean(0).numpy())
    expression = np.concatenate(parts)
    if return_numpy:
        return expression
    rows = cells.obs_names if indices is None else cells.obs_names[indices]
    return pd.DataFrame(expression, columns=cells.var_names[genes], index=rows)
