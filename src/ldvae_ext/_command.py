"""What the commands share: errors for users, files of cells, and the folder of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from anndata import AnnData, read_h5ad

from ldvae_ext._folder import FolderError, check_can_be_written
from ldvae_ext._validate import listed

_INPUTS = "give an .h5ad or .zarr of anndata, a .h5 of 10x Genomics, or a folder with matrix.mtx, features.tsv and barcodes.tsv"


class InputError(Exception):
    """Problem with the input that the user can solve, described in one sentence."""


def check_out(out: Path, *sources: Path | None, overwrite: bool) -> None:
    """Raise unless results can be put in a folder, which must not contain what is read.

    Parameters
    ----------
    out
        Absolute path of the folder.
    *sources
        Files that are read.
    overwrite
        True if a folder with results may be replaced.
    """
    try:
        check_can_be_written(out, overwrite=overwrite)
    except FolderError as error:
        msg = f"{error} Name another folder with --out."
        raise InputError(msg) from error
    kept = [Path.cwd(), Path.home(), *(source.absolute() for source in sources if source is not None)]
    inside = [path for path in kept if path.resolve().is_relative_to(out.resolve())]
    if inside:
        msg = f"{out} cannot be replaced, since it contains {inside[0]}; name another folder with --out."
        raise InputError(msg)


def read_h5ad_file(path: Path) -> AnnData:
    """The AnnData in a file, or an error that says what to do."""
    if not path.is_file():
        msg = f"There is no file {path}; give the path of an .h5ad file."
        raise InputError(msg)
    try:
        return read_h5ad(path)
    except Exception as error:
        msg = f"{path} cannot be read as an .h5ad file ({error}); write it with `adata.write_h5ad`."
        raise InputError(msg) from error


def read_cells(path: Path) -> AnnData:
    """Cells from an ``.h5ad`` or ``.zarr``, from a ``.h5`` of 10x Genomics, or from a folder with a ``matrix.mtx``."""
    if not path.exists():
        msg = f"There is no file {path}; {_INPUTS}."
        raise InputError(msg)
    is_matrix = path.is_dir() and path.suffix != ".zarr"
    if is_matrix and not any(path.glob("*matrix.mtx*")):
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".h5ad", ".zarr", ".h5"))
        msg = f"{path} is a folder without matrix.mtx; "
        raise InputError(msg + (f"give one of its files: {listed(files)}." if files else f"{_INPUTS}."))
    if not is_matrix and path.suffix not in (".zarr", ".h5", ".hdf5"):
        return read_h5ad_file(path)
    import anndata
    import scanpy as sc

    try:
        if path.suffix == ".zarr":
            return anndata.read_zarr(path)
        adata = sc.read_10x_mtx(path) if is_matrix else sc.read_10x_h5(path)
    except Exception as error:
        msg = f"{path} cannot be read ({error}); {_INPUTS}."
        raise InputError(msg) from error
    # Names of genes occur more than once in these files, and counts lie by columns.
    adata.var_names_make_unique()
    adata.X = adata.X.tocsr()
    return adata


def check_names(adata: AnnData) -> None:
    """Raise unless names of cells and of genes are unique."""
    for names, what in ((adata.obs_names, "cell"), (adata.var_names, "gene")):
        if not names.is_unique:
            msg = f"The {what} name {names[names.duplicated()][0]!r} occurs more than once; make {what} names unique first."
            raise InputError(msg)


def read_as_native_float(adata: AnnData, layer: str | None) -> None:
    """Convert float16 and the other byte order, which scanpy's selection of genes cannot read."""
    counts = adata.X if layer is None else adata.layers.get(layer)
    if isinstance(counts, np.ndarray) and (counts.dtype == np.float16 or not counts.dtype.isnative):
        counts = counts.astype(np.float32)
        if layer is None:
            adata.X = counts
        else:
            adata.layers[layer] = counts


@contextmanager
def data_errors_as_input_errors() -> Iterator[None]:
    """Raise errors of the package about the data as InputError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(str(error.args[0] if error.args else error)) from error
