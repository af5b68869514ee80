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
from ldvae_ext.backends.counts import csr_tensor


class CountsDataset(Dataset):
    """Cells of an AnnData, a minibatch at a time: counts as a CSR tensor, other fields as scvi-tools loads them.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    indices
        Positions of the cells.
    """

    def __init__(self, manager: AnnDataManager, indices: np.ndarray) -> None:
        self.indices = indices
        values = {key: manager.get_from_registry(key) for key in manager.data_registry}
        self._counts = values.pop(REGISTRY_KEYS.X_KEY)
        self._others = {
            key: _in_memory(value).astype(registry_key_to_default_dtype(key), copy=False)
            for key, value in values.items()
            if not isinstance(value, str)
        }

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        rows = self.indices[positions]
        # Counts first, as in scvi-tools: Lightning takes the number of cells from the first value.
        return {REGISTRY_KEYS.X_KEY: self._rows(rows), **{key: value[rows] for key, value in self._others.items()}}

    def _rows(self, rows: np.ndarray) -> torch.Tensor:
        chosen = self._counts[rows]
        if not sparse.issparse(chosen):
            # scipy reads neither float16 nor the other byte order.
            chosen = sparse.csr_array(np.asarray(chosen, dtype=np.float32))
        indices = chosen.indptr.astype(np.int64), chosen.indices.astype(np.int64)
        return csr_tensor(*indices, chosen.data.astype(np.float32, copy=False), chosen.shape)


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
    """

    def __init__(self, n_cells: int, batch_size: int, *, shuffle: bool, drop_last: bool) -> None:
        self._n_cells, self._batch_size, self._shuffle = n_cells, batch_size, shuffle
        self._stop = n_cells // batch_size * batch_size if drop_last else n_cells

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.arange(self._n_cells)
        if self._shuffle:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
            order = torch.randperm(self._n_cells, generator=generator).numpy()
        for start in range(0, self._stop, self._batch_size):
            yield order[start : start + self._batch_size]

    def __len__(self) -> int:
        return -(-self._stop // self._batch_size)


class CountsLoader(DataLoader):
    """Minibatches of :class:`CountsDataset`: the same cells in the same order as from ``scvi.dataloaders.AnnDataLoader``.

    Parameters
    ----------
    manager
        Manager of the AnnData.
    indices
        Positions of the cells, or a mask; all if None.
    batch_size, shuffle, drop_last
        As in scvi-tools.
    generator
        Generator of the seed that torch's loader draws even if it does not shuffle; the global one if None.
    """

    def __init__(
        self,
        manager: AnnDataManager,
        indices: Any = None,
        batch_size: int = 128,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.indices = np.arange(manager.adata.n_obs) if indices is None else np.asarray(indices)
        if self.indices.dtype == bool:
            self.indices = np.flatnonzero(self.indices)
        dataset = CountsDataset(manager, self.indices)
        sampler = ChunkSampler(len(dataset), batch_size, shuffle=shuffle, drop_last=drop_last)
        super().__init__(dataset, batch_size=None, sampler=sampler, generator=generator)


def can_gather(manager: AnnDataManager) -> bool:
    """True if the data of an AnnData are in memory in a form that :class:`CountsDataset` reads."""
    if manager.adata is None or manager.adata.isbacked:
        return False
    values = {key: manager.get_from_registry(key) for key in manager.data_registry}
    counts: Any = values.pop(REGISTRY_KEYS.X_KEY)
    if any(not isinstance(value, (np.ndarray, pd.DataFrame, str)) for value in values.values()):
        return False
    if isinstance(counts, np.ndarray):
        return counts.dtype.kind in "iuf"
    # Rows of another format are slow to take, and duplicate entries of a matrix would have to be summed.
    return (
        sparse.issparse(counts)
        and counts.format == "csr"
        and counts.has_canonical_format
        and counts.dtype.kind in "iuf"
    )


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
    return CountsLoader(manager, indices, batch_size, shuffle, drop_last)


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
