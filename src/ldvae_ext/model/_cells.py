"""Cells of a method: the model's own, or others that its encoder can read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from torch.utils.data import DataLoader

from ldvae_ext._groups import table_of
from ldvae_ext._progress import shown_if_slow
from ldvae_ext._scvi import SETUP_METHOD_NAME, adata_minify_type, check_adata_or_dataloader
from ldvae_ext._validate import cell_positions, check_positive_int, listed
from ldvae_ext.backends.loader import CountsLoader, can_gather, check_in_order
from ldvae_ext.core.cells import EncodedCells
from ldvae_ext.core.rotation import Rotation
from ldvae_ext.core.rows import RowReader
from ldvae_ext.model._base import LDVAEBase
from ldvae_ext.model._bridge import encode_cells
from ldvae_ext.model._collection import (
    CollectionDataModule,
    as_anndata,
    is_checked,
    minibatches_of_module,
    note_checked,
)
from ldvae_ext.model._columns import Columns
from ldvae_ext.model._counts import (
    are_counts,
    check_categories,
    check_counts,
    check_numbers,
    counts_of,
    same_counts,
)
from ldvae_ext.model._fields import matched_column
from ldvae_ext.model._fingerprint import compare_genes
from ldvae_ext.model._registry import covariates_of, has_size_factors, known_levels


class CellStream(NamedTuple):
    """Cells on their way through the encoder."""

    obs: pd.DataFrame | None
    """Their obs; None if they come from a data loader."""
    chunks: Iterable[EncodedCells]
    """Their posteriors and counts, minibatch by minibatch; to be read once."""
    n_chunks: int | None
    """Number of minibatches, if known."""
    positions: np.ndarray | None
    """Their positions in the AnnData; None if they come from a data loader."""


@contextmanager
def stream_cells(
    model: LDVAEBase,
    adata: AnnData | None = None,
    indices: Any = None,
    batch_size: int | None = None,
    dataloader: Any = None,
    data_loader_kwargs: dict | None = None,
    rotation: Rotation | None = None,
    *,
    silent: bool | None = None,
) -> Iterator[CellStream]:
    """Posteriors and counts of cells, from an AnnData or from a data loader, read once; on rotated axes where given.

    With ``silent=None`` there is a bar if it takes longer than five seconds.
    """
    if isinstance(dataloader, CollectionDataModule) and adata is None:
        adata, dataloader = dataloader.adata, None
    adata = as_anndata(adata)
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
    if adata is None or dataloader is not None or not is_of_datamodule(model):
        check_adata_or_dataloader(model, adata, dataloader)
    model._check_if_trained(warn=True)
    covariates = covariates_of(model.registry)
    if dataloader is not None:
        if indices is not None:
            msg = "`indices` choose cells of an AnnData; with `dataloader` it decides which cells come."
            raise ValueError(msg)
        dataloader = minibatches_of_module(dataloader)
        length = len(dataloader) if hasattr(dataloader, "__len__") else None
        chunks = encode_cells(model.module, dataloader, covariates, rotation)
        yield CellStream(None, shown_if_slow(chunks, length) if silent is None else chunks, length, None)
        return
    if (data_loader_kwargs or {}).get("shuffle"):
        msg = "`data_loader_kwargs={'shuffle': True}` would return cells in another order than their names."
        raise ValueError(msg)
    with readable_cells(model, adata) as cells:
        positions = cell_positions(indices, cells.n_obs)
        loader = minibatches(model, cells, positions, batch_size, data_loader_kwargs)
        # The obs of the user: scvi-tools adds columns to the AnnData that it registers.
        obs = table_of((cells if adata is None else adata).obs)
        chunks = encode_cells(model.module, loader, covariates, rotation)
        shown = shown_if_slow(chunks, len(loader)) if silent is None else chunks
        yield CellStream(obs.iloc[positions], shown, len(loader), positions)


def minibatches(
    model: LDVAEBase,
    cells: AnnData,
    positions: np.ndarray,
    batch_size: int | None = None,
    data_loader_kwargs: dict | None = None,
) -> DataLoader:
    """Minibatches of cells that are registered with the model, in order; sparse where the counts are in memory."""
    # A generator of its own, since a torch data loader draws a seed from the global one even if it does not shuffle.
    generator, size = torch.Generator(), batch_size or scvi.settings.batch_size
    if is_of_datamodule(model):
        counts = counts_of(cells, model.get_setup_arg("layer"))
        fields = {
            REGISTRY_KEYS.X_KEY: counts,
            **Columns(model.registry).of(cast("pd.DataFrame", cells.obs), cells.n_obs),
        }
        return CountsLoader(fields, positions, size, generator=generator)
    manager = model.get_anndata_manager(cells, required=True)
    if manager.adata.isbacked:
        check_in_order(manager, data_loader_kwargs)
        return CountsLoader(manager, positions, size, generator=generator)
    if not data_loader_kwargs and scvi.settings.dl_num_workers == 0 and can_gather(manager):
        return CountsLoader(manager, positions, size, generator=generator)
    options = {"generator": generator, **(data_loader_kwargs or {})}
    return model._make_data_loader(cells, indices=positions, batch_size=batch_size, **options)


def with_positions(
    chunks: Iterable[EncodedCells], positions: np.ndarray | None
) -> Iterator[tuple[EncodedCells, np.ndarray]]:
    """Chunks of cells with their positions; positions in the data loader if there is no AnnData."""
    start = 0
    for chunk in chunks:
        stop = start + len(chunk.mean)
        yield chunk, np.arange(start, stop) if positions is None else positions[start:stop]
        start = stop


@contextmanager
def readable_cells(model: LDVAEBase, adata: AnnData | None, *, keep_random_state: bool = True) -> Iterator[AnnData]:
    """An AnnData that the model's encoder can read, registered with the model while the context lasts.

    An AnnData other than the model's own is not written to: its counts of the model's genes, in the model's order, and
    its obs are put into a light one. Raises if it lacks a gene, a layer or a column, or has a batch that the model
    has not seen. scvi-tools draws from numpy's global random state when it registers cells; that is undone with
    ``keep_random_state``.
    """
    given = given_cells(model, adata)
    if is_of_datamodule(model):
        # scvi-tools registers no AnnData with such a model.
        yield light_cells(model, given)
        return
    if adata is not None and adata_minify_type(adata) != model.minified_data_type:
        msg = f"`adata` is minified as {adata_minify_type(adata)!r}, the model's data as {model.minified_data_type!r}; they must agree."
        raise ValueError(msg)
    if adata is None or adata is model.adata or adata_minify_type(adata) is not None or _is_registered(model, adata):
        yield model._validate_anndata(adata)
        return
    light = light_cells(model, adata)
    without_data = model.adata is None
    random_state = np.random.get_state()  # noqa: NPY002
    if without_data:
        model._validate_anndata(light)  # adopts the cells as the model's own, for as long as they are here
        manager = model.adata_manager
    else:
        manager = model.adata_manager.transfer_fields(light)
        model._register_manager_for_instance(manager)
    if keep_random_state:
        np.random.set_state(random_state)  # noqa: NPY002
    try:
        yield light
    finally:
        if without_data:
            model._adata, model._adata_manager = None, None
        # scvi-tools keeps every registered AnnData alive, with the model and with its class.
        model._per_instance_manager_store[model.id].pop(manager.adata_uuid, None)
        model._setup_adata_manager_store.pop(manager.adata_uuid, None)


def is_of_datamodule(model: LDVAEBase) -> bool:
    """True if a model was set up by a data module, not by an AnnData."""
    return model.registry.get(SETUP_METHOD_NAME) == "setup_datamodule"


def check_registers_cells(model: LDVAEBase, method: str, cells: Any) -> None:
    """Raise if a method of scvi-tools would have to register cells with a model that was set up by a data module."""
    if cells is not None and is_of_datamodule(model):
        msg = (
            f"`{method}` needs a model that was set up with an AnnData, which may be backed; this one was set up with a data "
            "module."
        )
        raise ValueError(msg)


def given_cells(model: LDVAEBase, adata: Any) -> AnnData:
    """The cells that a method was given, or the model's own if None."""
    source = model.adata if adata is None else as_anndata(adata)
    if source is None:
        msg = "This model was loaded without data: give `adata`, an AnnData or a data module of `setup_annbatch`."
        raise ValueError(msg)
    return source


