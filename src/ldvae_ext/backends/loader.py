"""Data loaders whose minibatches hold sparse counts, gathered without making them dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS, settings
from scvi.data import AnnDataManager
from scvi.dataloaders import AnnDataLoader, DataSplitter
from torch.utils.data import DataLoader, Dataset, Sampler

from ldvae_ext._scvi import registry_key_to_default_dtype
from ldvae_ext.backends.counts import Counts, csr_tensor
from ldvae_ext.core.rows import ReadRows, RowReader, Rows


class CountsDataset(Dataset):
    """Cells of an AnnData, a minibatch at a time: counts as a CSR tensor, other fields as scvi-tools loads them.

    Parameters
    ----------
    source
        Manager of the AnnData, or values of the fields by the keys of scvi-tools' registry.
    indices
        Positions of the cells.
    sorts
        True to sort the cells of each minibatch by position in the AnnData.
    """

    def __init__(self, source: AnnDataManager | dict[str, Any], indices: np.ndarray, *, sorts: bool = False) -> None:
        self.indices, self._sorts = indices, sorts
        values = dict(source) if isinstance(source, dict) else _fields(source)
        self._reader = RowReader(values.pop(REGISTRY_KEYS.X_KEY))
        self._counts: Rows = self._reader
        self._others = {
            key: _in_memory(value).astype(registry_key_to_default_dtype(key), copy=False)
            for key, value in values.items()
            if not isinstance(value, str)
        }

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        rows = np.sort(self.indices[positions]) if self._sorts else self.indices[positions]
        # Counts first, as in scvi-tools: Lightning takes the number of cells from the first value.
        return {REGISTRY_KEYS.X_KEY: self._rows(rows), **{key: value[rows] for key, value in self._others.items()}}

    @property
    def n_ahead(self) -> int | None:
        """Number of cells whose counts should be read before they are needed; None if counts are in memory."""
        return None if self._reader.is_in_memory else self._reader.n_ahead

    def read_ahead(self, positions: np.ndarray) -> None:
        """Read the counts of the next cells, in one go, in place of those that were read before.

        Parameters
        ----------
        positions
            Positions among the cells of the data set; with none, memory is freed.
        """
        self._counts = self._reader  # frees what was read before
        if len(positions):
            self._counts = ReadRows(self._reader, self.indices[positions])

    def _rows(self, rows: np.ndarray) -> torch.Tensor:
        chosen = self._counts.take(rows)
        if not sparse.issparse(chosen):
            # scipy reads neither float16 nor the other byte order.
            chosen = sparse.csr_array(np.asarray(chosen, dtype=np.float32))
        elif self.n_ahead is not None and not chosen.has_canonical_format:
            # A file may hold the genes of a cell in any order, and a count in parts.
            chosen.sum_duplicates()
        indices = chosen.indptr.astype(np.int64), chosen.indices.astype(np.int64)
        return csr_tensor(*indices, chosen.data.astype(np.float32, copy=False), chosen.shape)


def _fields(manager: AnnDataManager) -> dict[str, Any]:
    return {key: manager.get_from_registry(key) for key in manager.data_registry}


def _in_memory(value: Any) -> np.ndarray:
    return value.to_numpy() if isinstance(value, pd.DataFrame) else value


class ChunkSampler(Sampler):
    """Positions of the cells of each minibatch, the same as from torch's samplers, which list them one by one.

    Parameters
    ----------
    n_cells, batch_size
        Sizes.
    shuffle, drop_last
        As in torch; shuffling draws the same random numbers as ``RandomSampler``.
    dataset
        Cells whose counts are read ahead, many minibatches at once, if they are not in memory.
    """

    def __init__(
        self,
        n_cells: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        dataset: CountsDataset | None = None,
    ) -> None:
        self._n_cells, self._batch_size, self._shuffle = n_cells, batch_size, shuffle
        self._dataset = dataset
        self._stop = n_cells // batch_size * batch_size if drop_last else n_cells

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.arange(self._n_cells)
        if self._shuffle:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
            order = torch.randperm(self._n_cells, generator=generator).numpy()
        n_ahead = None if self._dataset is None else self._dataset.n_ahead
        if self._dataset is None or n_ahead is None:
            yield from self._minibatches(order[: self._stop])
            return
        n_ahead = max(1, n_ahead // self._batch_size) * self._batch_size
        try:
            for start in range(0, self._stop, n_ahead):
                ahead = order[start : min(start + n_ahead, self._stop)]
                self._dataset.read_ahead(ahead)
                yield from self._minibatches(ahead)
        finally:
            self._dataset.read_ahead(order[:0])

    def _minibatches(self, order: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def __len__(self) -> int:
        return -(-self._stop // self._batch_size)


class CountsLoader(DataLoader):
    """Minibatches of :class:`CountsDataset`: the same cells in the same order as from ``scvi.dataloaders.AnnDataLoader``.

    Parameters
    ----------
    source
        Manager of the AnnData, or values of the fields by the keys of scvi-tools' registry.
    indices
        Positions of the cells, or a mask; all if None.
    batch_size, shuffle, drop_last
        As in scvi-tools.
    generator
        Generator of the seed that torch's loader draws even if it does not shuffle; the global one if None.
    sorts
        True to sort the cells of each minibatch by position, as scvi-tools does for a backed AnnData.
    """

    def __init__(
        self,
        source: AnnDataManager | dict[str, Any],
        indices: Any = None,
        batch_size: int = 128,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        *,
        sorts: bool = False,
    ) -> None:
        if indices is None:
            counts = source[REGISTRY_KEYS.X_KEY] if isinstance(source, dict) else source.adata
            indices = np.arange(counts.shape[0])
        self.indices = np.asarray(indices)
        if self.indices.dtype == bool:
            self.indices = np.flatnonzero(self.indices)
        dataset = CountsDataset(source, self.indices, sorts=sorts)
        sampler = ChunkSampler(len(dataset), batch_size, shuffle=shuffle, drop_last=drop_last, dataset=dataset)
        super().__init__(dataset, batch_size=None, sampler=sampler, generator=generator)


def can_gather(manager: AnnDataManager) -> bool:
    """True if the data of an AnnData have a form that :class:`CountsDataset` reads."""
    if manager.adata is None:
        return False
    values = _fields(manager)
    counts: Any = values.pop(REGISTRY_KEYS.X_KEY)
    if any(not isinstance(value, (np.ndarray, pd.DataFrame, str)) for value in values.values()):
        return False
    if isinstance(counts, np.ndarray):
        return counts.dtype.kind in "iuf"
    if not sparse.issparse(counts):  # on disk or of dask
        return getattr(getattr(counts, "dtype", None), "kind", "O") in "iufb" and can_read_rows(manager)
    # Rows of another format are slow to take, and duplicate entries of a matrix would have to be summed.
    return (
        sparse.issparse(counts)
        and counts.format == "csr"
        and counts.has_canonical_format
        and counts.dtype.kind in "iuf"
    )


def can_read_rows(manager: AnnDataManager) -> bool:
    """False for a CSC matrix on disk."""
    counts: Any = None if manager.adata is None else manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    return sparse.issparse(counts) or getattr(counts, "format", "csr") == "csr"


def _check_rows(manager: AnnDataManager) -> None:
    if not can_read_rows(manager):
        msg = (
            "The counts of `adata` are a CSC matrix on disk, of which no rows can be read; write them by rows, as "
            "`adata.X.to_memory().tocsr()`."
        )
        raise ValueError(msg)


def counts_loader(
    manager: AnnDataManager,
    indices: Any = None,
    batch_size: int = 128,
    shuffle: bool = False,
    drop_last: bool = False,
    pin_memory: bool = False,
    load_sparse_tensor: bool = False,
    distributed_sampler: bool = False,
    **kwargs: Any,
) -> DataLoader:
    """A loader of sparse counts if :func:`can_gather` is True, scvi-tools' own otherwise.

    Parameters
    ----------
    manager, indices, batch_size, shuffle, drop_last, pin_memory, load_sparse_tensor, distributed_sampler, **kwargs
        As in ``scvi.dataloaders.AnnDataLoader``.
    """
    _check_rows(manager)
    needs_scvi = pin_memory or load_sparse_tensor or distributed_sampler or kwargs or settings.dl_num_workers > 0
    if needs_scvi or not can_gather(manager):
        return AnnDataLoader(
            manager,
            indices=indices,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            pin_memory=pin_memory,
            load_sparse_tensor=load_sparse_tensor,
            distributed_sampler=distributed_sampler,
            **kwargs,
        )
    return CountsLoader(manager, indices, batch_size, shuffle, drop_last, sorts=manager.adata.isbacked)


class DenseMinibatches:
    """Minibatches whose counts are dense, as scvi-tools' own networks take them.

    Parameters
    ----------
    loader
        Minibatches with sparse counts.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for tensors in self._loader:
            yield tensors | {REGISTRY_KEYS.X_KEY: Counts.of(tensors[REGISTRY_KEYS.X_KEY]).dense()}


