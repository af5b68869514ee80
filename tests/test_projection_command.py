"""``ldvae-ext project``: cells scored with the factors of a reference, from a shell."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from ldvae_ext import get, tl
from ldvae_ext.cli import app
from tests.helpers import counts, untrained


def invoke(*arguments):
    return CliRunner().invoke(app, ["project", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    adata = counts(n_cells=40, n_batches=2)
    query = ad.AnnData(adata.X.copy(), obs=adata.obs[["batch"]].copy(), var=pd.DataFrame(index=adata.var_names))
    untrained(adata, use_observed_lib_size=True).export_to_anndata(use_posterior="refined")
    adata.write_h5ad(tmp_path / "reference.h5ad")
    query.write_h5ad(tmp_path / "query.h5ad")
    get.decoder(adata).save(tmp_path / "decoder.npz")
    return tmp_path


def test_the_result_is_that_of_the_function(files):
    result = invoke(files / "query.h5ad", "--reference", files / "reference.h5ad", "--out", files / "out")
    assert result.exit_code == 0, result.output
    expected = ad.read_h5ad(files / "query.h5ad")
    tl.project(expected, ad.read_h5ad(files / "reference.h5ad"))
    got = ad.read_h5ad(files / "out" / "adata.h5ad")
    np.testing.assert_array_equal(got.obsm["X_ldvae"], expected.obsm["X_ldvae"])
    cells = pd.read_csv(files / "out" / "tables" / "cells.csv", index_col=0)
    assert cells.columns.tolist() == [*get.factors(expected).index, "ldvae_fit"]
    np.testing.assert_allclose(cells["ldvae_fit"], expected.obs["ldvae_fit"], rtol=1e-4)
    assert "40 cells, 20 of 20 genes of the reference, 4 factors" in result.output
    assert "in 90 % of the reference's cells" in result.output
    # Only its own results are replaced, and only if that is asked for.
    again = (files / "query.h5ad", "--reference", files / "decoder.npz", "--out", files / "out", "--batch", "mean")
    assert "use --overwrite" in invoke(*again).output
    assert invoke(*again, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("query", "reference", "arguments", "message"),
    [
        ("nothing.h5ad", "reference.h5ad", [], "There is no file"),
        ("query.h5ad", "nothing.npz", [], "There is no file"),
        ("query.h5ad", "query.h5ad", [], "No export 'ldvae'"),
        ("query.h5ad", "broken.npz", [], "cannot be read as a decoder"),
        ("query.h5ad", "decoder.npz", [], "no column with those of the cells"),
        ("query.h5ad", "reference.h5ad", ["--layer", "raw"], "'raw' is not in `adata.layers`"),
        ("query.h5ad", "reference.h5ad", ["--batch", "moon"], "`batch` must be 'mean', 'fit'"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_no_folder(files, query, reference, arguments, message):
    (files / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    result = invoke(files / query, "--reference", files / reference, "--out", files / "out", *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert not (files / "out").exists()