@contextmanager
def cells_to_read(model: LDVAEBase, adata: AnnData | None, dataloader: Any = None) -> Iterator[AnnData | None]:
    """``adata`` for a method of scvi-tools: None for the model's own cells, else cells as in :func:`readable_cells`.

    An AnnData with the model's genes in order is checked and returned: scvi-tools registers it, as for a LinearSCVI.
    """
    adata = as_anndata(adata)
    if adata is None or adata is model.adata or dataloader is not None or _is_registered(model, adata):
        yield adata
        return
    in_memory = isinstance(adata.obs, pd.DataFrame)
    if in_memory and model.adata is not None and adata_minify_type(adata) is None and _has_genes_in_order(model, adata):
        _check_cells(model, adata)
        try:
            yield adata
        finally:
            for manager in _managers_of(model, adata):
                _checksums[manager] = _checksum_of_columns(model, adata)
        return
    with readable_cells(model, adata, keep_random_state=False) as cells:
        yield cells


def _has_genes_in_order(model: LDVAEBase, adata: AnnData) -> bool:
    return np.array_equal(np.asarray(adata.var_names).astype(str), np.asarray(model.get_var_names()).astype(str))


# Checksum of the columns of obs of another AnnData when scvi-tools registered it.
_checksums: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def _managers_of(model: LDVAEBase, adata: AnnData) -> list[Any]:
    return [m for m in model._per_instance_manager_store.get(model.id, {}).values() if m.adata is adata]