def check_in_order(manager: AnnDataManager, options: dict[str, Any] | None) -> None:
    """Raise unless cells of a backed AnnData can be read in the order that was requested.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    options
        Arguments for scvi-tools' data loader, which sorts the cells of each minibatch.
    """
    if options:
        msg = (
            f"Cells of a backed AnnData are read by a loader that takes no options; got {', '.join(sorted(options))}. scvi-tools' "
            "loader sorts the cells of each minibatch."
        )
        raise ValueError(msg)
    _check_rows(manager)


def loader_of_getters(
    manager: AnnDataManager, shuffle: bool = False, indices: Any = None, batch_size: int = 128, **kwargs: Any
) -> AnnDataLoader | DenseMinibatches:
    """Minibatches of scvi-tools' getters, in the order of the indices.

    scvi-tools sorts the cells of each minibatch of a backed AnnData, so that results are not in the order that was requested.

    Parameters
    ----------
    manager, shuffle, indices, batch_size, **kwargs
        As in ``scvi.dataloaders.AnnDataLoader``.
    """
    if manager.adata.isbacked:
        # scvi-tools adds settings of workers, which would read the same cells.
        given = {k: v for k, v in kwargs.items() if k not in ("num_workers", "persistent_workers", "generator")}
        check_in_order(manager, {**given, "shuffle": True} if shuffle else given)
        return DenseMinibatches(CountsLoader(manager, indices, batch_size, generator=kwargs.get("generator")))
    return AnnDataLoader(manager, shuffle=shuffle, indices=indices, batch_size=batch_size, **kwargs)


class CountsSplitter(DataSplitter):
    """``scvi.dataloaders.DataSplitter`` whose loaders gather sparse counts."""

    data_loader_cls = staticmethod(counts_loader)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As in scvi-tools; minibatches on a CPU are returned as they are.

        Parameters
        ----------
        batch, device, dataloader_idx
            As in lightning.
        """
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)


# scvi-tools checks early stopping against the cells only for splitters of this name.
CountsSplitter.__name__ = DataSplitter.__name__
