from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ldvae_ext.core import rows as module
from ldvae_ext.core.rows import ReadRows, RowReader, row_chunks

N, G = 500, 7


def matrix(dtype=np.float32):
    x = np.random.default_rng(0).poisson(0.4, (N, G)).astype(dtype)
    x[100:140] = 0  # rows without a value
    return x


def on_disk(folder, values, library):
    if library == "h5":
        group = h5py.File(folder / "x.h5", "w")
    else:
        group = pytest.importorskip("zarr").open_group(folder / "x.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "X", values)
    return ad.io.sparse_dataset(group["X"]) if sparse.issparse(values) else group["X"]


def unsorted(values):
    out = sparse.csr_matrix(values)
    for start, stop in zip(out.indptr[:-1], out.indptr[1:], strict=True):
        out.indices[start:stop], out.data[start:stop] = out.indices[start:stop][::-1], out.data[start:stop][::-1]
    out.has_sorted_indices = False
    return out


KINDS = {
    "array": lambda x, folder: x,
    "frame": lambda x, folder: pd.DataFrame(x),
    "csr": lambda x, folder: sparse.csr_matrix(x),
    "csc": lambda x, folder: sparse.csc_array(x),
    "h5 csr": lambda x, folder: on_disk(folder, sparse.csr_matrix(x), "h5"),
    "h5 unsorted": lambda x, folder: on_disk(folder, unsorted(x), "h5"),
    "h5 dense": lambda x, folder: on_disk(folder, x, "h5"),
    "zarr csr": lambda x, folder: on_disk(folder, sparse.csr_matrix(x), "zarr"),
    "zarr dense": lambda x, folder: on_disk(folder, x, "zarr"),
    "dask": lambda x, folder: pytest.importorskip("dask.array").from_array(x, chunks=(60, G)),
    "dask csr": lambda x, folder: (
        pytest.importorskip("dask.array").from_array(x, chunks=(60, G)).map_blocks(sparse.csr_matrix)
    ),
}
ROWS = {
    "run": np.arange(20, 90),
    "all": np.arange(N),
    "scattered": np.array([3, 4, 5, 200, 201, 399, 499]),
    "in any order": np.random.default_rng(1).permutation(N)[:150],
    "repeated": np.array([9, 9, 2, 400, 2]),
    "none": np.array([], dtype=np.int64),
}


def dense(x):
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [0, 40, 10**9])
def test_rows_are_those_of_the_matrix(monkeypatch, tmp_path, kind, rows, gap):
    # Parts of a file with and without other rows between, and with a border in the middle of the rows.
    for name, size in (("_GAP_BYTES", gap), ("_GAP_BYTES_OF_ZARR", gap), ("_SPAN_BYTES", 640)):
        monkeypatch.setattr(module, name, size)
    x = matrix()
    reader = RowReader(KINDS[kind](x, tmp_path))
    found = reader.take(ROWS[rows])
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(dense(found), x[ROWS[rows]])
    assert sparse.issparse(found) == (("csr" in kind) or kind in ("csc", "h5 unsorted"))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_read_ahead_and_are_those_of_the_matrix(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(module, "READ_AHEAD_BYTES", 2000)
    x = matrix()
    rows = ROWS["in any order"]
    chunks = [dense(chunk) for chunk in row_chunks(KINDS[kind](x, tmp_path), rows, 16)]
    assert [len(chunk) for chunk in chunks] == [16] * 9 + [6]
    np.testing.assert_array_equal(np.concatenate(chunks), x[rows])


@pytest.mark.parametrize("kind", ["h5 csr", "h5 dense", "zarr csr", "zarr dense"])
def test_neighbours_are_read_together(monkeypatch, tmp_path, kind):
    on_file = KINDS[kind](matrix(), tmp_path)
    parts = []

    def spans(*args):
        parts.append(original(*args))
        return parts[-1]

    original = module._spans
    monkeypatch.setattr(module, "_spans", spans)
    RowReader(on_file).take(np.arange(0, N, 2))
    assert [len(found) for found in parts] == [1]
    for name in ("_GAP_BYTES", "_GAP_BYTES_OF_ZARR"):
        monkeypatch.setattr(module, name, 0)
    RowReader(on_file).take(np.array([0, 1, 2, 300, 301]))
    assert len(parts[-1]) == 2


def test_rows_that_were_not_read_ahead_are_read(tmp_path):
    x = matrix()
    reader = RowReader(KINDS["h5 csr"](x, tmp_path))
    ahead = ReadRows(reader, np.arange(10, 50))
    np.testing.assert_array_equal(dense(ahead.take(np.array([49, 10, 10]))), x[[49, 10, 10]])
    np.testing.assert_array_equal(dense(ahead.take(np.array([49, 51, 3]))), x[[49, 51, 3]])
