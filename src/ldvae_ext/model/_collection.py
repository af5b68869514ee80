"""Cells of an annbatch collection: minibatches for the training, and a lazily read AnnData for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from lightning.pytorch import LightningDataModule
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.dataloaders import AnnbatchDataModule

from ldvae_ext.backends.counts import csr_tensor
from ldvae_ext.model._columns import Columns
from ldvae_ext.model._counts import check_is_anndata


class CollectionDataModule(AnnbatchDataModule):
    """scvi-tools' data module of an annbatch collection on disk, made by :meth:`LDVAE.setup_annbatch`.

    Minibatches are sparse in a training whose backend reads sparse counts. Methods of a model take the data module in place of an
    AnnData.
    """

    collection_path: str
    """Path of the collection."""
    _is_sparse = False

    @cached_property
    def adata(self) -> AnnData:
        """All cells in the order of the collection, with all columns of ``obs``; counts are read from disk when they are needed."""
        adata = read_collection(self.collection_path, self.registry["setup_args"]["layer"])
        _checked.discard(id(adata))
        _collections[id(adata)] = adata
        return adata

    @property
    def registry(self) -> dict[str, Any]:
        """scvi-tools' registry, with the genes of the collection; scvi-tools names them after the first file."""
        registry = super().registry
        registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]["column_names"] = self._genes
        return registry

    @cached_property
    def _genes(self) -> list[str]:
        return genes_of_collection(self.collection_path)

    @property
    def loads_minibatches(self) -> bool:
        """True if loaders bring minibatches as networks take them."""
        return self._is_sparse

    def train_dataloader(self) -> Any:
        """Minibatches of the training."""
        return self._loaded(super().train_dataloader())

    def val_dataloader(self) -> Any:
        """Minibatches of the validation."""
        return self._loaded(super().val_dataloader())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int | None) -> Any:
        """A minibatch as scvi-tools' networks take it, unless it already is.

        Parameters
        ----------
        batch, dataloader_idx
            As in lightning.
        """
        return batch if REGISTRY_KEYS.BATCH_KEY in batch else super().on_before_batch_transfer(batch, dataloader_idx)

    def _loaded(self, loader: Any) -> Any:
        return _Loaded(loader, self._columns) if self._is_sparse and not isinstance(loader, list) else loader

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self.registry)


class _Loaded:
    """Minibatches of annbatch as networks take them, with sparse counts."""

    def __init__(self, loader: Any, columns: Columns) -> None:
        self._loader, self._columns = loader, columns

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for minibatch in self._loader:
            columns = self._columns.of(minibatch["obs"], minibatch["X"].shape[0])
            yield {REGISTRY_KEYS.X_KEY: _csr(minibatch["X"]), **{k: torch.from_numpy(v) for k, v in columns.items()}}


def _csr(counts: Any) -> torch.Tensor:
    if isinstance(counts, torch.Tensor):
        if counts.layout is not torch.sparse_csr or counts.device.type != "cpu":
            return counts.float()
        parts = counts.crow_indices(), counts.col_indices(), counts.values()
        arrays = [part.numpy() for part in parts]
    else:
        matrix = sparse.csr_array(counts)
        arrays = [matrix.indptr, matrix.indices, matrix.data]
    indptr, indices, values = (
        array.astype(dtype, copy=False) for array, dtype in zip(arrays, (np.int64, np.int64, np.float32), strict=True)
    )
    return csr_tensor(indptr, indices, values, counts.shape)


@contextmanager
def sparse_minibatches(datamodule: Any) -> Iterator[None]:
    """Inside, minibatches of a collection hold counts as CSR tensors in a training; other data modules stay as they are.

    Parameters
    ----------
    datamodule
        A data module, or None.
    """
    if not isinstance(datamodule, CollectionDataModule):
        yield
        return
    datamodule._is_sparse = True
    try:
        yield
    finally:
        datamodule._is_sparse = False


def open_collection(set_up: Callable[..., AnnbatchDataModule], name: str, arguments: dict[str, Any]) -> Any:
    """The data module that scvi-tools makes, as one of this package.

    Parameters
    ----------
    set_up
        scvi-tools' ``setup_annbatch``.
    name
        Name of the model's class.
    arguments
        Its arguments.
    """
    import zarr

    # scvi-tools chooses the decompression of all zarr stores that are opened from now on.
    pipeline = zarr.config.get("codec_pipeline.path")
    try:
        datamodule = set_up(**arguments)
    finally:
        zarr.config.set({"codec_pipeline.path": pipeline})
    if arguments.get("adatas") is None:
        # It names the class itself.
        datamodule.__class__ = CollectionDataModule
        path = arguments["collection_path"]
        datamodule.collection_path = f"./{name.lower()}_annbatch.zarr" if path is None else str(path)
    return datamodule


def genes_of_collection(path: str) -> list[str]:
    """Names of the genes of a collection, in the order of its columns.

    Parameters
    ----------
    path
        Path of the collection.
    """
    from anndata.io import read_elem

    return cast("pd.DataFrame", read_elem(_data_sets(path)[0]["var"])).index.astype(str).tolist()


def _data_sets(path: str) -> list[Any]:
    import zarr

    store = zarr.open_group(path, mode="r")
    names = sorted(store.group_keys(), key=lambda name: int(name.rsplit("_", 1)[-1]))
    return [store[name] for name in names]


def read_collection(path: str, layer: str | None = None) -> AnnData:
    """Cells of an annbatch collection: counts as an array of dask on disk, obs in memory.

    Parameters
    ----------
    path
        Path of the collection.
    layer
        Layer of the files that the counts of the collection come from, which they are then found in, too.
    """
    import dask.array as da
    from anndata.experimental import read_elem_lazy
    from anndata.io import read_elem

    groups = _data_sets(path)
    counts = da.concatenate([read_elem_lazy(group["X"]) for group in groups])
    return AnnData(
        X=counts,
        layers=None if layer is None else {layer: counts},
        obs=pd.concat([read_elem(group["obs"]) for group in groups]),
        var=cast("pd.DataFrame", read_elem(groups[0]["var"])),
    )


# Collections whose counts were checked, by identity, since an AnnData cannot be compared.
_collections: WeakValueDictionary[int, AnnData] = WeakValueDictionary()
_checked: set[int] = set()


def is_checked(adata: AnnData) -> bool:
    """True if the counts of a collection were checked before."""
    return _collections.get(id(adata)) is adata and id(adata) in _checked


def note_checked(adata: AnnData) -> None:
    """Remember that the counts of a collection were checked; other cells may change, and are checked again."""
    if _collections.get(id(adata)) is adata:
        _checked.add(id(adata))


def as_anndata(cells: Any) -> AnnData | None:
    """Cells that a method is given: an AnnData, None for the model's own, or the data module of a collection.

    Parameters
    ----------
    cells
        What was given.
    """
    if isinstance(cells, CollectionDataModule):
        return cells.adata
    check_is_anndata(cells)
    return cells


def minibatches_of_module(datamodule: Any) -> Iterable[Any]:
    """All cells of a data module, as the loader of a getter.

    Parameters
    ----------
    datamodule
        A loader, or a data module with ``inference_dataloader``.
    """
    is_module = isinstance(datamodule, LightningDataModule)
    return datamodule.inference_dataloader() if is_module else datamodule
