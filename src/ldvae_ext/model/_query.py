"""Query mapping: cells of batches that a reference has not seen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.model import LinearSCVI
from scvi.model.base import ArchesMixin

from ldvae_ext._formats import SAVED_MODEL, check_format
from ldvae_ext._scvi import (
    MODEL_NAME_KEY,
    SETUP_ARGS_KEY,
    SETUP_METHOD_NAME,
    adata_minify_type,
    load_saved_files,
    parse_device_args,
)
from ldvae_ext._validate import listed, warn
from ldvae_ext.core.levels import match_levels
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._checkpoint import PICKLE, damage_named
from ldvae_ext.model._counts import check_given_anndata
from ldvae_ext.model._datamodule import start_of
from ldvae_ext.model._linear_scvi import as_linear_scvi_meant, is_of_linear_scvi, saved_arguments
from ldvae_ext.model._registry import covariates_of, level_names, state_of
from ldvae_ext.module._query import Freezing, Levels, QueryTrainingPlan, freeze, take_over

FORMAT_ATTRIBUTE = "saved_format_"
# Results of the reference's training, which do not apply to the query.
_OF_TRAINING = (
    "registry_",
    "init_params_",
    "is_trained_",
    "history_",
    "train_indices_",
    "validation_indices_",
    "test_indices_",
    "kl_weight_",
    "run_id_",
    "run_name_",
    "query_",
    FORMAT_ATTRIBUTE,
)


class _Reference(NamedTuple):
    attributes: dict[str, Any]
    """Saved state of a model of scvi-tools."""
    genes: np.ndarray
    state: dict[str, torch.Tensor]
    """State dict of the network."""

    @property
    def registry(self) -> dict[str, Any]:
        return self.attributes["registry_"]

    def levels(self) -> dict[str, np.ndarray]:
        """Levels of batch, labels and categorical covariates, by their names in messages."""
        return _levels(self.registry)


class QueryMixin(LDVAEBase):
    """Mapping of new cells onto a reference that stays as it is (scArches, Lotfollahi et al. 2021)."""

    _training_plan_cls = QueryTrainingPlan

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData | None = None,
        reference_model: str | os.PathLike[str] | LDVAEBase | LinearSCVI | None = None,
        registry: dict | None = None,
        inplace_subset_query_vars: bool = False,
        accelerator: str = "auto",
        device: int | str = "auto",
        unfrozen: bool = False,
        freeze_dropout: bool = False,
        freeze_expression: bool = True,
        freeze_decoder_first_layer: bool = True,
        freeze_batchnorm_encoder: bool = True,
        freeze_batchnorm_decoder: bool = True,
        freeze_classifier: bool = True,
        transfer_batch: bool = True,
        datamodule: Any = None,
        *,
        freeze_library_encoder: bool = True,
    ) -> Self:
        """Model of new cells, with the reference's batches and parameters.

        Only the parameters of new batches, labels and levels of categorical covariates are trained: their columns
        of the decoder (and of the encoders under ``encode_covariates``), their dispersions, their embedding. All other
        parameters stay the same to the bit, whatever the optimizer and its weight decay, and frozen batch norms are in
        evaluation mode: loadings, and the latents, libraries and rates of the reference's cells, do not move.

        New columns start at the mean over the reference's batches or levels, and so do log dispersions. A reference
        with a single batch has no column for it; it gets one of zeros that is not trained, and the new batches' columns start
        at zero. The prior of the log library of a new batch is computed from its cells.

        Parameters
        ----------
        adata
            The query: the reference's genes in the reference's order (see :meth:`prepare_query_anndata`), and the columns
            of ``obs`` that the reference was set up with. It is set up here.
        reference_model
            An LDVAE or a ``scvi.model.LinearSCVI``, or a directory that either was saved to. It stays as it is.
        registry
            Registry of the query, instead of ``adata``; its levels must begin with the reference's. That of ``datamodule``
            if None.
        inplace_subset_query_vars
            True to cut ``adata`` to the reference's genes, in place.
        accelerator, device
            As in scvi-tools.
        unfrozen
            True to train all parameters, whatever the arguments below.
        freeze_dropout
            True to train without dropout.
        freeze_expression
            True to freeze the first layer of the encoder, apart from new columns. (Later layers are always frozen.)
        freeze_decoder_first_layer
            True to freeze the decoder, apart from new columns; it has no other layer.
        freeze_batchnorm_encoder, freeze_batchnorm_decoder
            True to freeze batch norms, parameters and running statistics. (In scvi-tools the decoder's learns by
            default, which changes the loadings.)
        freeze_classifier
            Must be True: there is no classifier.
        transfer_batch
            True to allow batches in the query that are not in the reference.
        datamodule
            A Lightning data module of the query, instead of ``adata``.
        freeze_library_encoder
            True to freeze the encoder of the library size, apart from new columns. (In scvi-tools it learns, which
            changes the library sizes of the reference's cells.)

        Returns
        -------
        The model, to be trained unless it has no parameters to train.

        Raises
        ------
        TypeError
            If ``reference_model`` is of another class.
        KeyError
            If a column of ``obs`` is missing.
        ValueError
            If the query has other genes, is minified, or does not fit the arguments. Nothing is written before the checks.

        Examples
        --------
        >>> query = adata[:100].copy()
        >>> mapped = ldvae_ext.model.LDVAE.load_query_data(query, model)
        >>> mapped.get_loadings().equals(model.get_loadings())
        True
        """
        if not freeze_classifier:
            msg = "`freeze_classifier` must be True; got False. An LDVAE has no classifier."
            raise ValueError(msg)
        registry = getattr(datamodule, "registry", None) if registry is None else registry
        if (adata is None) == (registry is None):
            msg = "Give either `adata`, or `registry` or a `datamodule` that has one."
            raise ValueError(msg)
        torch_device = parse_device_args(
            accelerator=accelerator, devices=device, return_device="torch", validate_single_device=True
        )[-1]
        reference = _reference(cls, reference_model)
        if adata is not None:
            _set_up(cls, adata, reference, subset=inplace_subset_query_vars, new_batches=transfer_batch)
        else:
            _check_registry(registry or {}, reference, new_batches=transfer_batch)
        arguments = saved_arguments(reference.attributes["init_params_"])
        if is_of_linear_scvi(reference.registry):
            arguments = as_linear_scvi_meant(arguments)
        # With an AnnData, a registry only names the class of the arguments. All randomly drawn parameters are replaced.
        with torch.random.fork_rng(devices=[]):
            model = cls(adata, reference.registry if registry is None else registry, **arguments)
        if datamodule is not None:
            model._datamodule = datamodule
            if not model.module.use_observed_lib_size:
                start = start_of(datamodule, model.module.n_batch, has_size_factors=model.module.use_size_factor_key)
                model.module.set_library_prior(start.log_means, start.log_variances)
        if not reference.attributes.get("is_trained_", False):
            warn("The reference has not been trained: the query is mapped onto its random initial values.")
        known = [len(levels) for levels in reference.levels().values()]
        levels = Levels(known[0], known[1], tuple(known[2:]))
        take_over(model.module, reference.state, levels, library_known=adata is not None or datamodule is not None)
        for name, value in reference.attributes.items():
            if name not in _OF_TRAINING:
                setattr(model, name, deepcopy(value))
        options = Freezing(
            unfrozen=unfrozen,
            freeze_dropout=freeze_dropout,
            freeze_expression=freeze_expression,
            freeze_decoder_first_layer=freeze_decoder_first_layer,
            freeze_batchnorm_encoder=freeze_batchnorm_encoder,
            freeze_batchnorm_decoder=freeze_batchnorm_decoder,
            freeze_library_encoder=freeze_library_encoder,
        )
        model.query_ = {
            "n_batch": levels.n_batch,
            "n_labels": levels.n_labels,
            "n_cats_per_cov": list(levels.n_cats_per_cov),
            **options._asdict(),
        }
        model.to_device(torch_device)
        model.module.eval()
        freeze_reference(model)
        # Without parameters to train, the model is as trained as the reference.
        model.is_trained_ = not model.module.can_learn and reference.attributes.get("is_trained_", False)
        return model

    @staticmethod
    def prepare_query_anndata(
        adata: AnnData,
        reference_model: str | os.PathLike[str] | LDVAEBase | LinearSCVI,
        return_reference_var_names: bool = False,
        inplace: bool = True,
    ) -> AnnData | pd.Index | None:
        """Give a query the reference's genes in the reference's order: genes that it lacks are all zero.

        Parameters
        ----------
        adata
            The query.
        reference_model
            An LDVAE or a ``scvi.model.LinearSCVI``, or a directory that either was saved to.
        return_reference_var_names
            True to only return the genes of the reference.
        inplace
            True to change ``adata``, False to return a new one.

        Returns
        -------
        The prepared AnnData, None with ``inplace``, or the genes of the reference.

        Examples
        --------
        >>> query = adata[:, 100:].copy()
        >>> ldvae_ext.model.LDVAE.prepare_query_anndata(query, model)
        >>> query.n_vars  # genes that it lacked are all zero
        765
        """
        check_given_anndata(adata)
        if isinstance(reference_model, os.PathLike):
            reference_model = os.fspath(reference_model)
        return ArchesMixin.prepare_query_anndata(adata, reference_model, return_reference_var_names, inplace)


def freeze_reference(model: LDVAEBase) -> None:
    """Freeze a new network as requested in ``load_query_data``; no effect on a model that is not a query."""
    if model.query_ is None:
        return
    levels = Levels(model.query_["n_batch"], model.query_["n_labels"], tuple(model.query_["n_cats_per_cov"]))
    freeze(model.module, levels, Freezing(**{name: model.query_[name] for name in Freezing._fields}))
    # A data module must not overwrite the settings of the reference.
    model._has_start = True


def _reference(cls: type, model: Any) -> _Reference:
    """The reference, of an instance or a directory."""
    if isinstance(model, (str, os.PathLike)):
        with damage_named(Path(model) / PICKLE):
            attributes, genes, state, _ = load_saved_files(os.fspath(model), load_adata=False, map_location="cpu")
        check_format(os.fspath(model), attributes.get(FORMAT_ATTRIBUTE), SAVED_MODEL)
        name = attributes["registry_"].get(MODEL_NAME_KEY)
        if name not in (None, cls.__name__, "LDVAE", LinearSCVI.__name__):
            msg = f"`reference_model` must be an LDVAE or a LinearSCVI; {os.fspath(model)!r} is a {name}."
            raise TypeError(msg)
    elif isinstance(model, (LDVAEBase, LinearSCVI)):
        attributes = {name: value for name, value in model._get_user_attributes() if name.endswith("_")}
        genes, state = model.get_var_names(), model.module.state_dict()
    else:
        msg = f"`reference_model` must be an LDVAE, a scvi.model.LinearSCVI or a directory of either; got {type(model).__name__}."
        raise TypeError(msg)
    state = {name: value for name, value in state.items() if name != "pyro_param_store"}
    return _Reference(attributes, np.asarray(genes).astype(str), state)


def _levels(registry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        "batch": level_names(registry, REGISTRY_KEYS.BATCH_KEY),
        "labels": level_names(registry, REGISTRY_KEYS.LABELS_KEY),
        **{f"covariate {c.name}": c.levels for c in covariates_of(registry) if c.levels is not None},
    }


def _set_up(cls: Any, adata: AnnData, reference: _Reference, *, subset: bool, new_batches: bool) -> None:
    """Set the query up as the reference was, new levels behind the reference's."""
    check_given_anndata(adata)
    arguments = reference.registry.get(SETUP_ARGS_KEY)
    if arguments is None or reference.registry.get(SETUP_METHOD_NAME, "setup_anndata") != "setup_anndata":
        msg = "`reference_model` was not set up with an AnnData; give `registry` or `datamodule` instead of `adata`."
        raise ValueError(msg)
    if adata_minify_type(adata) is not None:
        msg = "`adata` is minified; a query needs its counts."
        raise ValueError(msg)
    genes = adata.var_names.astype(str)
    missing = reference.genes[~np.isin(reference.genes, genes)]
    if len(missing) or not (subset or np.array_equal(genes, reference.genes)):
        what = f"lacks {len(missing)} of the {len(reference.genes)} genes of the reference: {listed(missing)}"
        msg = f"`adata` {what if len(missing) else 'has other genes than the reference, or in another order'}; see `prepare_query_anndata`."
        raise ValueError(msg)
    batch_key = arguments.get("batch_key")
    if not new_batches and batch_key in adata.obs:
        _check_no_new_batch(adata.obs[batch_key].unique(), reference)
    if subset and not np.array_equal(genes, reference.genes):
        adata._inplace_subset_var(reference.genes)
    cls.setup_anndata(adata, source_registry=reference.registry, extend_categories=True, **arguments)


def _check_registry(registry: Mapping[str, Any], reference: _Reference, *, new_batches: bool) -> None:
    """Raise unless a registry begins with the reference's levels and has its genes."""
    genes = state_of(registry, REGISTRY_KEYS.X_KEY).get("column_names", reference.genes)
    if not np.array_equal(np.asarray(genes).astype(str), reference.genes):
        msg = "`registry` has other genes than the reference, or in another order."
        raise ValueError(msg)
    levels, known = _levels(registry), reference.levels()
    if list(levels) != list(known):
        msg = f"`registry` has {listed(levels)}; the reference has {listed(known)}."
        raise ValueError(msg)
    for name, old in known.items():
        if not np.array_equal(levels[name][: len(old)].astype(str), old.astype(str)):
            msg = f"`registry`: the levels of {name} must begin with the reference's, {listed(old)}; they are {listed(levels[name])}."
            raise ValueError(msg)
    if not new_batches:
        _check_no_new_batch(levels["batch"], reference)


def _check_no_new_batch(batches: Any, reference: _Reference) -> None:
    known, given = reference.levels()["batch"], list(batches)
    unseen = [batch for batch, at in zip(given, match_levels("batch", given, known.tolist()), strict=True) if at < 0]
    if unseen:
        msg = f"`transfer_batch=False`, but the query has the new batches {listed(unseen)}; the reference knows {listed(known)}."
        raise ValueError(msg)