def _checksum_of_columns(model: LDVAEBase, adata: AnnData) -> int:
    """Checksum of the columns of obs that a model reads."""
    keys = [*known_levels(model.registry), *(c.name for c in covariates_of(model.registry) if c.levels is None)]
    columns = (pd.util.hash_pandas_object(pd.Series(adata.obs[key]), index=False) for key in keys)
    return hash(tuple(column.to_numpy().tobytes() for column in columns))


def _is_registered(model: LDVAEBase, adata: AnnData) -> bool:
    """True if cells are registered with a model: by a method that passes them on to another one, or by an earlier call.

    If their columns of obs changed since an earlier call, that registration is given up.
    """
    managers = _managers_of(model, adata)
    for manager in managers:
        if manager in _checksums and _checksums[manager] != _checksum_of_columns(model, adata):
            for store in (model._per_instance_manager_store[model.id], model._setup_adata_manager_store):
                store.pop(manager.adata_uuid, None)
            return False
    return bool(managers)


def missing_genes(model: LDVAEBase, adata: AnnData) -> list[str]:
    """Genes of the model that ``adata`` does not have."""
    genes = pd.Index(np.asarray(model.get_var_names()).astype(str))
    return genes[~genes.isin(adata.var_names.astype(str))].tolist()


def model_counts(model: LDVAEBase, adata: AnnData) -> Any:
    """Counts of the model's genes, in the model's order.

    As many genes of which none has a name of the model are taken for the model's under other names, with a warning.
    """
    genes = np.asarray(model.get_var_names()).astype(str)
    missing = missing_genes(model, adata)
    if len(missing) == len(genes) == adata.n_vars:
        compare_genes(np.asarray(adata.var_names).astype(str), genes)
        return counts_of(adata, model.get_setup_arg("layer"))
    if missing:
        msg = f"`adata` lacks {len(missing)} of the {len(genes)} genes of the model: {listed(missing)}."
        raise ValueError(msg)
    names = pd.Index(adata.var_names.astype(str))
    if not names.is_unique:
        msg = f"`adata.var_names` must be unique; {names[names.duplicated()][0]!r} occurs more than once."
        raise ValueError(msg)
    counts = counts_of(adata, model.get_setup_arg("layer"))
    position = names.get_indexer(genes)
    if np.array_equal(position, np.arange(adata.n_vars)):
        return counts
    if not RowReader(counts).is_in_memory and not hasattr(counts, "compute"):
        # Columns of a file would all be read into memory.
        counts = ad.experimental.read_elem_lazy(getattr(counts, "group", counts))
    return counts.iloc[:, position] if isinstance(counts, pd.DataFrame) else counts[:, position]


def shared_counts_agree(model: LDVAEBase, adata: AnnData, rows: np.ndarray) -> bool | None:
    """True if ``adata`` has the counts of these rows of the model's data, in the genes that both have.

    None if there is no shared gene, or if values are not counts.
    """
    names = pd.Index(adata.var_names.astype(str))
    genes = pd.Index(np.asarray(model.get_var_names()).astype(str))
    if not names.is_unique or not genes.is_unique:
        return None
    position = names.get_indexer(genes)
    shared = np.flatnonzero(position >= 0)
    given = counts_of(adata, model.get_setup_arg("layer"))
    if not len(shared) or not are_counts(given, position[shared]):
        return None
    own = model.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    return same_counts(own, rows, shared, given, position[shared])


def light_cells(model: LDVAEBase, adata: AnnData) -> AnnData:
    """The counts of the model's genes and the obs of ``adata``, checked, in an AnnData of their own."""
    layer = model.get_setup_arg("layer")
    counts = model_counts(model, adata)
    if isinstance(counts, np.ndarray):
        counts = np.asarray(counts)  # no view of anndata's, which torch cannot take
    light = AnnData(
        X=counts if layer is None else None,
        obs=table_of(adata.obs).copy(),
        var=pd.DataFrame(index=np.asarray(model.get_var_names()).astype(str)),
        layers=None if layer is None else {layer: counts},
    )
    # A collection is checked once: its files do not change.
    if is_checked(adata):
        _check_columns(model, light)
    else:
        _check_cells(model, light)
        note_checked(adata)
    for key, (_, levels) in known_levels(model.registry).items():
        light.obs[key] = matched_column(pd.Series(light.obs[key]), levels, key)
    return light


def _check_cells(model: LDVAEBase, adata: AnnData) -> None:
    """Raise unless counts and columns of other cells can be read by the model."""
    check_counts(adata, model.get_setup_arg("layer"))
    _check_columns(model, adata)


def _check_columns(model: LDVAEBase, adata: AnnData) -> None:
    """Raise unless columns of other cells can be read by the model."""
    for key, (argument, levels) in known_levels(model.registry).items():
        check_categories(adata, argument, key, levels)
    for covariate in covariates_of(model.registry):
        if covariate.levels is None:
            check_numbers(adata, "continuous_covariate_keys", covariate.name)
    if has_size_factors(model.registry):
        check_numbers(adata, "size_factor_key", model.get_setup_arg("size_factor_key"), positive=True)
