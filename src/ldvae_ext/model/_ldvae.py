"""LDVAE, the drop-in replacement for scvi.model.LinearSCVI."""

from __future__ import annotations

import errno
import logging
import shutil
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData, read_h5ad
from scvi.model import LinearSCVI

from ldvae_ext._files import temporary_folder
from ldvae_ext._folder import check_anndata_can_be_written
from ldvae_ext._formats import SAVED_MODEL, check_format
from ldvae_ext._scvi import MODEL_NAME_KEY, SETUP_ARGS_KEY, parse_device_args
from ldvae_ext._validate import listed
from ldvae_ext.model._ablation import AblationMixin
from ldvae_ext.model._cells import is_of_datamodule
from ldvae_ext.model._checkpoint import PICKLE, check_prefix, damage_named
from ldvae_ext.model._collection import open_collection
from ldvae_ext.model._comparison import ComparisonMixin
from ldvae_ext.model._counts import check_is_anndata
from ldvae_ext.model._decoding import DecodingMixin
from ldvae_ext.model._export import ExportMixin
from ldvae_ext.model._fingerprint import compare_genes
from ldvae_ext.model._linear_scvi import as_linear_scvi_meant, saved_arguments
from ldvae_ext.model._plain_files import DESCRIPTION, CannotBeWritten, PlainModel
from ldvae_ext.model._populations import PopulationsMixin
from ldvae_ext.model._query import FORMAT_ATTRIBUTE, QueryMixin, freeze_reference
from ldvae_ext.model._readouts import ReadoutsMixin
from ldvae_ext.model._refinement import RefinementMixin
from ldvae_ext.model._stats import StatsMixin
from ldvae_ext.model._tasks import TasksMixin
from ldvae_ext.model._training import TrainingMixin

_log = logging.getLogger("ldvae_ext")


