"""The latents of any scvi-tools model with a Gaussian posterior, in order of information."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.model.base import BaseModelClass

import ldvae_ext
from ldvae_ext._formats import EXPORT
from ldvae_ext._keys import ORDERED_KEY, ExportKeys, export_keys
from ldvae_ext._validate import listed
from ldvae_ext.core import kl_per_dimension
from ldvae_ext.core.posterior import deterministic_latent
from ldvae_ext.module._modes import evaluating

# Key that identifies a result of this function.
MARK = "model_class"


def order_latents(
    model: BaseModelClass,
    adata: AnnData | MuData | None = None,
    *,
    key_added: str | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Write the latents of a trained scvi-tools model to an AnnData, in order of information.

    For any model whose posterior is a Gaussian with a mean and a variance for each cell and latent: SCVI, SCANVI, TOTALVI,
    PEAKVI, MULTIVI, LinearSCVI and others. Latents are named after the network's dimension (``Z_3``) and sorted, descending,
    by the mean over cells of ``KL = (mean^2 + variance - 1 - log variance) / 2``, the divergence from the standard normal
    (Kingma & Welling 2014, arXiv:1312.6114, appendix B). Their signs stay as they are. For the first five latents in scanpy:
    ``sc.pp.neighbors(adata, use_rep="X_ordered_latent", n_pcs=5)``.

    Parameters
    ----------
    model
        A trained model. An :class:`LDVAE` is also possible; :meth:`LDVAE.export_to_anndata` writes its loadings and decoder as well.
    adata
        Where to write; the model's own data if None. Other cells are encoded by the model, for which scvi-tools registers
        them: it adds ``_scvi_*`` columns to their ``obs`` and ``_scvi_*`` entries to their ``uns``. A model that was loaded
        without data keeps them as its own, as with all of scvi-tools' methods.
    key_added
        Replaces ``ordered_latent`` in all keys together.
    batch_size
        Cells per minibatch; ``scvi.settings.batch_size`` if None.

    Returns
    -------
    The table of the latents, one row for each, in order. Index: names. Columns: ``dimension`` (0-based, of the network),
    ``kl`` (nats, mean over cells), ``kl_share`` (of the sum), ``active_unit`` (variance over cells of the posterior mean).

    Raises
    ------
    TypeError
        If ``model`` is no such model, its posterior no such Gaussian, or ``adata`` no AnnData or MuData.
    RuntimeError
        If the model has not been trained.
    ValueError
        If there are no cells, if one of the keys has a value that this function did not write, or, from scvi-tools, if the
        network returns no numbers or cannot read the cells. No latents are written.

    Notes
    -----
    Writes, to a MuData at its top level,

    * ``obsm["X_ordered_latent"]``: posterior means, cells x latents, float32 (softmax of the means of u for
      ``latent_distribution="ln"``, z = softmax(u));
    * ``obsm["X_ordered_latent_var"]``: posterior variances, same order, float32 (of u under ``"ln"``);
    * ``uns["ordered_latent"]``: ``format`` (2), ``names`` and ``order`` of the latents, ``statistics`` (``kl``, ``kl_share``,
      ``active_unit``; of u under ``"ln"``), ``model_class`` (its name), ``latent_distribution``, ``n_cells``, ``versions``.

    The KL is from the standard normal, whatever the model's prior is. SCVI, TOTALVI, PEAKVI, MULTIVI and LinearSCVI
    have this prior. The prior of SCANVI depends on the label, and the prior of some others can be a mixture (SysVI, CYTOVI,
    CondSCVI): for them the order is by distance from the standard normal, which is not a term of their ELBO.

    Examples
    --------
    >>> table = ldvae_ext.model.order_latents(model)
    >>> table["kl"].is_monotonic_decreasing
    True
    >>> adata.obsm["X_ordered_latent"].shape
    (700, 5)
    """
    _check_model(model)
    keys = export_keys(ORDERED_KEY if key_added is None else key_added)
    target = model.adata if adata is None else adata
    if target is None:
        msg = "This model has no data of its own: give `adata`."
        raise ValueError(msg)
    if not isinstance(target, (AnnData, MuData)):
        msg = f"`adata` must be an AnnData or a MuData; got {type(target).__name__}."
        raise TypeError(msg)
    model._check_if_trained(warn=False)
    _check_free(target, keys)
    if target.n_obs == 0:
        msg = "There are no cells to order the latents by."
        raise ValueError(msg)
    mean_nk, variance_nk = _posterior(model, target, batch_size)
    kl_k = kl_per_dimension(mean_nk, variance_nk).mean(axis=0)
    order = np.argsort(-kl_k, kind="stable")
    # Modules without this attribute have a plain normal latent; scvi-tools reads it in the same way.
    latent_distribution = getattr(model.module, "latent_distribution", "normal")
    latent_nk = deterministic_latent(mean_nk, latent_distribution)
    statistics = {
        "kl": kl_k[order],
        "kl_share": kl_k[order] / kl_k.sum(),
        "active_unit": mean_nk.var(axis=0, dtype=np.float64)[order],
    }
    names = np.array([f"Z_{k}" for k in order])

    target.obsm[keys.latent] = latent_nk[:, order].astype(np.float32)
    target.obsm[keys.variance] = variance_nk[:, order].astype(np.float32)
    target.uns[keys.info] = {
        "format": EXPORT,
        "names": names,
        "order": order,
        "statistics": statistics,
        MARK: type(model).__name__,
        "latent_distribution": latent_distribution,
        "n_cells": target.n_obs,
        "versions": {"ldvae_ext": ldvae_ext.__version__, "scvi-tools": scvi.__version__},
    }
    return pd.DataFrame({"dimension": order, **statistics}, index=pd.Index(names, name="latent"))


