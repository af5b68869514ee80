"""Mutated files: a right result or an error that says what is wrong; no crash, no code that runs, no traceback of a command.

Mutations are drawn from a seed, and their number is fixed. The files are small, so that all of it takes seconds.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
import zipfile
from functools import cache

import anndata as ad
import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from ldvae_ext import _run_command, get
from ldvae_ext._command import InputError
from ldvae_ext.cli import app
from ldvae_ext.core import LinearDecoder
from tests.core.decoders import full_decoder
from tests.helpers import counts, untrained

# What the documentation of these functions names.
DOCUMENTED = (ValueError, KeyError, TypeError, OSError)


class Harmful:
    """A pickle that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def assert_documented(error, *fragments):
    """The error is of a documented class, and its message has more than a key or a number."""
    assert isinstance(error, DOCUMENTED), repr(error)
    assert len(str(error).split()) > 4, repr(error)
    assert all(fragment in str(error) for fragment in fragments), repr(error)


def assert_right(decoder):
    """The decoder decodes."""
    values = {name: level if isinstance(level, float) else level[0] for name, level in _levels(decoder).items()}
    scale = decoder.scale(np.zeros((2, len(decoder.factors))), decoder.batches[0], values or None)
    np.testing.assert_allclose(scale.sum(axis=1), 1)


def _levels(decoder):
    return {c.name: 0.0 if c.levels is None else c.levels for c in decoder.covariates}


def saved_bytes(decoder):
    file = io.BytesIO()
    np.savez_compressed(file, **decoder.to_arrays())
    return file.getvalue()


def flipped(content, rng):
    changed = bytearray(content)
    for at in rng.integers(len(content), size=rng.integers(1, 4)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def cut(content, rng):
    return content[: rng.integers(len(content))]


def repeated(content, rng):
    """A part of the file once more in the middle."""
    first, last = np.sort(rng.integers(len(content), size=2))
    return content[:last] + content[first:]


# Values that are no decoder's, for any array.
STRANGE = (
    np.array([]), np.array(np.nan), np.array("text"), np.array(["a", "a"]), np.array(-(2**63)), np.array([[1j]]),
    np.zeros((2, 3, 4)), np.array(["\x00", "../../etc"]), np.array(b"\xff"), np.array(True), np.float16(np.inf),
)  # fmt: skip


def exchanged(arrays, rng):
    """Two arrays under each other's names."""
    a, b = rng.choice(sorted(arrays), 2, replace=False)
    return {**arrays, a: arrays[b], b: arrays[a]}


def replaced(arrays, rng):
    return {**arrays, str(rng.choice(sorted(arrays))): STRANGE[rng.integers(len(STRANGE))]}


def dropped(arrays, rng):
    return {name: value for name, value in arrays.items() if name != rng.choice(sorted(arrays))}


def reshaped(arrays, rng):
    name = str(rng.choice(sorted(arrays)))
    value = np.atleast_1d(arrays[name])
    return {**arrays, name: [value[:-1], value[None], np.repeat(value, 2, axis=0), value.T][rng.integers(4)]}


def spoilt(arrays, rng):
    """One number is NaN, infinite, negative or huge."""
    name = str(rng.choice([name for name, value in arrays.items() if np.asarray(value).dtype.kind == "f"]))
    value = np.array(arrays[name], dtype=np.float64)
    value.flat[rng.integers(value.size)] = rng.choice([np.nan, np.inf, -1.0, 1e308])
    return {**arrays, name: value}


@pytest.mark.parametrize("mutate", [flipped, cut, repeated])
def test_damaged_bytes_of_a_decoder(tmp_path, mutate):
    whole, path, rng = saved_bytes(full_decoder()), tmp_path / "decoder.npz", np.random.default_rng(0)
    n_refused = 0
    for _ in range(60):
        path.write_bytes(mutate(whole, rng))
        try:
            decoder = LinearDecoder.load(path)
        except DOCUMENTED as error:
            assert_documented(error, str(path))
            n_refused += 1
        else:
            assert_right(decoder)
    assert n_refused > 20


@pytest.mark.parametrize("mutate", [exchanged, replaced, dropped, reshaped, spoilt])
@pytest.mark.parametrize("changes", [{}, {"likelihood": "nb", "dispersion": "gene-batch", "covariates": ()}], ids=["full", "plain"])  # fmt: skip
def test_damaged_arrays_of_a_decoder(tmp_path, mutate, changes):
    arrays, path, rng = full_decoder(**changes).to_arrays(), tmp_path / "decoder.npz", np.random.default_rng(0)
    n_refused = 0
    for _ in range(50):
        np.savez(path, **mutate(arrays, rng))
        try:
            with np.errstate(over="ignore"):
                decoder = LinearDecoder.load(path)
        except DOCUMENTED as error:
            assert_documented(error, str(path))
            n_refused += 1
        else:
            if mutate is not spoilt:  # a weight of 1e308 is a number, but not one that decodes
                assert_right(decoder)
    assert n_refused > 3


def test_no_code_of_a_decoder_runs(tmp_path):
    path, harm = tmp_path / "decoder.npz", tmp_path / "harm"
    arrays = full_decoder().to_arrays()
    for name in arrays:
        np.savez(path, **{**arrays, name: np.array([Harmful(harm)], dtype=object)})
        with pytest.raises(ValueError, match=r"decoder\.npz.*allow_pickle=False"):
            LinearDecoder.load(path)
    for content in (pickle.dumps(Harmful(harm)), b"\x93NUMPY\x01\x00" + pickle.dumps(Harmful(harm))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"decoder\.npz"):
            LinearDecoder.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../harm.npy", b"not an array")
    with pytest.raises(ValueError, match=r"decoder\.npz"):
        LinearDecoder.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["decoder.npz"]


@cache
def exported():
    adata = counts(40, 12, 2)
    model = untrained(adata, 2, n_hidden=8)
    model.export_to_anndata()
    return adata


@pytest.fixture
def h5ad(tmp_path):
    path = tmp_path / "cells.h5ad"
    exported().write_h5ad(path)
    return path


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ad.read_h5ad(path)


def test_an_export_that_is_cut_is_no_file_of_anndata(h5ad):
    """anndata refuses it, or reads what is complete; the decoder then is complete, too."""
    whole, rng = h5ad.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        h5ad.write_bytes(cut(whole, rng))
        try:
            adata = read(h5ad)
        except Exception:  # noqa: BLE001 - of h5py or anndata
            continue
        try:
            assert_right(get.decoder(adata))
        except DOCUMENTED as error:
            assert_documented(error)


def spoil_entry(group, rng):
    """Remove an entry of a group of HDF5, or put a strange value in its place."""
    names = []
    group.visititems(
        lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) or rng.random() < 0.3 else None
    )
    name = str(rng.choice(names))
    attributes = {"encoding-type": "array", "encoding-version": "0.2.0"}
    del group[name]
    kind = rng.integers(3)
    if kind == 0:
        return
    value = STRANGE[rng.integers(len(STRANGE))]
    if value.dtype.kind == "U":
        value, attributes["encoding-type"] = (
            np.array([v.replace("\0", "") for v in value.ravel()], dtype=object),
            "string-array",
        )
        group.create_dataset(name, data=value, dtype=h5py.string_dtype())
    else:
        group.create_dataset(name, data=value)
    if kind == 1:
        group[name].attrs.update(attributes)


