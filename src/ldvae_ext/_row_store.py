"""Results with a row for each cell, written to zarr while they are computed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ldvae_ext._files import completing, temporary_folder
from ldvae_ext._folder import check_anndata_can_be_written

# Rows of a chunk of zarr.
_CHUNK = 16_384


class HeldRows:
    """Arrays whose rows come in parts and are kept in memory."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, rows: np.ndarray) -> None:
        """Append rows to an array.

        Parameters
        ----------
        name
            Name of the array.
        rows
            Rows, shape (cells, ...).
        """
        self._parts.setdefault(name, []).append(rows)

    def array(self, name: str) -> np.ndarray:
        """All rows of an array.

        Parameters
        ----------
        name
            Name of the array.
        """
        return np.concatenate(self._parts[name])

    def __contains__(self, name: str) -> bool:
        return name in self._parts


class RowStore:
    """Arrays whose rows come in parts and are kept on disk.

    Parameters
    ----------
    path
        Folder that the result becomes, a zarr store of an AnnData.
    work
        Temporary folder beside it.
    """

    def __init__(self, path: Path, work: Path) -> None:
        self._path, self._work = path, work
        self._arrays: dict[str, Any] = {}
        self._pending: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, rows: np.ndarray) -> None:
        """Append rows to an array.

        Parameters
        ----------
        name
            Name of the array.
        rows
            Rows, shape (cells, ...).
        """
        pending = self._pending.setdefault(name, [])
        pending.append(np.asarray(rows))
        if sum(map(len, pending)) >= _CHUNK:
            together = np.concatenate(pending)
            whole = len(together) // _CHUNK * _CHUNK
            self._append(name, together[:whole])
            self._pending[name] = [together[whole:]]

    def _append(self, name: str, rows: np.ndarray) -> None:
        import zarr

        if name not in self._arrays:
            self._arrays[name] = zarr.create_array(
                self._work / name, shape=(0, *rows.shape[1:]), chunks=(_CHUNK, *rows.shape[1:]), dtype=rows.dtype
            )
        self._arrays[name].append(rows)

    def array(self, name: str) -> Any:
        """All rows of an array, as an array of dask.

        Parameters
        ----------
        name
            Name of the array.
        """
        import dask.array as da

        pending = self._pending.pop(name, [])
        if pending and (len(last := np.concatenate(pending)) or name not in self._arrays):
            self._append(name, last)
        return da.from_zarr(self._arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self._arrays or name in self._pending

    def write(self, result: AnnData) -> AnnData:
        """Write an AnnData with arrays of dask to the path; it is there when it is complete.

        Parameters
        ----------
        result
            The AnnData.

        Returns
        -------
        The same with ``X`` and ``obsm`` as arrays of dask that read what was written.
        """
        import dask.array as da

        with completing(self._path) as folder:
            result.write_zarr(folder)
        for name in result.obsm:
            result.obsm[name] = da.from_zarr(str(self._path), component=f"obsm/{name}")
        if result.X is not None:
            result.X = da.from_zarr(str(self._path), component="X")
        return result


def table_of_cells(
    parts: Iterable[np.ndarray],
    *,
    obs: pd.DataFrame | None,
    var: pd.DataFrame,
    uns: dict[str, Any],
    store: str | Path | None,
) -> AnnData:
    """An AnnData with a row for each cell, in memory or on disk.

    Parameters
    ----------
    parts
        Parts of ``X``, cells x columns.
    obs, var, uns
        As in AnnData.
    store
        Folder to write it to; in memory if None.
    """
    if store is None:
        rows = list(parts)
        return AnnData(X=np.concatenate(rows) if rows else np.empty((0, len(var))), obs=obs, var=var, uns=uns)
    with row_store(store) as on_disk:
        on_disk.add("X", np.empty((0, len(var))))
        for part in parts:
            on_disk.add("X", part)
        return on_disk.write(AnnData(X=on_disk.array("X"), obs=obs, var=var, uns=uns))


@contextmanager
def row_store(store: str | Path) -> Iterator[RowStore]:
    """A store at a path that is not there yet, and temporary files beside it until the end of the context.

    Parameters
    ----------
    store
        Path of the folder.

    Raises
    ------
    ImportError
        Without dask or zarr.
    FileExistsError, FileNotFoundError
        If the path is there, or its folder is not.
    """
    path = check_store(store)
    work = temporary_folder(path.parent)
    try:
        yield RowStore(path, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_store(store: str | Path, obs: pd.DataFrame | None = None) -> Path:
    """The path of a result on disk, or an error before any work.

    Parameters
    ----------
    store
        Path of the folder.
    obs
        Table of the cells that will be written; its first rows are tried.
    """
    try:
        import dask.array  # noqa: F401
        import zarr  # noqa: F401
    except ImportError as error:
        msg = f"`store` needs {error.name}, which comes with `pip install 'ldvae-ext[large]'`."
        raise ImportError(msg) from error
    if not isinstance(store, (str, Path)):
        msg = f"`store` must be the path of a folder; got {store!r}."
        raise TypeError(msg)
    path = Path(store).absolute()
    if path.exists():
        msg = f"`store`: {store} exists; remove it, or choose another path."
        raise FileExistsError(msg)
    if not path.parent.is_dir():
        msg = f"`store`: there is no folder {path.parent}."
        raise FileNotFoundError(msg)
    if obs is not None:
        check_anndata_can_be_written(AnnData(obs=obs.iloc[:1000].copy()))
    return path