def _check_model(model: Any) -> None:
    """Raise unless ``model`` is one that can give the mean and variance of each cell's posterior."""
    getter = getattr(model, "get_latent_representation", None)
    arguments = () if getter is None else inspect.signature(getter).parameters
    if not isinstance(model, BaseModelClass) or "return_dist" not in arguments:
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        msg = (
            "`model` must be a trained scvi-tools model whose `get_latent_representation` has `return_dist`, as SCVI, SCANVI, "
            f"TOTALVI, PEAKVI, MULTIVI, LinearSCVI and LDVAE have; got {given}."
        )
        raise TypeError(msg)


def _check_free(target: AnnData | MuData, keys: ExportKeys) -> None:
    """Raise if the entries under the keys were not written by :func:`order_latents`."""
    info = target.uns.get(keys.info)
    if isinstance(info, Mapping) and MARK in info:
        return
    taken = [key for key in (keys.latent, keys.variance) if key in target.obsm]
    taken += [keys.info] if info is not None else []
    if taken:
        msg = f"{listed(taken)} of `adata` would be replaced, and no result of `order_latents` is there; choose another `key_added`."
        raise ValueError(msg)


def _posterior(
    model: BaseModelClass, target: AnnData | MuData, batch_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and variances of the cells, checked."""
    name = type(model).__name__
    # MULTIVI with weights for each cell refuses any data that are given, its own too.
    given = None if target is model.adata else target
    device = next(model.module.parameters()).device
    random_state = np.random.get_state()  # noqa: NPY002 - scvi-tools' look at the counts of other cells draws from it
    try:
        # scvi-tools' inference also draws a sample, which would move the caller's random state.
        with evaluating(model.module), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            mean_nk, variance_nk = model.get_latent_representation(adata=given, batch_size=batch_size, return_dist=True)
    except AttributeError as error:  # raised by scvi-tools' getter for a distribution without `loc` or `scale`
        msg = f"`model` must have a Gaussian posterior; {name} gave no mean and variance of each cell: {error}."
        raise TypeError(msg) from error
    finally:
        np.random.set_state(random_state)  # noqa: NPY002
    data = model.get_anndata_manager(target)
    if data is not None and REGISTRY_KEYS.LATENT_QZV_KEY in data.data_registry:
        # Minified data hold the variances. TOTALVI up to scvi-tools 1.5 takes them for standard deviations, and gives their squares.
        variance_nk = np.asarray(data.get_from_registry(REGISTRY_KEYS.LATENT_QZV_KEY))
    if mean_nk.ndim != 2 or mean_nk.shape != variance_nk.shape or len(mean_nk) != target.n_obs:
        msg = (
            "`model` must have a Gaussian posterior with a mean and a variance for each cell and latent; "
            f"{name} gave arrays of shapes {mean_nk.shape} and {variance_nk.shape} for {target.n_obs} cells."
        )
        raise TypeError(msg)
    return mean_nk, variance_nk