def test_a_damaged_description_of_an_export(tmp_path, h5ad):
    rng, path, n_refused = np.random.default_rng(0), tmp_path / "spoilt.h5ad", 0
    readers = (get.decoder, get.factors, get.loadings, get.gene_scores, get.top_genes)
    for _ in range(100):
        shutil.copy(h5ad, path)
        with h5py.File(path, "a") as file:
            spoil_entry(file["uns"]["ldvae"], rng)
        try:
            adata = read(path)
        except Exception:  # noqa: BLE001 - of anndata
            continue
        for reader in readers:
            try:
                with np.errstate(all="ignore"):
                    reader(adata)
            except DOCUMENTED as error:
                assert_documented(error)
                n_refused += 1
    assert n_refused > 50


def spoil_cells(file, rng):
    """Damage counts, names or columns of a file of cells."""
    kind = rng.integers(8)
    data, indices, indptr = (file["X"][part] for part in ("data", "indices", "indptr"))
    at = rng.integers(len(data))
    if kind == 0:
        data[at] = rng.choice([np.nan, np.inf, -1.0, 1e30])
    elif kind == 1:
        indices[at] = rng.choice([-1, 10**6, 12])
    elif kind == 2:
        indptr[rng.integers(1, len(indptr))] = rng.choice([-5, 10**6])
    elif kind == 3:
        file["X"].attrs["shape"] = rng.choice([[40, 3], [10**6, 12], [0, 0]])
    elif kind == 4:
        del file[str(rng.choice(["X", "X/data", "obs", "var", "obs/_index", "var/_index", "uns"]))]
    elif kind == 5:
        file["X"].attrs["encoding-type"] = str(rng.choice(["array", "csc_matrix", "nonsense"]))
    elif kind == 6:
        names = file["var/_index"]
        names = names if isinstance(names, h5py.Dataset) else names["values"]
        names[rng.integers(12)] = str(rng.choice(["gene0", "", "<b>$x$", "../../etc/passwd"]))
    else:
        spoil_entry(file["obs"], rng)


def invoke(*arguments):
    """Exit code, and the lines of an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, [line for line in result.output.splitlines() if line.startswith("Error: ")]


def assert_one_line(found):
    code, lines = found
    assert code in (0, 1)
    assert len(lines) == code
    assert all(len(line.split()) > 5 for line in lines), lines


def test_the_command_run_with_damaged_cells(tmp_path, h5ad, monkeypatch):
    def stop(*_args, **_kwargs):
        msg = "The data are right, and nothing is trained in this test."
        raise InputError(msg)

    for name in ("_rehearse", "train_and_export"):
        monkeypatch.setattr(_run_command, name, stop)
    rng, path = np.random.default_rng(0), tmp_path / "spoilt.h5ad"
    for _ in range(40):
        shutil.copy(h5ad, path)
        with h5py.File(path, "a") as file:
            spoil_cells(file, rng)
        assert_one_line(invoke("run", path, "--batch-key", "batch", "--out", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_the_command_project_with_damaged_files(tmp_path, h5ad):
    rng, cells, reference = np.random.default_rng(0), tmp_path / "cells2.h5ad", tmp_path / "reference.h5ad"
    n_right = 0
    for i in range(40):
        for path in (cells, reference):
            shutil.copy(h5ad, path)
        if i % 4 == 0:
            reference.write_bytes(cut(h5ad.read_bytes(), rng))
        else:
            with h5py.File(cells if i % 2 else reference, "a") as file:
                spoil_cells(file, rng) if i % 2 else spoil_entry(file["uns"]["ldvae"], rng)
        found = invoke("project", cells, "--reference", reference, "--out", tmp_path / "out", "--overwrite")
        assert_one_line(found)
        n_right += found[0] == 0
        assert found[0] == 0 or n_right or not (tmp_path / "out").exists()
    assert n_right < 40