class LDVAE(
    TrainingMixin,
    DecodingMixin,
    AblationMixin,
    StatsMixin,
    PopulationsMixin,
    ReadoutsMixin,
    RefinementMixin,
    ExportMixin,
    TasksMixin,
    ComparisonMixin,
    QueryMixin,
):
    """Linearly decoded VAE (Svensson et al. 2020, 10.1093/bioinformatics/btaa169), to be read.

    A drop-in replacement for :class:`scvi.model.LinearSCVI`: same arguments, order and defaults, same network, same
    random draws. Additional methods: :meth:`get_decoder`, :meth:`decode`, :meth:`get_latent_kl`, :meth:`export_to_anndata`,
    :meth:`ablate`, :meth:`ablate_genes`, :meth:`get_explained_deviance`, :meth:`get_ablated_expression`,
    :meth:`get_population_loadings`, :meth:`get_programs`, ``differential_expression(factors=...)``, ``get_normalized_expression(use_posterior_mean=True)`` and
    ``train(kl_warmup="auto")``. (``scvi.module.LDVAE`` is the network that scvi-tools ships; this LDVAE is the model.)

    Parameters
    ----------
    adata
        AnnData registered by :meth:`setup_anndata`.
    registry
        Registry of a model saved without its data.
    n_hidden
        Nodes of each hidden layer of the encoder.
    n_latent
        Number of latent dimensions.
    n_layers
        Number of hidden layers of the encoder.
    dropout_rate
        Dropout rate of the encoder.
    dispersion
        ``"gene"``, ``"gene-batch"``, ``"gene-label"``, or ``"gene-cell"``, with a log dispersion that is linear in the
        latent. (LinearSCVI fails with the last two.)
    gene_likelihood
        ``"nb"``, ``"zinb"``, ``"poisson"`` or ``"normal"``.
    use_observed_lib_size
        True to use the observed total of a cell as library size, False for a latent variable.
    latent_distribution
        ``"normal"``, or ``"ln"`` for a logistic-normal latent, z = softmax(u).
    **model_kwargs
        Options of the network, see :class:`ldvae_ext.module.LDVAEModule`: ``use_batch_norm``, ``bias``, ``log_variational``,
        ``encode_covariates``, ``deeply_inject_covariates``, ``batch_representation``, ``batch_embedding_kwargs``,
        ``use_layer_norm``, ``var_activation``, ``extra_encoder_kwargs``, ``extra_payload_autotune``. With
        ``datamodule=...`` instead of ``adata`` the model is built for a Lightning data module.

    Examples
    --------
    >>> from ldvae_ext.model import LDVAE as LinearSCVI
    >>> LinearSCVI.setup_anndata(adata)
    >>> model = LinearSCVI(adata, n_latent=5)
    >>> model.train(max_epochs=5, kl_warmup="auto")
    >>> model.export_to_anndata()
    >>> adata.obsm["X_ldvae"].shape
    (700, 5)
    """

    # Ends in an underscore to be saved with the model, as scvi-tools saves such attributes.
    saved_format_: int = SAVED_MODEL

    @classmethod
    def setup_annbatch(
        cls,
        collection_path: str | None = None,
        paths: list[str] | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Cells on disk as a data module, for data that do not fit into memory: scvi-tools' ``setup_annbatch``.

        The files are copied once into a collection of annbatch, a zarr store whose cells can be read in any order. Then
        ``LDVAE(registry=datamodule.registry)`` and ``train(datamodule=datamodule)``. Methods that take an ``adata`` take the
        data module in its place, and read the cells from disk.

        Parameters
        ----------
        collection_path
            Folder of the collection, which is written, or read if ``paths`` is None or ``rebuild=False``.
        paths
            Files (``.h5ad``) with raw counts.
        batch_key, labels_key
            Columns of ``obs``, as in :meth:`setup_anndata`.
        **kwargs
            Other arguments of scvi-tools: ``layer``, ``categorical_covariate_keys``, ``continuous_covariate_keys``, ``rebuild``,
            ``batch_size`` (of minibatches that are read; ``train`` has its own), ``chunk_size``, ``preload_nchunks``, ``shuffle``
            (of the cells in the collection), ``var_subset`` and more.

        Returns
        -------
        A ``scvi.dataloaders.AnnbatchDataModule``, with the cells as a lazily read AnnData in ``adata``.

        Raises
        ------
        ImportError
            Without the packages of ``pip install "ldvae-ext[large]"``.
        ValueError
            If there is no such collection and no file to make it of.

        Examples
        --------
        >>> datamodule = LDVAE.setup_annbatch("cells.zarr", ["a.h5ad", "b.h5ad"], batch_key="donor")  # doctest: +SKIP
        >>> model = LDVAE(registry=datamodule.registry)  # doctest: +SKIP
        >>> model.train(datamodule=datamodule, train_size=0.9)  # doctest: +SKIP
        >>> model.ablate(datamodule)  # doctest: +SKIP
        """
        arguments = {
            "collection_path": collection_path,
            "paths": paths,
            "batch_key": batch_key,
            "labels_key": labels_key,
        }
        return open_collection(super().setup_annbatch, cls.__name__, {**arguments, **kwargs})

    def save(
        self,
        dir_path: str,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        save_kwargs: dict | None = None,
        legacy_mudata_format: bool = False,
        datamodule: Any = None,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model as scvi-tools does; without the AnnData, and with an error, if that cannot be written.

        Parameters
        ----------
        dir_path, prefix, overwrite, save_anndata, save_kwargs, legacy_mudata_format, datamodule, **anndata_write_kwargs
            As in :meth:`scvi.model.base.BaseModelClass.save`.

        Raises
        ------
        ValueError
            If a model that was set up with a data module has not been trained, and ``datamodule`` is not given; or if ``save_anndata`` is True and a name or column of the AnnData cannot be written. The model is saved, and an
            AnnData in the folder, incomplete or of another model, is removed.

        Examples
        --------
        >>> model.save("model", save_anndata=True)
        >>> ldvae_ext.model.LDVAE.load("model").latent_names
        ['Z_0', 'Z_1', 'Z_2', 'Z_3', 'Z_4']
        """
        folder = Path(dir_path)
        check_prefix(prefix)
        if folder.is_file():
            msg = f"`dir_path`: {dir_path} is a file; name a folder."
            raise NotADirectoryError(msg)
        datamodule = getattr(self, "_datamodule", None) if datamodule is None else datamodule
        if datamodule is None and is_of_datamodule(self):
            msg = "This model was set up with a data module and has not been trained on one: give `datamodule`."
            raise ValueError(msg)
        arguments: dict[str, Any] = {
            "prefix": prefix,
            "save_kwargs": save_kwargs,
            "legacy_mudata_format": legacy_mudata_format,
            "datamodule": datamodule,
        }
        complete = {"overwrite": overwrite, "save_anndata": save_anndata, **arguments, **anndata_write_kwargs}
        if folder.exists() and not overwrite:
            # As scvi-tools refuses it.
            msg = f"`dir_path`: {dir_path} already exists. Please provide another directory for saving, or `overwrite=True`."
            raise ValueError(msg)
        if not save_anndata or self.adata is None:
            self._save_whole(folder, complete)
            return
        try:
            check_anndata_can_be_written(self.adata)
            self._save_whole(folder, complete)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            # The one of another model.
            (folder / f"{prefix or ''}adata.h5ad").unlink(missing_ok=True)
            self._save_whole(folder, {"overwrite": True, "save_anndata": False, **arguments})
            msg = f"{error} The model was saved to {dir_path} without it."
            raise ValueError(msg) from error

    def _save_whole(self, folder: Path, options: dict[str, Any]) -> None:
        """Save to a temporary folder, and move each file to its place when all are complete."""
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            work = temporary_folder(folder)
            try:
                super().save(str(work), **{**options, "overwrite": True})
                self._save_plain(work, options.get("prefix") or "")
                # The model last: a folder with a model has all that belongs to it.
                for path in sorted(work.iterdir(), key=lambda each: each.name.endswith("model.pt")):
                    path.replace(folder / path.name)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        except BaseException:
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise

    def _save_plain(self, folder: Path, prefix: str) -> None:
        try:
            PlainModel.of(self).write(folder, prefix)
        except CannotBeWritten as error:
            # The pickle holds it; `load(trusted=False)` says that the files are missing.
            _log.info("Saved as a pickle alone: %s, which only a pickle can hold.", error)
            (folder / f"{prefix}{DESCRIPTION}").unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        dir_path: str,
        adata: AnnData | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        backup_url: str | None = None,
        datamodule: Any = None,
        allowed_classes_names_list: list[str] | None = None,
        *,
        trusted: bool = True,
    ) -> LDVAE:
        """Open a directory that ``LDVAE.save`` or ``LinearSCVI.save`` wrote.

        As everywhere in scvi-tools, ``model.pt`` is a pickle, and opening it can run code: open only files that you trust.
        ``trusted=False`` opens the same model from ``weights.safetensors`` and ``model.json``, which hold none.

        Parameters
        ----------
        dir_path, adata, accelerator, device, prefix, backup_url, datamodule
            As in :meth:`scvi.model.base.BaseModelClass.load`. ``adata=False`` opens the model without data.
        allowed_classes_names_list
            Names of further classes whose directories may be opened; ``"LinearSCVI"`` is always among them.
        trusted
            False to read no pickle.

        Raises
        ------
        ValueError
            If ``trusted`` is False and the directory has a pickle alone, or files that are damaged.

        Examples
        --------
        >>> model.save("model")
        >>> loaded = ldvae_ext.model.LDVAE.load("model", adata)
        >>> loaded.get_loadings().equals(model.get_loadings())
        True
        """
        check_prefix(prefix)
        check_is_anndata(None if adata is False else adata)
        classes = [LinearSCVI.__name__, *(allowed_classes_names_list or [])]
        if not trusted:
            given = [
                name for name, value in (("backup_url", backup_url), ("datamodule", datamodule)) if value is not None
            ]
            if given:
                msg = f"`trusted=False` reads files of the directory alone, without {listed(given)}."
                raise ValueError(msg)
            return cls._load_plain(Path(dir_path), adata, accelerator, device, prefix or "", [cls.__name__, *classes])
        with damage_named(Path(dir_path) / f"{prefix or ''}{PICKLE}"):
            model = super().load(
                dir_path,
                adata,
                accelerator=accelerator,
                device=device,
                prefix=prefix,
                backup_url=backup_url,
                allowed_classes_names_list=classes,
            )
        if datamodule is not None:
            # scvi-tools would build the network anew, from the options that the class spells out.
            model._datamodule = datamodule
        # A model that is saved again has the present format.
        check_format(dir_path, vars(model).pop(FORMAT_ATTRIBUTE, None), SAVED_MODEL)
        freeze_reference(model)
        return model

    @classmethod
    def _load_plain(
        cls, folder: Path, adata: Any, accelerator: str, device: int | str, prefix: str, classes: list[str]
    ) -> LDVAE:
        plain = PlainModel.read(folder, prefix)
        registry = plain.registry
        if registry.get(MODEL_NAME_KEY, cls.__name__) not in classes:
            msg = f"{folder} holds a {registry[MODEL_NAME_KEY]!r}; opened are {listed(classes)}."
            raise ValueError(msg)
        of_folder = folder / f"{prefix}adata.h5ad"
        if adata is None and of_folder.is_file():
            adata = read_h5ad(of_folder)
        if adata is None:
            msg = f"{folder} has no AnnData: give `adata`, or `adata=False` to open the model without data."
            raise ValueError(msg)
        if adata is not False:
            cls._register_as(plain, adata)
        device = parse_device_args(
            accelerator=accelerator, devices=device, return_device="torch", validate_single_device=True
        )[-1]
        return cls._of_plain(plain, adata, device, folder)

    @classmethod
    def _register_as(cls, plain: PlainModel, adata: AnnData) -> None:
        """Set up an AnnData as that of a saved model was."""
        if adata.n_vars == len(plain.genes):
            compare_genes(np.asarray(adata.var_names).astype(str), plain.genes)
        cls.setup_anndata(adata, source_registry=plain.registry, **plain.registry[SETUP_ARGS_KEY])

    @classmethod
    def _of_plain(cls, plain: PlainModel, adata: Any, device: Any, folder: Path) -> LDVAE:
        """The model that plain files hold, on a registered AnnData or, with False, without data."""
        attributes = dict(plain.attributes)
        # A model that is saved again has the present format.
        check_format(str(folder), attributes.pop(FORMAT_ATTRIBUTE, None), SAVED_MODEL)
        try:
            arguments = saved_arguments(attributes.pop("init_params_"))
            # The drawn parameters are replaced at once. The caller's random state is restored.
            with torch.random.fork_rng(devices=[]):
                model = cls(None if adata is False else adata, plain.registry if adata is False else None, **arguments)
            model.module.load_state_dict(plain.state)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            msg = f"{folder} holds no model that can be read: {error}."
            raise ValueError(msg) from error
        model.to_device(device)
        model.module.eval()
        for name, value in attributes.items():
            if not name.endswith("_") or name.startswith("_"):
                msg = f"{folder} holds no model that can be read: {name!r} is no attribute of a model."
                raise ValueError(msg)
            setattr(model, name, value)
        if adata is not False:
            model._validate_anndata(adata)
        freeze_reference(model)
        return model

    @classmethod
    def from_linear_scvi(cls, model: LinearSCVI) -> LDVAE:
        """An LDVAE with the network, data and training history of a LinearSCVI model, which stays as it is.

        Latent representation, loadings and decoded expression are equal to the given model's.

        Examples
        --------
        >>> from scvi.model import LinearSCVI
        >>> LinearSCVI.setup_anndata(adata)
        >>> linear = LinearSCVI(adata, n_latent=5)
        >>> linear.train(max_epochs=1)
        >>> same = ldvae_ext.model.LDVAE.from_linear_scvi(linear)
        >>> same.get_loadings().equals(linear.get_loadings())
        True
        """
        if not isinstance(model, LinearSCVI):
            msg = (
                f"`model` must be a scvi.model.LinearSCVI; got {type(model).__name__}. `LDVAE.load` opens a saved one."
            )
            raise TypeError(msg)
        if model.adata is not None:
            registry = model.registry
            cls.setup_anndata(model.adata, source_registry=registry, **registry[SETUP_ARGS_KEY])
        arguments = as_linear_scvi_meant(saved_arguments(model.init_params_))
        # The drawn parameters are replaced at once. The caller's random state is restored.
        with torch.random.fork_rng(devices=[]):
            new = cls(model.adata, None if model.adata is not None else model.registry, **arguments)
        new.module.load_state_dict(model.module.state_dict())
        new.to_device(model.device)
        new.module.train(model.module.training)
        for name, value in model._get_user_attributes():
            # LinearSCVI keeps rotation and order as unknown attributes, also after it has trained other loadings.
            if name.endswith("_") and name not in ("registry_", "init_params_", "rotation_", "is_ordered_"):
                setattr(new, name, deepcopy(value))
        freeze_reference(new)
        return new
