"""Biology that a reader would recognise, on real counts."""

from __future__ import annotations

import anndata as ad
import pandas as pd
import pytest
from typer.testing import CliRunner

from ldvae_ext import get
from ldvae_ext.cli import app

pytestmark = pytest.mark.slow

# Textbook markers, four of which stand among the ten genes at one end of the factor that the population would miss most.
MARKERS = {
    "B": {
        "CD79A",
        "CD79B",
        "MS4A1",
        "CD74",
        "HLA-DRA",
        "HLA-DRB1",
        "HLA-DPB1",
        "HLA-DPA1",
        "HLA-DQA1",
        "TCL1A",
        "CD37",
    },
    "CD14+ Mono": {
        "S100A8",
        "S100A9",
        "LYZ",
        "FCN1",
        "CST3",
        "TYROBP",
        "LGALS2",
        "CD14",
        "LST1",
        "FCER1G",
        "AIF1",
        "FTL",
        "FTH1",
    },
    "NK": {"NKG7", "GNLY", "GZMB", "PRF1", "CST7", "CTSW", "CCL5", "GZMA", "FGFBP2", "KLRD1", "TYROBP", "FCER1G"},
}


@pytest.fixture(scope="module")
def run_on_pbmc3k(tmp_path_factory, real_data):
    import matplotlib as mpl

    mpl.use("Agg")
    out = tmp_path_factory.mktemp("pbmc3k") / "run"
    arguments = [
        "run",
        str(real_data / "pbmc3k.h5ad"),
        "--groupby",
        "cell_type",
        "--max-epochs",
        "60",
        "--runs",
        "2",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out


def test_populations_miss_the_factor_with_their_markers(run_on_pbmc3k):
    adata = ad.read_h5ad(run_on_pbmc3k / "adata.h5ad")
    assert adata.shape == (2638, 13713)
    assert adata.var["ldvae"].sum() == 2000
    groups = pd.read_csv(run_on_pbmc3k / "tables" / "ablation_groups.csv")
    most = groups.loc[groups.groupby("group")["mean"].idxmax()].set_index("group")
    for population, markers in MARKERS.items():
        genes = get.top_genes(adata, most.loc[population, "factor"], n=10)
        ends = [set(rows["gene"]) for _, rows in genes.groupby("direction")]
        assert max(len(markers & end) for end in ends) >= 4, (population, ends)
        assert most.loc[population, "share_helped"] > 0.9
